"""Runs as a user starts them: training, resuming, evaluating, several processes, bad input."""

import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.logger import setup_logger
from toys import BASELINE, CONFIGS, LIBRA, toy_opts

from libra_d2.checkpoint import write_weights
from libra_d2.data.checks import check_dataset
from libra_d2.data.digits import Split, make_digits
from libra_d2.engine import LibraTrainer, check_run, checks, load_config, main

ROOT = CONFIGS.parent
FOCAL = ("table1a_alpha0.25", "table1b_gamma2.0", "table1d_focal", "table1d_ohem_batch128_nms0.5")
TRAINED = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base")
    # Those only run converted weights: tests/test_checkpoint.py does that.
    and not ("_mmdet" in path.name and "weights/" in path.read_text())
    # tests/test_own_data.py trains these.
    and path.parent.name != "Finetune"
    # They differ in numbers alone, which tests/test_config.py compares with the paper.
    and not (path.name.startswith("table1") and path.stem not in FOCAL)
)


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """A registered data set of six images."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    make_digits(Split(num_images=6, seed=5, training=True), folder)
    register_coco_instances("tiny", {}, str(folder / "annotations.json"), str(folder / "images"))
    make_proposals(folder)
    yield folder
    DatasetCatalog.remove("tiny")
    MetadataCatalog.remove("tiny")


def make_proposals(folder):
    """Precomputed proposals: boxes near the ground truths, and some anywhere."""
    coco = json.loads((folder / "annotations.json").read_text())
    rng = np.random.default_rng(0)
    proposals = {"ids": [], "boxes": [], "objectness_logits": []}
    for image in coco["images"]:
        own = [a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]
        near = np.repeat(np.float32(own).reshape(-1, 4), 10, axis=0)
        near[:, :2] += rng.normal(0, 3, (len(near), 2))
        far = rng.uniform((0, 0, 10, 10), (100, 100, 110, 110), (60, 4))
        boxes = np.concatenate([near, far])
        boxes[:, 2:] += boxes[:, :2]
        proposals["ids"].append(image["id"])
        proposals["boxes"].append(boxes.astype(np.float32))
        proposals["objectness_logits"].append(rng.normal(size=len(boxes)).astype(np.float32))
    (folder / "proposals.pkl").write_bytes(pickle.dumps(proposals))


@pytest.fixture(autouse=True)
def fresh_loggers():
    """Each run in this process gets handlers of its own, as if it were in one of its own."""
    yield
    for name in ("detectron2", "fvcore", "libra_d2"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
    setup_logger.cache_clear()


def command(config, output, *opts, flags=()):
    """A command line for a toy run on the tiny data set."""
    tiny_data = ("DATASETS.TRAIN", ("tiny",), "DATASETS.TEST", ("tiny",), "OUTPUT_DIR", output)
    proposals = (str(Path(MetadataCatalog.get("tiny").json_file).with_name("proposals.pkl")),)
    for split in ("TRAIN", "TEST"):
        tiny_data += (f"DATASETS.PROPOSAL_FILES_{split}", proposals)
    return ["--config-file", str(CONFIGS / config), *flags, *toy_opts(*tiny_data, *opts)]


def metrics(output):
    lines = (output / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def fails(capsys, argv, match):
    """The run ends with exit status 2 and one sentence that matches."""
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    message = capsys.readouterr().err.strip()
    assert re.search(match, message), message
    assert message.count("\n") == 0 and "Traceback" not in message


@pytest.mark.parametrize("config", TRAINED)
def test_every_config_trains_and_is_evaluated(config, tmp_path):
    main(command(config, tmp_path, "SOLVER.MAX_ITER", 1))
    (record,) = [r for r in metrics(tmp_path) if "total_loss" in r]
    assert record["iteration"] == 0 and math.isfinite(record["total_loss"])
    assert (tmp_path / "model_final.pth").exists()
    results = "box_proposals.pkl" if "/rpn_R" in config or "libra_rpn" in config else None
    assert (tmp_path / "inference" / (results or "coco_instances_results.json")).exists()


# One of each kind of model.
RESUMED = [
    f"COCO-{kind}/{name}_R_50_FPN_1x.yaml"
    for kind, names in {
        "Detection": "libra_faster_rcnn libra_cascade_rcnn libra_fast_rcnn pisa_faster_rcnn "
        "ohem_faster_rcnn libra_retinanet mutual_guidance_retinanet pisa_retinanet libra_rpn",
        "InstanceSegmentation": "libra_cascade_mask_rcnn",
    }.items()
    for name in names.split()
]


@pytest.mark.parametrize("config", RESUMED)
def test_every_kind_resumes_and_is_evaluated(config, tmp_path):
    main(command(config, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1))
    main(command(config, tmp_path, "SOLVER.MAX_ITER", 3, flags=["--resume"]))
    records = [r for r in metrics(tmp_path) if "total_loss" in r]
    assert [r["iteration"] for r in records] == [1, 2]
    assert all(math.isfinite(r["total_loss"]) for r in records)
    saved = (tmp_path / "config.yaml").read_bytes()
    weights = str(tmp_path / "model_final.pth")
    main(command(config, tmp_path, "MODEL.WEIGHTS", weights, flags=["--eval-only"]))
    assert (tmp_path / "config.yaml").read_bytes() == saved
    assert any((tmp_path / "evaluation").iterdir())


def test_proposals_are_evaluated_by_their_recall(tmp_path):
    main(command("COCO-Detection/libra_rpn_R_50_FPN_1x.yaml", tmp_path))
    recalls = {k: v for r in metrics(tmp_path) for k, v in r.items() if k.startswith("box_prop")}
    assert {f"box_proposals/AR@{n}" for n in (100, 300, 1000)} <= set(recalls)
    at = [recalls[f"box_proposals/AR@{n}"] for n in (100, 300, 1000)]
    assert at == sorted(at)


def test_augmentation_at_test_time_is_evaluated_too(tmp_path, capsys):
    opts = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (96,), "TEST.AUG.MAX_SIZE", 200)
    main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1, *opts))
    assert any("bbox_TTA/AP" in r for r in metrics(tmp_path))
    assert (tmp_path / "inference_TTA").is_dir()
    argv = command("Base-RetinaNet.yaml", tmp_path / "out", *opts)
    fails(capsys, argv, "TEST.AUG.ENABLED True needs MODEL.META_ARCHITECTURE GeneralizedRCNN")


def test_expected_results_are_compared_with_an_evaluation(tmp_path):
    main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
    for expected, ok in ((0.0, True), (90.0, False)):
        opts = ("MODEL.WEIGHTS", tmp_path / "model_final.pth", "TEST.EXPECTED_RESULTS")
        argv = command(BASELINE, tmp_path, *opts, [["bbox", "AP", expected, 20.0]])
        if ok:
            main([*argv[:2], "--eval-only", *argv[2:]])
        else:
            with pytest.raises(SystemExit) as error:
                main([*argv[:2], "--eval-only", *argv[2:]])
            assert error.value.code == 1


def test_the_batch_is_divided_as_it_is_scaled(tmp_path):
    """16 images for 8 processes are 6 for 3."""
    opts = ("SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8)
    _, config, *opts = command(LIBRA, tmp_path, *opts)
    cfg = load_config(config, opts)
    check_run(cfg, eval_only=False, num_processes=3)
    with pytest.raises(ValueError, match="a multiple of SOLVER.REFERENCE_WORLD_SIZE 8, got 12"):
        cfg = load_config(config, [*opts, "SOLVER.IMS_PER_BATCH", "12"])
        check_run(cfg, eval_only=False, num_processes=3)


def test_the_checks_build_the_model_on_the_cpu(tmp_path, monkeypatch):
    _, config, *opts = command(LIBRA, tmp_path)
    cfg = load_config(config, opts)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda"
    devices = []
    build = checks.build_model
    monkeypatch.setattr(checks, "build_model", lambda c: devices.append(c.MODEL.DEVICE) or build(c))
    check_run(cfg, eval_only=False)
    assert devices == ["cpu"] and cfg.MODEL.DEVICE == "cuda"


def test_a_trainer_in_a_users_script_logs(tmp_path):
    """And what others print while it evaluates is not swallowed."""
    logging.getLogger("detectron2").setLevel(logging.NOTSET)
    _, config, *opts = command(BASELINE, tmp_path)
    LibraTrainer(load_config(config, opts))
    assert logging.getLogger("detectron2").isEnabledFor(logging.INFO)


def test_lvis_annotations_pass_the_checks(tmp_path):
    image = {"id": 1, "coco_url": "http://x/train2017/1.jpg", "height": 9, "width": 9}
    annotation = {**ANNOTATION, "area": 12}
    file = tmp_path / "lvis.json"
    content = json.loads(coco(images=[image], annotations=[annotation]))
    file.write_text(json.dumps(content))
    MetadataCatalog.get("tiny_lvis").set(json_file=str(file), evaluator_type="lvis")
    DatasetCatalog.register("tiny_lvis", list)
    try:
        for for_training in (True, False):
            check_dataset(
                "tiny_lvis",
                for_training=for_training,
                num_classes=10,
                num_classes_key="NUM_CLASSES",
            )
    finally:
        DatasetCatalog.remove("tiny_lvis")
        MetadataCatalog.remove("tiny_lvis")


def test_safetensors_are_evaluated_like_checkpoints(tmp_path):
    main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    write_weights(str(tmp_path / "model.safetensors"), weights, {})
    results = tmp_path / "inference" / "coco_instances_results.json"
    expected = results.read_bytes()
    results.unlink()
    argv = command(BASELINE, tmp_path, "MODEL.WEIGHTS", tmp_path / "model.safetensors")
    main([*argv[:2], "--eval-only", *argv[2:]])
    found = tmp_path / "evaluation" / "coco_instances_results.json"
    assert (found if found.exists() else results).read_bytes() == expected


class TestOutputFolder:
    def test_a_finished_run_is_not_overwritten_silently(self, tmp_path, capsys):
        main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        fails(capsys, command(BASELINE, tmp_path), "holds a training run; give --resume")
        after = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        assert before == after

    def test_overwrite_replaces_the_run_and_nothing_else(self, tmp_path):
        main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
        (tmp_path / "notes.txt").write_text("mine")
        main(command(BASELINE, tmp_path, flags=["--overwrite"]))
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert [r["iteration"] for r in metrics(tmp_path) if "total_loss" in r] == [1]

    def test_overwrite_with_bad_input_loses_nothing(self, tmp_path, capsys):
        main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        final = str(tmp_path / "model_final.pth")
        for opts, match in (
            (("MODEL.WEIGHTS", "nowhere.pth"), "'nowhere.pth' does not exist"),
            (("MODEL.BFP.REFINE_LEVEL", 7), "REFINE_LEVEL must be in"),
            (("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou"), "'iou' does not exist"),
            (("MODEL.WEIGHTS", final), "--overwrite would remove '.*model_final.pth'"),
        ):
            fails(capsys, command(LIBRA, tmp_path, *opts, flags=["--overwrite"]), match)
        argv = ["--config-file", str(tmp_path / "config.yaml"), "--overwrite"]
        fails(capsys, argv, "--overwrite would remove '.*config.yaml'")
        mine = tmp_path / "mine.yaml"
        mine.write_text("_BASE_: config.yaml\n")
        fails(capsys, ["--config-file", str(mine), "--overwrite"], "would remove '.*config.yaml'")
        mine.unlink()
        proposals = tmp_path / "inference" / "box_proposals.pkl"
        shutil.copy(
            Path(MetadataCatalog.get("tiny").json_file).with_name("proposals.pkl"), proposals
        )
        opts = ("DATASETS.PROPOSAL_FILES_TRAIN", (str(proposals),))
        fast = "COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml"
        argv = command(fast, tmp_path, *opts, flags=["--overwrite"])
        fails(capsys, argv, "--overwrite would remove '.*proposals.pkl'")
        proposals.unlink()
        assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    def test_resume_and_overwrite_exclude_each_other(self, tmp_path, capsys):
        flags = ["--resume", "--overwrite"]
        fails(capsys, command(BASELINE, tmp_path, flags=flags), "exclude each other")

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_must_be_a_folder(self, name, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        fails(capsys, command(BASELINE, tmp_path / name), "OUTPUT_DIR must be a folder")

    def test_a_broken_last_checkpoint_leaves_the_run_as_it_is(self, tmp_path, capsys):
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
        (tmp_path / "model_0000001.pth").write_text("broken")
        argv = command(BASELINE, tmp_path, flags=["--resume"])
        fails(capsys, argv, "whose checkpoints are all damaged")
        names = sorted(f.name for f in tmp_path.iterdir())
        assert names == ["last_checkpoint", "model_0000001.pth"]


ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}


def coco(**changes):
    """A COCO annotation file, but for the changes a good one."""
    image = {"id": 1, "file_name": "a.jpg", "height": 9, "width": 9}
    content = {"images": [image], "categories": [{"id": i, "name": str(i)} for i in range(10)]}
    return json.dumps({**content, "annotations": [ANNOTATION], **changes})


class TestBadInput:
    """What is not in the config's own values; tests/test_config.py has those."""

    @pytest.mark.parametrize(
        ("opts", "match"),
        [
            (("MODEL.WEIGHTS", "nowhere.pth"), "MODEL.WEIGHTS 'nowhere.pth' does not exist"),
            (("DATASETS.TRAIN", ("digit_train",)), "'digit_train' is not registered.*digits_train"),
            (("DATASETS.TEST", ("coco_2017_vl",)), "'coco_2017_vl' is not registered"),
            (("DATASETS.TEST", ("coco_2017_val",)), "instances_val2017.json does not exist"),
            (("DATASETS.TEST", ("voc_2007_test",)), "VOC2007 does not exist"),
            (("DATASETS.TRAIN", ()), "DATASETS.TRAIN is empty"),
            (("MODEL.ROI_HEADS.NAME", "LibraROIHead"), "did you mean 'LibraROIHeads'"),
            (("MODEL.META_ARCHITECTURE", "LibraRCNN"), "META_ARCHITECTURE 'LibraRCNN' does not"),
            (("MODEL.WEIGHTS", __file__), "is not a checkpoint of a torch model"),
            (("MODEL.FPN.NORM", "XX"), "no model can be built from this config: KeyError: 'XX'"),
            (("MODEL.KEYPOINT_ON", True), "annotation 1 without keypoints"),
            (("MODEL.ROI_HEADS.NUM_CLASSES", 9), "NUM_CLASSES is 9 but the data have 10 classes"),
            (("MODEL.BFP.REFINE_LEVEL", 7), r"REFINE_LEVEL must be in \[0, 4\]"),
            (("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_blanced"), "did you mean 'iou_balanced'"),
            (("MODEL.BFP.FPN_BUILDER", "build_fpn"), "FPN_BUILDER 'build_fpn' does not exist"),
            (("MODEL.BFP.REFINE_LEVL", "1"), "no key MODEL.BFP.REFINE_LEVL"),
        ],
    )
    def test_is_one_sentence(self, opts, match, tmp_path, capsys):
        output = tmp_path / "out"
        fails(capsys, command(LIBRA, output, *opts), match)
        assert not output.exists()

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("{", "is not valid json"),
            ("[]", "is not COCO json: expected object"),
            ('{"images": []}', "images: expected array of length >= 1"),
            (coco(categories=[]), "categories: expected array of length >= 1"),
            (coco(annotations=[]), "has no annotations"),
            (coco(images=[{"id": 1, "height": 9, "width": 9}]), "has no file_name of 1"),
            (
                coco(annotations=[{**ANNOTATION, "image_id": 9}]),
                "annotation 1 of the unknown image_id 9",
            ),
            (
                coco(annotations=[{**ANNOTATION, "category_id": 99}]),
                "annotation 1 of the unknown category_id 99",
            ),
            (
                coco(annotations=[{**ANNOTATION, "bbox": [1, 2, 3]}]),
                r"annotations\[0\].bbox: expected array of length 4",
            ),
            (coco(annotations=[ANNOTATION, ANNOTATION]), "two annotations of the same id"),
            (coco(annotations=[{**ANNOTATION, "bbox": [math.nan, 2, 3, 4]}]), "bbox is not finite"),
            (coco(annotations=[{**ANNOTATION, "iscrowd": 2}]), "iscrowd is 2, not 0 or 1"),
            (coco(images=[{"id": "3", "file_name": 5}]), r"images\[0\].* expected str.* got int"),
        ],
    )
    def test_annotations_that_are_not_coco_json(self, content, match, tmp_path, capsys):
        file = tmp_path / "annotations.json"
        file.write_text(content)
        register_coco_instances("broken", {}, str(file), str(tmp_path))
        try:
            argv = command(LIBRA, tmp_path / "out", "DATASETS.TRAIN", ("broken",))
            fails(capsys, argv, f"data set 'broken'.*{match}")
        finally:
            DatasetCatalog.remove("broken")
            MetadataCatalog.remove("broken")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (None, "PROPOSAL_FILES_TRAIN '.*proposals.pkl' does not exist"),
            (b"nonsense", "is not a pickle"),
            (pickle.dumps([1, 2]), "is not a dict of the lists ids, boxes, objectness_logits"),
            (pickle.dumps({"ids": [1], "boxes": []}), "is not a dict of the lists ids, boxes, obj"),
            (
                pickle.dumps({"ids": [1, 2], "boxes": [], "objectness_logits": []}),
                "has 2 and 0 and 0 ids, boxes, objectness_logits",
            ),
            (
                pickle.dumps(
                    {"ids": [1], "boxes": [np.zeros((3, 4))], "objectness_logits": [np.zeros(2)]}
                ),
                r"for image 1, boxes of \(3, 4\) and objectness_logits of \(2,\)",
            ),
            (
                pickle.dumps(
                    {"ids": [2], "boxes": [np.zeros((2, 4))], "objectness_logits": [np.zeros(2)]}
                ),
                "has no proposals for 5 of the 6 images of data set 'tiny', among them 1",
            ),
            (
                pickle.dumps(
                    {
                        "ids": [1],
                        "boxes": [np.full((1, 4), np.nan)],
                        "objectness_logits": [np.ones(1)],
                    }
                ),
                "for image 1, boxes of no finite numbers",
            ),
            (
                pickle.dumps({"ids": [1], "boxes": [[[0, 0, 1, 1]]], "objectness_logits": [[1]]}),
                "for image 1, boxes of no finite numbers",
            ),
            (
                pickle.dumps({"ids": 3, "boxes": [], "objectness_logits": []}),
                "is not a dict of the lists ids, boxes, objectness_logits",
            ),
            (pickle.dumps(os.system), r"holds posix.system, not only lists and numpy arrays"),
        ],
    )
    def test_precomputed_proposals(self, content, match, tmp_path, capsys):
        file = tmp_path / "proposals.pkl"
        if content is not None:
            file.write_bytes(content)
        config = "COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml"
        argv = command(config, tmp_path / "out", "DATASETS.PROPOSAL_FILES_TRAIN", (str(file),))
        fails(capsys, argv, match)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("opts", "match"),
        [
            (("DATASETS.PROPOSAL_FILES_TRAIN", ()), "a file for each of the 1 data sets"),
            (
                ("DATASETS.PROPOSAL_FILES_TRAIN", (1,)),
                "PROPOSAL_FILES_TRAIN must name a file for each",
            ),
            (("MODEL.LOAD_PROPOSALS", False), "PrecomputedProposals needs MODEL.LOAD_PROPOSALS"),
        ],
    )
    def test_precomputed_proposals_that_are_not_named(self, opts, match, tmp_path, capsys):
        config = "COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml"
        fails(capsys, command(config, tmp_path / "out", *opts), match)

    def test_an_object_without_a_mask(self, tmp_path, capsys):
        file = tmp_path / "annotations.json"
        file.write_text(coco(annotations=[{**ANNOTATION, "segmentation": []}]))
        register_coco_instances("maskless", {}, str(file), str(tmp_path))
        try:
            opts = ("MODEL.MASK_ON", True, "DATASETS.TRAIN", ("maskless",))
            argv = command(LIBRA, tmp_path / "out", *opts)
            fails(capsys, argv, "annotation 1 without segmentation")
        finally:
            DatasetCatalog.remove("maskless")
            MetadataCatalog.remove("maskless")

    def test_an_evaluator_that_there_is_not(self, tmp_path, capsys):
        DatasetCatalog.register("odd", list)
        MetadataCatalog.get("odd").evaluator_type = "panoptic"
        try:
            argv = command(LIBRA, tmp_path / "out", "DATASETS.TEST", ("odd",))
            fails(capsys, argv, "evaluator_type 'panoptic'.*coco, lvis, pascal_voc")
        finally:
            DatasetCatalog.remove("odd")
            MetadataCatalog.remove("odd")

    def test_weights_of_another_model(self, tmp_path, capsys):
        torch.save({"model": {"head.weight": torch.zeros(3)}}, tmp_path / "other.pth")
        for flags in ((), ("--eval-only",)):
            argv = command(
                LIBRA, tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "other.pth", flags=flags
            )
            fails(capsys, argv, "has no weights for this model")

    def test_evaluation_without_weights(self, tmp_path, capsys):
        argv = command(LIBRA, tmp_path, flags=["--eval-only"])
        fails(capsys, argv, "MODEL.WEIGHTS is empty; name the checkpoint")

    def test_cpu_processes_and_gpus(self, tmp_path, capsys):
        argv = command(LIBRA, tmp_path, flags=["--num-processes", "2"])
        fails(capsys, argv, "give --num-gpus 0 with it")

    def test_no_config(self, capsys):
        fails(capsys, [], "give a config with --config-file")

    @pytest.mark.skipif(torch.cuda.device_count() > 6, reason="needs fewer GPUs")
    def test_more_gpus_than_there_are(self, tmp_path, capsys):
        argv = command(LIBRA, tmp_path, flags=["--num-gpus", "7"])
        fails(capsys, argv, "7 GPUs are asked for and torch finds")

    def test_a_batch_that_cannot_be_divided(self, tmp_path, capsys):
        flags = ["--num-gpus", "0", "--num-processes", "3"]
        fails(capsys, command(LIBRA, tmp_path, flags=flags), "multiple of the 3 processes, got 2")

    def test_from_the_shell_it_has_no_traceback(self, tmp_path):
        """In the main process and, for what only building the model tells, in the others."""
        for flags in ([], ["--num-gpus", "0", "--num-processes", "2"]):
            argv = command(LIBRA, tmp_path, "MODEL.BFP.REFINE_LEVEL", 7, flags=flags)
            result = run(argv, dataset="digits_val")
            assert result.returncode == 2, result.stderr
            assert result.stderr.count("REFINE_LEVEL must be in") == 1
            assert "Traceback" not in result.stderr


def run(argv, *, dataset, launcher=(sys.executable,), program=ROOT / "train_net.py"):
    """Runs a program in a process of its own, which does not know the tiny data set."""
    data = ["DATASETS.TRAIN", f"('{dataset}',)", "DATASETS.TEST", "()"]
    return subprocess.run(
        [*launcher, str(program), *argv, *data],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("torchrun", [False, True], ids=["launch", "torchrun"])
def test_two_cpu_processes(torchrun, tmp_path):
    """They train one model, from gradients of both, and one writes."""
    if torchrun:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        launcher += ["--master-port", "29611"]
        flags = ["--num-gpus", "0"]
    else:
        launcher, flags = [sys.executable], ["--num-gpus", "0", "--num-processes", "2"]
    DatasetCatalog.get("digits_val")
    result = run(command(LIBRA, tmp_path, flags=flags), dataset="digits_val", launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "model_final.pth").exists() and (tmp_path / "log.txt.rank1").exists()
    assert [r["iteration"] for r in metrics(tmp_path) if "total_loss" in r] == [1]


TWO_RANKS = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from detectron2.utils import comm
from libra_d2 import data, modeling
from libra_d2.engine import LibraTrainer, launch, load_config

def work(cfg, output):
    torch.manual_seed(comm.get_rank())
    trainer = LibraTrainer(cfg)
    trainer.train()
    torch.save(trainer.model.module.state_dict(), f"{output}/{comm.get_rank()}.pth")

if __name__ == "__main__":
    output, config, *opts = sys.argv[1:]
    args = SimpleNamespace(num_gpus=0, num_processes=2, num_machines=1, machine_rank=0, dist_url="")
    launch(work, args, "cpu", (load_config(config, opts), output))
"""


def test_two_cpu_processes_hold_the_same_weights(tmp_path):
    """They start from other weights and see other images: only DDP makes them agree."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    _, config, *opts = command(LIBRA, tmp_path, "SOLVER.BASE_LR", 0.01, "SEED", -1)
    result = run([str(tmp_path), config, *opts], dataset="digits_val", program=script)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert len(first) > 100
    # Batch-norm statistics are each process's own.
    learned = [n for n in first if not n.endswith(("mean", "var", "num_batches_tracked"))]
    assert all(torch.equal(first[name], second[name]) for name in learned)


def test_the_screen_shows_no_known_noise(tmp_path):
    result = run(command(LIBRA, tmp_path), dataset="digits_val")
    screen = result.stdout + result.stderr
    assert result.returncode == 0, result.stderr
    for noise in ("Warning", "warn", "Environment info", "full config:", "deprecated", "is_fx"):
        assert noise not in screen, screen
    assert len(screen.splitlines()) < 60
    log = (tmp_path / "log.txt").read_text()
    assert "Environment info" in log and "Running with full config" in log


@pytest.mark.skipif(not (ROOT / ".venv" / "detectron2").exists(), reason="needs make's own .venv")
def test_make_demo_at_a_fraction_of_its_length(tmp_path):
    args = "SOLVER.MAX_ITER 12 TEST.EVAL_PERIOD 12 SOLVER.CHECKPOINT_PERIOD 12"
    result = subprocess.run(
        ["make", "demo", f"DEMO={tmp_path}", f"ARGS={args}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("model_final.pth", "metrics.json", "predictions.jpg", "training.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert list(Path(tmp_path).glob("events.out.tfevents*"))
    assert "AP50" in result.stdout and "eta" in result.stdout
    losses = [r["total_loss"] for r in metrics(tmp_path) if "total_loss" in r]
    assert losses[-1] < losses[0]
    assert any("roi_head/negative_iou_bin0" in r for r in metrics(tmp_path))
