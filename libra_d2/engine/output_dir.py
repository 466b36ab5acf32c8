"""The output folder of a run: what a run leaves there, who has it, how it is kept or replaced."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from libra_d2.checkpoint import write_whole
from libra_d2.metrics import read_metrics

from .weights import find_checkpoint

__all__ = [
    "check_output_dir",
    "drop_metrics_from",
    "hold_output_dir",
    "holds_checkpoint",
    "move_run",
    "restore_run",
]

# What a training run leaves in its output folder, by the path in it.
_RUN_FILES = re.compile(
    r"config\.yaml|events\.out\.tfevents\..*|last_checkpoint|log\.txt(\.rank\d+)?|metrics\.json"
    r"|model_(\d{7}|final|best)\.pth|inference(_TTA)?/[^/]*_results\.json"
    r"|inference(_TTA)?/(instances_predictions\.pth|box_proposals\.pkl|config\.yaml|log\.txt.*)"
)
_CHECKPOINT = re.compile(r"model_(\d{7}|final)\.pth")
_LOCK = ".lock"


def holds_checkpoint(output: Path) -> bool:
    """Whether there is something of a training run that a start could go on with, or lose."""
    return any(_CHECKPOINT.fullmatch(file.name) for file in _run_files(output))


def move_run(output: Path) -> Path | None:
    """Moves what a training run has left out of its folder, to one beside it.

    Returns:
        The new folder, ``OUTPUT_DIR.old-N``; None if there was nothing to move.
    """
    files = _run_files(output)
    if not files:
        return None
    number = 1
    while (place := output.with_name(f"{output.name}.old-{number}")).exists():
        number += 1
    for file in files:
        target = place / file.relative_to(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Within one file system it is a mere renaming.
        shutil.move(file, target)
    return place


def restore_run(place: Path, output: Path) -> None:
    """Moves a run back, in place of one that came to nothing."""
    for file in _run_files(output):
        file.unlink()
    for file in _run_files(place):
        target = output / file.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, target)
    shutil.rmtree(place, ignore_errors=True)


def drop_metrics_from(output: Path, iteration: int) -> None:
    """Drops lines of ``metrics.json`` that a resumed run will write anew, or that were cut off.

    Args:
        output: the folder of a run.
        iteration: the first that will be trained again.
    """
    file = output / "metrics.json"
    if not file.is_file():
        return
    kept = [record for record in read_metrics(file) if record["iteration"] < iteration]
    text = "".join(f"{json.dumps(record, sort_keys=True)}\n" for record in kept)
    if file.read_text(errors="replace") != text:
        write_whole(str(file), lambda beside: Path(beside).write_text(text))


@contextlib.contextmanager
def hold_output_dir(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder. The system lets go of it when this process ends.

    Raises:
        ValueError: if another run has it, or it can't be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with open(output / _LOCK, "a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(_held(output, file.name)) from None
            file.truncate(0)
            json.dump({"process": os.getpid(), "host": socket.gethostname()}, file)
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR '{output}' cannot be written to: {error.strerror or error}"
        ) from error


def _held(output: Path, lock: str) -> str:
    try:
        holder = json.loads(Path(lock).read_text())
        who = f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    return (
        f"OUTPUT_DIR '{output}' is in use: {who} trains there; wait for it, or give another "
        "OUTPUT_DIR"
    )


def check_output_dir(
    output: Path, *, training: bool, resume: bool, overwrite: bool, inputs: Iterable[str] = ()
) -> None:
    """Checks that a run can write there, and that nothing is lost unasked. Leaves nothing.

    Args:
        output: the folder, which need not exist.
        training: whether the run trains.
        resume: whether it may go on with what is there.
        overwrite: whether it may replace that.
        inputs: files that it reads.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    existing = output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or str(output) in ("", "."):
        raise ValueError(f"OUTPUT_DIR must be a folder of its own, got '{output}'")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR '{output}' cannot be written to: {error.strerror}") from error
    if not training:
        return
    if (output / _LOCK).is_file():
        with hold_output_dir(output):
            pass
    if overwrite:
        lost = {file.resolve() for file in _run_files(output)}
        for path in filter(None, inputs):
            if Path(str(path).partition("?")[0]).resolve() in lost:
                raise ValueError(
                    f"--overwrite would remove '{path}', which this run reads; copy it elsewhere "
                    "or give another OUTPUT_DIR"
                )
    elif holds_checkpoint(output):
        way_out = "--overwrite to replace it, or another OUTPUT_DIR"
        if not resume:
            raise ValueError(
                f"OUTPUT_DIR '{output}' holds a training run; give --resume to go on with it, "
                f"{way_out}"
            )
        if not find_checkpoint(output):
            raise ValueError(
                f"OUTPUT_DIR '{output}' holds a training run whose checkpoints are all damaged; "
                f"give {way_out}"
            )


def _run_files(output: Path) -> list[Path]:
    files = [*output.glob("*"), *output.glob("inference*/*")]
    return [
        file
        for file in files
        if _RUN_FILES.fullmatch(file.relative_to(output).as_posix()) and file.is_file()
    ]
