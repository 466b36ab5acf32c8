"""Runs on a GPU: what the CPU's tests and those on a pretended device can't see."""

import pytest
import torch
from runs import records
from toys import SMALL

from libra_d2 import Detector
from libra_d2.deploy import export_detector

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_GPU = (*SMALL, "MODEL.DEVICE", "cuda", "SOLVER.LOG_PERIOD", 1)


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16", "SOLVER.LOG_GRAD_NORM", True),
        ("SOLVER.FAST", True, "SOLVER.EMA.ENABLED", True),
        ("SOLVER.FAST", True, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    ],
    ids=["float32", "float16", "fast", "adamw"],
)
def test_it_trains_resumes_and_predicts(run, out, opts):
    assert run(*ON_GPU, *opts, score=True, iterations=4) == 0
    assert run(*ON_GPU, *opts, score=True, iterations=6, flags=["--resume"]) == 0
    # Steps go on in another way and layout too.
    slow = (*ON_GPU, *opts, "SOLVER.FAST", False)
    assert run(*slow, score=True, iterations=8, flags=["--resume"]) == 0
    losses = [record["total_loss"] for record in records(out) if "total_loss" in record]
    assert len(losses) == 8 and all(0 < loss < 100 for loss in losses)
    image = (torch.rand(96, 128, 3) * 255).to(torch.uint8).numpy()
    found = [Detector(out, device=d, threshold=0.0)(image).scores for d in ("cuda", "cpu")]
    assert found[0][:3] == pytest.approx(found[1][:3], abs=0.01)


@pytest.mark.parametrize("format", ["torchscript", "script"])
def test_it_is_exported(run, out, tmp_path, format):
    assert run(*ON_GPU, score=True, iterations=2) == 0
    detector = Detector(out, device="cuda", threshold=0.0)
    export_detector(detector, tmp_path / "model.pt", format=format)
    assert (tmp_path / "model.pt").is_file()
