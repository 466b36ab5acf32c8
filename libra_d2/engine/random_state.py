"""What a run would draw next, and other numbers that change with every step beside the weights."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

__all__ = [
    "get_random_state",
    "get_running_numbers",
    "kept_random_state",
    "set_random_state",
    "set_running_numbers",
]


def get_random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, as what a checkpoint may hold."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Lets the generators go on where :func:`get_random_state` was called."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Lets what follows draw the random numbers that it would have drawn without what is inside."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


def get_running_numbers(model: nn.Module) -> dict[str, float]:
    """The running means that detectron2's one-stage detectors divide losses by, by name.

    They are plain attributes, which a state dict leaves out.
    """
    return {
        f"{prefix}{'.' if prefix else ''}{name}": float(value)
        for prefix, module in model.named_modules()
        if isinstance(module, DenseDetector)
        for name, value in vars(module).items()
        if name.endswith("normalizer") and isinstance(value, (float, Tensor))
    }


def set_running_numbers(model: nn.Module, numbers: dict[str, float]) -> None:
    """Sets what :func:`get_running_numbers` gave."""
    for name, value in numbers.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, value)
