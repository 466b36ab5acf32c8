"""What all tests share; and, where detectron2 is missing, a loud last word about it."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
# These test what needs torch alone.
CORE = {"test_core.py", "test_sampling.py", "test_losses.py", "test_layers.py", "test_analyse.py"}

if HAS_DETECTRON2:
    # The embedded data sets go where neither the user's nor those of another run are; registered
    # paths are settled when libra_d2.data is imported, hence before any test is.
    os.environ["DETECTRON2_DATASETS"] = str(
        Path(os.environ.get("TMPDIR", "/tmp")) / f"libra_d2_tests_{os.getuid()}"
    )
else:
    collect_ignore = [f.name for f in Path(__file__).parent.glob("test_*.py") if f.name not in CORE]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    if HAS_DETECTRON2:
        return
    terminalreporter.section("detectron2 is NOT installed", sep="!", red=True)
    terminalreporter.write_line(
        "Only the torch-only core was tested. Skipped, because they need detectron2: "
        + ", ".join(collect_ignore)
    )
