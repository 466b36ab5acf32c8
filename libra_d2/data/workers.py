"""Processes that load images: what they draw, obey, and can't read."""

import contextlib
import os
import random
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

__all__ = [
    "LoadingError",
    "Reader",
    "Unreadable",
    "batches_of",
    "death_of_worker",
    "obey_the_parent_alone",
    "random_numbers_of",
]

# What libraries raise for files that are missing, damaged, or not as annotated.
_UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    SizeMismatchError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    struct.error,
)

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


class LoadingError(ValueError):
    """Images can't be loaded."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for an image that could not be read; it travels from a worker to the loader."""

    file_name: str
    reason: str

    def __str__(self) -> str:
        return f"image '{self.file_name}' cannot be read: {self.reason}"


class Reader:
    """A mapper that gives what can't be read another form than an error, which would lose its name.

    Args:
        mapper: makes a model's input of an image's record.
    """

    def __init__(self, mapper: Callable[[dict], Any]):
        self.mapper = mapper

    def __call__(self, record: dict) -> Any:
        try:
            return self.mapper(record)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(str(record.get("file_name")), reason)


def batches_of(loader: DataLoader) -> Iterator[list[Any]]:
    """The batches of a loader; what it raises when a worker dies becomes a sentence."""
    try:
        yield from loader
    except RuntimeError as error:
        if not (death := death_of_worker(error)):
            raise
        raise death from error


def death_of_worker(error: RuntimeError) -> LoadingError | None:
    """What to say if torch tells that a worker has died, as it does wherever the program is."""
    if "DataLoader worker" not in str(error) or "Traceback" in str(error):
        return None
    what = " ".join(str(error).split())
    return LoadingError(
        f"a process that loads images has ended ({what}); where memory is short, a lower "
        "DATALOADER.NUM_WORKERS helps"
    )


def obey_the_parent_alone(worker: int) -> None:
    """Leaves signals that come to a whole group of processes to the one that trains."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(_SIGNALS)
            if received.si_pid == os.getppid() and received.si_signo == signal.SIGTERM:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def random_numbers_of(seed: int, place: int) -> Iterator[None]:
    """Lets all libraries draw the numbers of one place in the order; then those they would have."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int(np.random.SeedSequence((seed, place)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed would seed GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
