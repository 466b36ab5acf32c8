"""The output folder of a run: what a run leaves there, who has it, how it is kept or replaced."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TextIO

from .weights import find_checkpoint

__all__ = [
    "check_output_dir",
    "drop_metrics_from",
    "hold_output_dir",
    "is_of_a_run",
    "is_restarted",
    "is_run_file",
    "refuse_held",
    "replaced_run",
]

# What a training run leaves in its output folder, by the path in it.
_RUN_FILES = re.compile(
    r"config\.yaml|events\.out\.tfevents\..*|last_checkpoint|log\.txt(\.rank\d+)?|metrics\.json"
    r"|model_(\d{7}|final|best)\.pth|inference(_TTA)?/[^/]*_results\.json"
    r"|inference(_TTA)?/(instances_predictions\.pth|box_proposals\.pkl|config\.yaml|log\.txt.*)"
)
_CHECKPOINT = re.compile(r"model_(\d{7}|final)\.pth")
_LOCK = ".lock"
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun has started this process anew


def holds_checkpoint(output: Path) -> bool:
    """Whether there is something of a training run that a start could go on with, or lose."""
    return any(_CHECKPOINT.fullmatch(file.name) for file in _run_files(output))


@contextlib.contextmanager
def replaced_run(
    output: Path, resume: bool, overwrite: bool
) -> Iterator[Callable[[], None] | None]:
    """Moves a run aside that is to be replaced, and back if nothing comes of the new one.

    To be entered by who holds the folder.

    Yields:
        What removes the former run for good; None if there is none.

    Raises:
        ValueError: if there is a run that may not be replaced.
    """
    _check_run(output, resume, overwrite)
    for file in output.glob("*.partial"):  # of a run that was killed while it wrote
        if _RUN_FILES.fullmatch(file.stem):
            file.unlink()
    files = _run_files(output) if overwrite else []
    if not files:
        yield None
        return
    place = next(p for i in count(1) if not (p := output / f"old-{i}").exists())
    try:
        for file in files:
            _rename(file, place / file.relative_to(output))
    except BaseException:
        _put_back(place, output)
        raise
    print(f"the run that was in '{output}' is in '{place}' until this one has a checkpoint")
    try:
        yield partial(_remove, place)
    finally:
        if place.exists() and not holds_checkpoint(output):
            for file in _run_files(output):
                file.unlink()
            _put_back(place, output)
            _forget_job(output)  # started anew, this run has nothing to go on with
        elif place.exists():
            print(f"the run that was in '{output}' is still in '{place}'", file=sys.stderr)


def is_of_a_run(output: Path) -> bool:
    """Whether a training has, or had, this folder."""
    return (output / _LOCK).exists() or holds_checkpoint(output)


def is_run_file(file: Path) -> bool:
    """Whether a training has left this file, in its folder or that of its evaluation."""
    folders = (file.parent, file.parent.parent)
    return any(file in _run_files(folder) for folder in folders if is_of_a_run(folder))


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    logging.getLogger(__name__).info("removed '%s', which this run has replaced", place)


def _put_back(place: Path, output: Path) -> None:
    for file in _run_files(place):
        _rename(file, output / file.relative_to(place))
    shutil.rmtree(place, ignore_errors=True)


def _rename(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)


def drop_metrics_from(output: Path, iteration: int, *, keep_score: bool = False) -> None:
    """Drops lines of ``metrics.json`` that a resumed run will write anew, or that were cut off.

    Args:
        output: the folder of a run, which may have the file open to append to it.
        iteration: the first that will be trained again.
        keep_score: whether to keep the last evaluation of a run that is extended, which bears the
            number of the iteration after its last.
    """
    file = output / "metrics.json"
    if not file.is_file():
        return
    end = 0
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        with contextlib.suppress(ValueError, TypeError, KeyError):  # what is none is left alone
            record = json.loads(line)
            is_score = record["iteration"] == iteration and "total_loss" not in record
            if record["iteration"] >= iteration and not (is_score and keep_score):
                break
        end += len(line)
    os.truncate(file, end)


@contextlib.contextmanager
def hold_output_dir(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder. The system lets go of it when this process ends.

    Raises:
        ValueError: if another run has it, or it can't be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            # No link, whose target would be written to.
            descriptor = os.open(output / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(os.fdopen(descriptor, "r+"))
            _lock(file, output)
            file.truncate(0)
            holder = {"process": os.getpid(), "host": socket.gethostname(), "job": _job()}
            json.dump(holder, file)
            file.flush()
        except OSError as error:
            raise ValueError(
                f"OUTPUT_DIR '{output}' cannot be written to: {error.strerror or error}"
            ) from error
        yield


def _lock(file: TextIO, output: Path) -> None:
    """Locks a file until it is closed; raises ``ValueError`` if another process has."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(_held(output)) from None
        logging.getLogger(__name__).warning(
            "OUTPUT_DIR '%s' cannot be locked (%s): start no other run there",
            output,
            error.strerror,
        )


def _forget_job(output: Path) -> None:
    """Lets no restart by torchrun take what is in a folder for its own."""
    if _RESTARTS in os.environ and not (output / _LOCK).is_symlink():
        with contextlib.suppress(OSError):
            os.truncate(output / _LOCK, 0)


def refuse_held(output: Path) -> None:
    """Raises ``ValueError`` if a run has a folder."""
    if (output / _LOCK).is_file():
        with open(output / _LOCK, "a+") as file:
            _lock(file, output)


def _job() -> str:
    """What all starts by one torchrun share."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.environ.get('MASTER_PORT', '')}"


def is_restarted(output: Path) -> bool:
    """Whether torchrun has started this process anew, after its run had taken the folder."""
    if not int(os.environ.get(_RESTARTS, 0)):
        return False
    try:
        return json.loads((output / _LOCK).read_text())["job"] == _job()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _held(output: Path) -> str:
    try:
        holder = json.loads((output / _LOCK).read_text())
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
    """Checks that a run can write there, and that nothing is lost unasked. Makes no file.

    Args:
        output: the folder, which need not exist.
        training: whether the run trains.
        resume: whether it may go on with what is there.
        overwrite: whether it may replace that.
        inputs: files that it reads.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    if {"?", "#"} & {*str(output)}:
        raise ValueError(f"OUTPUT_DIR must have no ? and no #, as in addresses, got '{output}'")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    try:
        existing = output
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir() or str(output) in ("", "."):
            raise ValueError(f"OUTPUT_DIR must be a folder of its own, got '{output}'")
        with tempfile.TemporaryFile(dir=existing):
            pass
        if training:
            refuse_held(output)
            if os.environ.get(_RESTARTS) == "0":
                _forget_job(output)  # of one before this, even if it is called the same
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR '{output}' cannot be written to: {error.strerror}") from error
    if not training:
        return
    if overwrite:
        lost = {file.resolve() for file in _run_files(output)}
        for path in filter(None, inputs):
            if Path(str(path).partition("?")[0]).resolve() in lost:
                raise ValueError(
                    f"--overwrite would remove '{path}', which this run reads; copy it elsewhere "
                    "or give another OUTPUT_DIR"
                )
    _check_run(output, resume, overwrite)


def _check_run(output: Path, resume: bool, overwrite: bool) -> None:
    """Raises ``ValueError`` if there is a run that can neither be resumed nor replaced."""
    if holds_checkpoint(output) and not overwrite:
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
