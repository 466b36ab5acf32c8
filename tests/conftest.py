"""What all tests share; and, where detectron2 is missing, a loud last word about it."""

import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

try:
    HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
except ValueError:  # blocked by a test
    HAS_DETECTRON2 = False
# These test what needs torch and torchvision alone.
CORE = {
    f"test_{name}.py"
    for name in (
        "core",
        "sampling",
        "hard_sampling",
        "matching",
        "ranking",
        "losses",
        "layers",
        "fuzz",
    )
}

if HAS_DETECTRON2:
    pytest_plugins = ["own", "runs", "tiny"]  # fixtures
    # The data sets are drawn anew for every run of the tests. Where they lie is settled when
    # libra_d2.data is imported, hence here, before any test is.
    _datasets = tempfile.TemporaryDirectory(prefix="libra_d2_datasets_")
    os.environ["DETECTRON2_DATASETS"] = _datasets.name
else:
    collect_ignore = [f.name for f in Path(__file__).parent.glob("test_*.py") if f.name not in CORE]


# Whose tests take longest: they come first, so that no process is left with one of them at the end.
LONG = ("test_run.py", "test_ablation.py", "test_lazy_config.py", "test_resumable.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=HAS_DETECTRON2)
def environment_is_asked_for_once():
    """Each run logs it, which takes longer than a toy trains."""
    from detectron2.engine import defaults

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(defaults, "collect_env_info", cache(defaults.collect_env_info))
        yield


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
