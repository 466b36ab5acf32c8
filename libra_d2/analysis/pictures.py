"""Writes a figure, and the numbers that it shows beside it."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from libra_d2.checkpoint import refuse_existing, write_whole

__all__ = ["ENDS", "check_output", "new_figure", "plain_text", "save"]

ENDS = (".png", ".svg", ".pdf")


def check_output(output: str | Path, overwrite: bool) -> Path:
    """The path of a picture that can be written.

    Raises:
        ValueError: if it ends otherwise, or is there and may not be replaced.
    """
    output = Path(output)
    if output.suffix not in ENDS:
        raise ValueError(f"output must end in {', '.join(ENDS)}, got '{output}'")
    for file in (output, output.with_suffix(".csv")):
        refuse_existing(file, overwrite)
    return output


def new_figure(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.6):
    """A figure that belongs to nobody else, and its axes, (rows, columns)."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plain_text(name: str) -> str:
    """A label without what matplotlib takes for mathematics, or leaves out of a legend."""
    return name.replace("$", r"\$").lstrip("_") or "_"


def save(figure: Figure, output: Path, rows: Iterable[Mapping]) -> None:
    """Writes a figure, and its numbers as a csv of the same name.

    Raises:
        ValueError: if they can't be written.
    """
    rows = list(rows)
    kind = output.suffix[1:]
    write_whole(str(output), lambda path: figure.savefig(path, dpi=110, format=kind))

    def write(path: str) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)

    write_whole(str(output.with_suffix(".csv")), write)
