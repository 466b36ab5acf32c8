"""Runs over their iterations, side by side."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from libra_d2.metrics import is_loss, read_metrics, split_score

from .pictures import new_figure, plain_text, save

__all__ = ["analyse_runs"]

_SCORES = ("AP", "AP50", "AP75")


def analyse_runs(paths: Sequence[Path], output: Path) -> list[str]:
    """Draws losses, scores and what the samplers chose; several runs in one picture.

    Args:
        paths: folders of runs, or their ``metrics.json``.
        output: the picture.
    """
    runs = {}
    for path in paths:
        file = path / "metrics.json" if path.is_dir() else path
        records = read_metrics(file)
        if not records:
            raise ValueError(f"'{file}' holds no metrics yet")
        folder = file.resolve().parent
        name = folder.name if len(paths) == 1 else f"{folder.parent.name}/{folder.name}"
        runs[name if name not in runs else str(folder)] = records
    names = sorted({name for records in runs.values() for r in records for name in r})
    losses = [n for n in names if is_loss(n)]
    if len(runs) > 1:
        losses = [n for n in losses if n.rpartition("/")[2] == "total_loss"]
    bins = [n for n in names if n.startswith("roi_head/negative_iou_bin")]
    figure, (axes,) = new_figure(3, width=5, height=4.2)
    _plot(axes[0], runs, losses, "losses", "loss")
    if axes[0].lines:
        axes[0].set_yscale("log")
    scores = [n for n in names if (split := split_score(n)) and split[2] in _SCORES]
    shown = scores if len(runs) == 1 else [n for n in scores if n.endswith("/AP")]
    _plot(axes[1], runs, shown, "evaluation", "AP (%)")
    _plot(axes[2], runs, bins, "sampled negatives, by bin of IoU", "share")
    rows = [
        {"run": run, "iteration": r["iteration"], "metric": name, "value": r[name]}
        for run, records in runs.items()
        for r in records
        for name in (*losses, *scores, *bins)
        if name in r
    ]
    save(figure, output, rows)
    return []


def _plot(axes, runs: dict[str, list[dict]], names: Sequence[str], title: str, unit: str) -> None:
    styles = itertools.cycle(("-", "--", ":", "-."))
    for style, (run, records) in zip(styles, runs.items(), strict=False):
        for color, name in enumerate(names):
            points = [(r["iteration"], r[name]) for r in records if name in r]
            if points:
                label = name.replace("roi_head/negative_iou_", "").replace("bbox/", "")
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=f"C{color % 10}" if len(names) > 1 else None,
                    label=plain_text(f"{run}: {label}" if len(runs) > 1 else label),
                    marker="o" if len(points) < 20 else "",
                    markersize=4,
                )
    axes.set(title=title, xlabel="iteration", ylabel=unit)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
