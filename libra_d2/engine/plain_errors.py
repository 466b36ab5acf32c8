"""One sentence of whatever detectron2, torch and others raise."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode

from libra_d2.config import list_keys

__all__ = ["plain_errors"]

# What a function was about, and where a user would look, for errors that do not say it.
_PARTS = {
    "build_optimizer": "the optimizer cannot be made (SOLVER.OPTIMIZER, BASE_LR, ...)",
    "build_lr_scheduler": "there is no schedule (SOLVER.LR_SCHEDULER_NAME, STEPS, ...)",
    "build_train_loader": "training data cannot be loaded (DATASETS.TRAIN, DATALOADER, INPUT)",
    "build_test_loader": "test data cannot be loaded (DATASETS.TEST, DATALOADER, INPUT)",
    "build_evaluator": "there is no evaluator (DATASETS.TEST)",
    "resume_or_load": "weights cannot be loaded (MODEL.WEIGHTS, or the checkpoint to resume from)",
    "build_model": "no model can be built from this config",
    "run_step": "a step of training fails",
    "process": "what the model finds cannot be scored",
}
_PACKAGE = Path(__file__).resolve().parents[1]
_LONGEST = 300  # characters of a message of others


@contextlib.contextmanager
def plain_errors(cfg: CfgNode) -> Iterator[None]:
    """Turns an error into a ``ValueError`` whose sentence says what failed and where to look.

    Args:
        cfg: of the run, in which the keys are sought that an error is about.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and _is_ours(error):
            raise
        raise ValueError(_sentence(error, cfg)) from error


def _is_ours(error: Exception) -> bool:
    """Whether code of this project has raised it, and so has said what is to be said."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)


def _sentence(error: Exception, cfg: CfgNode) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames]
    part = next((_PARTS[name] for name in reversed(names) if name in _PARTS), "the run fails")
    text = str(error)
    if "Original Traceback" in text:  # of a process that loads data
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if not text and isinstance(error, AssertionError) and frames:
        text = frames[-1].line or ""
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ..."
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, KeyError) and error.args:
        keys = [key for key, value in list_keys(cfg) if _holds(value, error.args[0])]
        what += f" ({', '.join(keys)})" if keys else ""
    return f"{part}: {what}; --debug shows where"


def _holds(value, part) -> bool:
    return value == part or (isinstance(value, (list, tuple)) and part in value)
