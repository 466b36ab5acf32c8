"""The metrics that a run has logged."""

import contextlib
import json
import re
from pathlib import Path

__all__ = ["is_loss", "read_metrics", "split_score"]

# A data set, where there are several, the task, and the number, whose class may have any name.
_SCORE = re.compile(r"(?:(.*)/)?((?:bbox|segm|keypoints|box_proposals)(?:_TTA)?)/(A[PR].*)")


def is_loss(name: str) -> bool:
    """Whether a number of a run is a loss, in training or of test data."""
    return name.rpartition("/")[2].startswith(("loss_", "total_loss"))


def split_score(name: str) -> tuple[str, str, str] | None:
    """The data set ("" if there is one alone), task and metric of an evaluation's number.

    Returns:
        None for any other number.
    """
    match = _SCORE.fullmatch(name)
    return (match[1] or "", match[2], match[3]) if match else None


def read_metrics(path: Path) -> list[dict]:
    """The records of a run's ``metrics.json``, one json object a line.

    A last line that was cut off, by a kill or a full disk, is left out.

    Raises:
        ValueError: if the file is missing or not of that form.
    """
    if not path.is_file():
        raise ValueError(f"'{path}' does not exist; give the metrics.json of a training run")
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        with contextlib.suppress(ValueError):  # it may be whole
            json.loads(lines[-1])
            lines[-1] += "\n"
    whole = [line for line in lines if line.endswith("\n") and line.strip()]
    try:
        records = [json.loads(line) for line in whole]
    except ValueError:
        raise ValueError(f"'{path}' is not a run's metrics.json, one object a line") from None
    if not all(isinstance(r, dict) and isinstance(r.get("iteration"), int) for r in records):
        raise ValueError(f"'{path}' holds no metrics of training iterations")
    return records
