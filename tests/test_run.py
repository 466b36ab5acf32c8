"""Runs as a user starts them: training, resuming, evaluating, several processes."""

import errno
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import EventStorage
from tiny import command, fails, metrics, start
from torch.multiprocessing import ProcessExitedException
from toys import BASELINE, CONFIGS, LIBRA, toy_config

from libra_d2.checkpoint import write_weights
from libra_d2.engine import LibraTrainer, check_run, launch, load_config, main
from libra_d2.engine.evaluators import QuietCOCOEvaluator
from libra_d2.engine.launch import check_processes

ROOT = CONFIGS.parent
pytestmark = pytest.mark.usefixtures("tiny")
FOCAL = ("table1a_alpha0.25", "table1b_gamma2.0", "table1d_focal", "table1d_ohem_batch128_nms0.5")
SAME_BUT_FOR_NUMBERS = (
    *("table4_negatives_k3", "table4_negatives_k5"),
    *(f"table6_alpha{x}" for x in ("0.2_gamma1.0", "0.3_gamma1.0", "0.5_gamma1.0", "0.5_gamma2.0")),
    *("pisa_retinanet_X_101_32x4d_FPN_1x", "libra_retinanet_R_101_FPN_1x"),
    "libra_faster_rcnn_R_101_FPN_2x",
)
# One of each kind of model.
RESUMED = [
    f"COCO-{kind}/{name}_R_50_FPN_1x.yaml"
    for kind, names in {
        "Detection": "libra_faster_rcnn libra_fast_rcnn mutual_guidance_retinanet libra_rpn",
        "InstanceSegmentation": "libra_cascade_mask_rcnn",
    }.items()
    for name in names.split()
]
TRAINED = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base")
    # Those only run converted weights: tests/test_checkpoint.py does that.
    and not ("_mmdet" in path.name and "weights/" in path.read_text())
    # tests/test_own_data.py trains these.
    and path.parent.name != "Finetune"
    # Trained as it is, by test_make_demo_at_a_fraction_of_its_length.
    and path.stem != "demo"
    # They differ from others in numbers alone, which tests/test_config.py compares with the paper.
    and not (path.name.startswith("table1") and path.stem not in FOCAL)
    and path.stem not in SAME_BUT_FOR_NUMBERS
    and str(path.relative_to(CONFIGS)) not in RESUMED
)


@pytest.mark.parametrize("config", TRAINED)
def test_every_config_trains_and_is_evaluated(config, tmp_path):
    main(command(config, tmp_path, "SOLVER.MAX_ITER", 1))
    (record,) = [r for r in metrics(tmp_path) if "total_loss" in r]
    assert record["iteration"] == 0 and math.isfinite(record["total_loss"])
    assert (tmp_path / "model_final.pth").exists()
    results = "box_proposals.pkl" if "/rpn_R" in config or "libra_rpn" in config else None
    assert (tmp_path / "inference" / (results or "coco_instances_results.json")).exists()


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

    class Trainer(LibraTrainer):
        @classmethod
        def build_model(cls, cfg):
            devices.append(cfg.MODEL.DEVICE)
            return super().build_model(cfg)

    check_run(cfg, eval_only=False, trainer_class=Trainer)
    assert devices == ["cpu"] and cfg.MODEL.DEVICE == "cuda"


def test_a_trainer_in_a_users_script_logs(tmp_path):
    """And what others print while it evaluates is not swallowed."""
    logging.getLogger("detectron2").setLevel(logging.NOTSET)
    _, config, *opts = command(BASELINE, tmp_path)
    LibraTrainer(load_config(config, opts))
    assert logging.getLogger("detectron2").isEnabledFor(logging.INFO)


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


@pytest.mark.slow  # torchrun differs from the test after it in how processes begin
def test_two_cpu_processes_of_torchrun(tmp_path):
    """They train one model, from gradients of both, and one writes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", "29611"]
    DatasetCatalog.get("digits_val")
    argv = command(LIBRA, tmp_path, flags=["--num-gpus", "0"])
    result = start(argv, dataset="digits_val", launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "model_final.pth").exists() and (tmp_path / "log.txt.rank1").exists()
    assert [r["iteration"] for r in metrics(tmp_path) if "total_loss" in r] == [1]


def test_an_evaluation_on_a_full_disk_ends_no_training(monkeypatch, caplog):
    """In the process that writes: the others of a run go on with theirs."""

    def evaluate(self, img_ids):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(COCOEvaluator, "evaluate", evaluate)
    evaluator = QuietCOCOEvaluator.__new__(QuietCOCOEvaluator)
    with EventStorage():
        assert evaluator.evaluate() == {}
    assert "this evaluation cannot be written: [Errno 28]" in caplog.text
    with pytest.raises(OSError, match="No space left"):  # of nothing but an evaluation
        evaluator.evaluate()


def test_nothing_becomes_0_over_several_processes():
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 1)
    cfg = toy_config(LIBRA, *opts, "SOLVER.CHECKPOINT_PERIOD", 1)
    scaled = LibraTrainer.auto_scale_workers(cfg, 4)
    assert scaled.SOLVER.IMS_PER_BATCH == 4 * cfg.SOLVER.IMS_PER_BATCH and scaled.is_frozen()
    solver = scaled.SOLVER
    assert (solver.MAX_ITER, solver.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (1, 1, 1)


@pytest.mark.parametrize(
    ("opts", "is_told"),
    [
        (("SOLVER.MAX_ITER", 500, "SOLVER.WARMUP_ITERS", 500), True),
        (("SOLVER.MAX_ITER", 900, "SOLVER.WARMUP_ITERS", 500, "SOLVER.STEPS", (300,)), True),
        (("SOLVER.MAX_ITER", 900, "SOLVER.WARMUP_ITERS", 200, "SOLVER.STEPS", (300,)), False),
    ],
)
def test_a_warm_up_that_is_too_long_is_told(opts, is_told, caplog):
    name = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", ())
    cfg = toy_config(LIBRA, *name, "SOLVER.BASE_LR", 0.01, *opts)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    LibraTrainer.build_lr_scheduler(cfg, optimizer)
    assert ("SOLVER.BASE_LR is never reached" in caplog.text) is is_told


def test_machines_with_a_process_each_end_as_it_does(monkeypatch):
    """detectron2 starts a process there too."""

    def end(*args, **kwargs):
        raise ProcessExitedException("", 0, 0, exit_code=75)

    monkeypatch.setattr(sys.modules["libra_d2.engine.launch"], "detectron2_launch", end)
    args = {"num_gpus": 0, "num_processes": 1, "machine_rank": 0, "dist_url": "tcp://x:1"}
    with pytest.raises(SystemExit) as exit_:
        launch(print, SimpleNamespace(num_machines=2, **args), "cpu", ())
    assert exit_.value.code == 75


def an_args(**values):
    both = {"num_gpus": 1, "num_processes": 1, "num_machines": 1, "machine_rank": 0}
    url = default_argument_parser().get_default("dist_url")
    return SimpleNamespace(**{**both, "dist_url": url, **values})


def test_devices_and_processes_must_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(an_args(num_gpus=2), "cuda")
    check_processes(an_args(), "cuda:1")
    with pytest.raises(ValueError, match="cuda:1 is one GPU and there are 2 processes"):
        check_processes(an_args(num_gpus=2), "cuda:1")
    with pytest.raises(ValueError, match="--num-gpus 2 and MODEL.DEVICE cpu contradict"):
        check_processes(an_args(num_gpus=2), "cpu")


def test_runs_of_one_machine_have_ports_of_their_own(monkeypatch):
    urls = []
    monkeypatch.setattr(
        sys.modules["libra_d2.engine.launch"],
        "detectron2_launch",
        lambda *args, dist_url, **kwargs: urls.append(dist_url),
    )
    for values in ({"num_gpus": 2}, {"num_gpus": 2, "dist_url": "tcp://x:1"}, {"num_machines": 2}):
        launch(print, an_args(**values), "cuda", ())
    assert urls == ["auto", "tcp://x:1", an_args().dist_url]


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
    result = start([str(tmp_path), config, *opts], dataset="digits_val", program=script)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert len(first) > 100
    # Batch-norm statistics are each process's own.
    learned = [n for n in first if not n.endswith(("mean", "var", "num_batches_tracked"))]
    assert all(torch.equal(first[name], second[name]) for name in learned)


def test_the_screen_shows_no_known_noise(tmp_path):
    result = start(command(LIBRA, tmp_path), dataset="digits_val")
    screen = result.stdout + result.stderr
    assert result.returncode == 0, result.stderr
    for noise in ("Warning", "warn", "Environment info", "full config:", "deprecated", "is_fx"):
        assert noise not in screen, screen
    assert len(screen.splitlines()) < 60
    log = (tmp_path / "log.txt").read_text()
    assert "Environment info" in log and "Running with full config" in log


@pytest.mark.skipif(not (ROOT / ".venv" / "detectron2").exists(), reason="needs make's own .venv")
def test_make_demo_at_a_fraction_of_its_length(tmp_path):
    args = "SOLVER.MAX_ITER 4 TEST.EVAL_PERIOD 4 SOLVER.CHECKPOINT_PERIOD 4 INPUT.MIN_SIZE_TEST 96"
    args += " MODEL.RPN.POST_NMS_TOPK_TEST 50 TEST.DETECTIONS_PER_IMAGE 20"
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
    assert any("total_loss" in record for record in metrics(tmp_path))
    assert any("roi_head/negative_iou_bin0" in record for record in metrics(tmp_path))
