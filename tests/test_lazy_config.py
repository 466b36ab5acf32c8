"""Runs of LazyConfigs, of ours and of users, and what is wrong with some."""

import re
import shlex
import signal
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from formats import make_coco
from runs import at_iteration, model_of, same_weights, send
from tiny import metrics
from toys import CONFIGS

from libra_d2 import Detector
from libra_d2.engine import main
from libra_d2.engine.lazy_config import load_lazy_config
from libra_d2.engine.lazy_trainer import LazyTrainer
from libra_d2.zoo import get_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_coco(folder, num_images=4)
    return f"coco:{folder}/annotations.json"


SMALL = [
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
    "optimizer.lr=1e-5",
    "train.checkpointer.period=2",
    "train.init_checkpoint=''",
    "train.seed=1",
    "train.log_period=2",
]
EDGE = "dataloader.train.mapper.augmentations.0.short_edge_length"
LIBRA = "COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.py"
# A user's own file, upon one of ours.
OWN = """
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

_ours = LazyConfig.load({ours!r})
dataloader, lr_multiplier, model = _ours.dataloader, _ours.lr_multiplier, _ours.model
optimizer, train = _ours.optimizer, _ours.train
model.backbone.pyramid.bottom_up.freeze_at = 0
model.backbone.pyramid.bottom_up.stem.norm = "BN"
model.backbone.pyramid.bottom_up.stages.update(depth=18, norm="BN")
del model.backbone.pyramid.bottom_up.stages.stride_in_1x1
# Narrow, too.
model.backbone.pyramid.out_channels = model.backbone.bfp.in_channels = 32
model.proposal_generator.head.in_channels = 32
box = ShapeSpec(channels=32, height=7, width=7)
model.roi_heads.box_head.update(input_shape=box, fc_dims=[32])
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=32)
model.proposal_generator.post_nms_topk = (100, 20)
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN.format(ours=str(CONFIGS / LIBRA)))
    return file


@pytest.fixture
def run(data, own, tmp_path):
    """Runs train_net.py on a LazyConfig in this process; returns its exit status."""

    def run(*overrides, config=own, flags=(), output="out", iterations=4):
        argv = ["--config-file", str(config), "--num-gpus", "0", *flags]
        argv += ["--train", data, "--val", data, "--output", str(tmp_path / output)]
        small = [f"{EDGE}=[96]"] if config == own else []
        try:
            main([*argv, *SMALL, *small, f"train.max_iter={iterations}", *overrides])
        except SystemExit as exit_:
            return exit_.code or 0
        return 0

    return run


class TestRuns:
    def test_trains_scores_evaluates_and_detects(self, run, own, tmp_path, capsys):
        assert run("train.eval_period=4", "train.checkpointer.max_to_keep=1") == 0
        out = tmp_path / "out"
        assert "num_classes 80 -> 10" in capsys.readouterr().out
        records = metrics(out)
        assert [r["iteration"] for r in records if "total_loss" in r] == [1, 3]
        assert "bbox/AP" in records[-1]
        assert (out / "inference" / "coco_instances_results.json").is_file()
        checkpoints = sorted(f.name for f in out.glob("model_*.pth"))
        assert checkpoints == ["model_0000003.pth", "model_final.pth"]
        saved = LazyConfig.load(str(out / "config.yaml"))
        assert saved.model.roi_heads.num_classes == 10 and saved.train.seed == 1
        weights = f"train.init_checkpoint={out / 'model_final.pth'}"
        assert run(weights, flags=["--eval-only"], output="scored") == 0
        assert "bbox" in capsys.readouterr().out
        with pytest.raises(ValueError, match="is a LazyConfig.*train.init_checkpoint=.*final.pth"):
            Detector(out)
        detector = Detector(own, threshold=0.0, device="cpu", opts=[weights])
        assert detector.names == [f"digit {i}" for i in range(10)]
        result = detector(np.zeros((60, 90, 3), np.uint8))
        assert len(result.boxes) > 0 and result.boxes.max() <= 90

    def test_goes_on_to_the_last_bit(self, run, tmp_path, monkeypatch, capsys):
        run = partial(run, f"{EDGE}=[64,96]")
        assert run(output="whole") == 0
        with monkeypatch.context() as context:
            at_iteration(context, 1, send(signal.SIGTERM))
            assert run() == 143
        assert run(flags=["--resume"]) == 0
        assert same_weights(model_of(tmp_path / "whole"), model_of(tmp_path / "out"))
        assert "other values" not in capsys.readouterr().out
        assert run(flags=["--resume"], iterations=5) == 0
        assert "train.max_iter 4 -> 5" in capsys.readouterr().out

    @pytest.mark.slow  # processes begin as they do for a yaml config
    def test_two_processes(self, run, own, tmp_path):
        own.write_text(f"{own.read_text()}\nmodel.backbone.pyramid.norm = lambda c: GN(2, c)\n")
        own.write_text(f"from torch.nn import GroupNorm as GN\n{own.read_text()}")
        assert run(flags=["--num-processes", "2"], iterations=2) == 0
        assert (tmp_path / "out" / "model_final.pth").is_file()

    def test_mixed_precision(self, run, tmp_path):
        assert run("train.amp.enabled=true", "train.channels_last=true", iterations=2) == 0
        assert "dtype: auto, enabled: true" in (tmp_path / "out" / "config.yaml").read_text()


LSJ = [
    "dataloader.train.mapper.augmentations.1.target_height=96",
    "dataloader.train.mapper.augmentations.1.target_width=96",
    "dataloader.train.mapper.augmentations.2.crop_size=[96,96]",
    "train.amp.enabled=false",
    "model.proposal_generator.post_nms_topk=[100,10]",
    "model.roi_heads.batch_size_per_image=16",
    "model.roi_heads.mask_head.conv_dims=[16,16]",
    "train.checkpointer.period=100",
]
SWIN = [f"model.backbone.pyramid.bottom_up.{x}" for x in ("embed_dim=8", "depths=[1,1,1,1]")]
SWIN += ["model.backbone.pyramid.bottom_up.num_heads=[1,1,2,2]"]
SWIN += ["model.backbone.pyramid.square_pad=96"]
VIT = ["embed_dim=16", "depth=2", "num_heads=2", "window_block_indexes=[0]", "img_size=96"]
VIT = [f"model.backbone.pyramid.net.{x}" for x in VIT] + ["model.backbone.pyramid.square_pad=96"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "narrow"),
    [("libra_cascade_mask_rcnn_swin_t_in21k", SWIN), ("libra_mask_rcnn_vitdet_b_100ep", VIT)],
)
def test_transformers_train(run, tmp_path, name, narrow):
    config = CONFIGS / "COCO-InstanceSegmentation" / f"{name}.py"
    no_data = "dataloader.test.dataset.names=[]"
    assert run(*LSJ, *narrow, no_data, config=config, iterations=2) == 0
    assert "total_loss" in metrics(tmp_path / "out")[0]
    names = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)["model"]
    assert any(n.startswith("backbone.bfp.refine") for n in names)


def test_the_command_of_the_docs(run, data, tmp_path, monkeypatch):
    text = (CONFIGS.parent / "docs" / "lazyconfig.md").read_text()
    (command,) = re.findall(r"```\n(python train_net.py .*?)```", text, re.S)
    for split in ("train", "val"):
        command = command.replace(f"coco:my/{split}.json", data)
    argv = shlex.split(command.replace("\\\n", " ").replace("output/mine", str(tmp_path / "out")))
    monkeypatch.chdir(CONFIGS.parent)
    small = [*SMALL, f"{EDGE}=[64]", "dataloader.test.mapper.augmentations.0.short_edge_length=64"]
    small += ["model.backbone.pyramid.bottom_up.freeze_at=0", "train.max_iter=1"]
    main([*argv[2:], *small, "model.roi_heads.box_head.fc_dims=[1024]"])
    assert (tmp_path / "out" / "model_final.pth").is_file()


def test_several_test_sets(own, data, tmp_path):
    """Each is loaded, and scored, by itself."""
    small = ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    opts = ["DATASETS.TRAIN", f"('{data}',)", "DATASETS.TEST", "('tiny_a', 'tiny_b')"]
    cfg = load_lazy_config(str(own), [*opts, *small])
    for name, number in (("tiny_a", 2), ("tiny_b", 3)):
        records = [
            {"file_name": "x", "image_id": i, "height": 8, "width": 8} for i in range(number)
        ]
        DatasetCatalog.register(name, lambda records=records: records)
        MetadataCatalog.get(name).set(thing_classes=["a"], evaluator_type="coco")
    try:
        for name, number in (("tiny_a", 2), ("tiny_b", 3)):
            assert len(LazyTrainer.build_test_loader(cfg, name)) == number
            evaluator = LazyTrainer.build_evaluator(cfg, name, str(tmp_path))
            assert evaluator._metadata.name == name
    finally:
        for name in ("tiny_a", "tiny_b"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "match"),
        [
            (["train.max_itr=3"], "the config has no train.max_itr .did you mean 'max_iter'"),
            (["model.roi_head.num_classes=3"], "no model.roi_head .did you mean 'roi_heads'"),
            (["train.max_iter=-1"], r"train.max_iter must be in \[1, .*, got -1"),
            (["train.max_iter=many"], "train.max_iter must be such as 40000, got 'many'"),
            (["train.device=gpu"], "train.device must be a device of torch"),
            (["train.amp.dtype=half"], "train.amp.dtype 'half' does not exist"),
            (["train.max_iter", "5"], "such as train.max_iter=1000, got 'train.max_iter'"),
            (["train.max_iter=3="], "override 'train.max_iter=3=': .*"),
            (["model.roi_heads.num_classes=3"], "model.roi_heads.num_classes is 3 but the data"),
            (["model.roi_heads.batch_size_per_image=no"], "batch_size_per_image.*no|no model can"),
            (["model.roi_heads.negative_sampler.num_bins=0"], r"num_bins must be in \[1, 100\]"),
            (["optimizer.lr=-1"], r"optimizer.lr must be in \[0, .*, got -1"),
            (["lr_multiplier.warmup_method=x"], "there is no schedule|warmup"),
            (["dataloader.train.total_batch_size=0"], "total_batch_size must be in"),
            (["dataloader.train.dataset.names=no"], "data set 'no'|names"),
            (["train.init_checkpoint=/no.pth"], "train.init_checkpoint.*no.pth|'/no.pth'"),
        ],
    )
    def test_overrides(self, run, tmp_path, capsys, overrides, match):
        assert run(*overrides) == 2
        message = capsys.readouterr().err.strip().splitlines()
        assert len(message) == 1 and re.search(match, message[0]), message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("model = ", "own.py'.*syntax error"),
            ("import no_such_module", r"own.py' \(line 1\): ModuleNotFoundError: No module named"),
            ("train = dict(max_iter=3)", "defines no model and no dataloader and no optimizer"),
            ("x = 1\nraise KeyError('y')", r"own.py' \(line 2\): KeyError: 'y'"),
            ("from .none import model", "none.py does not exist"),
        ],
    )
    def test_files(self, run, own, capsys, text, match):
        own.write_text(text)
        assert run() == 2
        message = capsys.readouterr().err.strip().splitlines()
        assert len(message) == 1 and re.search(match, message[0]), message

    def test_no_file(self, run, own, capsys):
        own.rename(own.with_name("other.py"))
        assert run() == 2
        assert "own.py' does not exist" in capsys.readouterr().err

    def test_parts_that_fail(self, run, own, tmp_path, capsys):
        own.write_text(own.read_text() + "\nmodel.backbone = dict(_target_='no.such.thing')\n")
        assert run() == 2
        message = capsys.readouterr().err.strip()
        assert "no.such.thing" in message and message.count("\n") == 0
        assert not (tmp_path / "out").exists()

    def test_data_for_a_loader_of_ones_own(self, own, data):
        own.write_text(own.read_text() + "\ndataloader.train.dataset = dict(_target_='mine')\n")
        with pytest.raises(ValueError, match=r"has no dataloader.train.dataset.names, where data"):
            load_lazy_config(str(own), ["DATASETS.TRAIN", f"('{data}',)"])
        load_lazy_config(str(own), ["DATASETS.TEST", f"('{data}',)"])

    def test_a_model_without_classes_does_not_detect(self, own):
        text = own.read_text().replace("model.roi_heads.", "# ")
        rpn = f"model = LazyConfig.load({str(CONFIGS / 'common/models/libra_rpn.py')!r}).model"
        own.write_text(f"{text.split('model.backbone')[0]}\n{rpn}\n")
        with pytest.raises(ValueError, match="proposes boxes without classes"):
            Detector(own)

    def test_names_are_those_of_the_config(self, run, capsys):
        assert run(flags=["--num-processes", "3"], iterations=1) == 2
        message = capsys.readouterr().err
        assert "dataloader.train.total_batch_size must be a multiple of" in message

    def test_no_config_of_the_zoo(self):
        with pytest.raises(ValueError, match="zoo has no LazyConfig 'common/models/x.py'"):
            get_config("common/models/x.py")
