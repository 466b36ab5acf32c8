"""The output folder of a run: what a run leaves there, and how it is kept or replaced."""

from collections.abc import Iterable
from pathlib import Path

__all__ = ["check_output_dir", "remove_run"]

# What a training run leaves in its output folder.
_RUN_FILES = (
    "config.yaml",
    "events.out.tfevents.*",
    "last_checkpoint",
    "log.txt*",
    "metrics.json",
    "model_*.pth",
    "inference/*",
)
# By which of them a run is known.
_RUN_MARKS = ("last_checkpoint", "metrics.json", "model_*.pth")


def remove_run(output: Path) -> None:
    """Removes the files of a training run from its output folder, and nothing else."""
    for file in _run_files(output):
        file.unlink()


def check_output_dir(
    output: Path, *, training: bool, resume: bool, overwrite: bool, inputs: Iterable[str] = ()
) -> None:
    """Checks that a run can write there, and that nothing is lost unasked.

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
    if not training:
        return
    files = _run_files(output)
    if overwrite:
        lost = {file.resolve() for file in files}
        for path in filter(None, inputs):
            if Path(str(path)).resolve() in lost:
                raise ValueError(
                    f"--overwrite would remove '{path}', which this run reads; copy it elsewhere "
                    "or give another OUTPUT_DIR"
                )
    elif any(file.match(mark) for mark in _RUN_MARKS for file in files):
        way_out = "--overwrite to replace it, or another OUTPUT_DIR"
        if not resume:
            raise ValueError(
                f"OUTPUT_DIR '{output}' holds a training run; give --resume to go on with it, "
                f"{way_out}"
            )
        if not (output / "last_checkpoint").exists():
            raise ValueError(
                f"OUTPUT_DIR '{output}' holds a training run but no last_checkpoint to resume "
                f"from; give {way_out}"
            )


def _run_files(output: Path) -> list[Path]:
    return [file for pattern in _RUN_FILES for file in output.glob(pattern) if file.is_file()]
