"""Tables and pictures of runs that are compared: from results to what they show."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from libra_d2.config import suggest
from libra_d2.statistics import Difference, bootstrap_images, paired_difference

__all__ = [
    "Line",
    "compare",
    "find_other_devices",
    "make_table",
    "plot",
    "read_results",
    "write_csv",
]

# The first columns of a csv, and its last; between them are the metrics.
_FIRST = ("row", "seed")
_LAST = ("iterations", "seconds", "memory_mib", "device", "code", "config", "data")
_TEXTS = ("row", "device", "code", "config", "data")
_SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@100", "AR@300", "AR@1000")


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Args:
        row: its name.
        num_seeds: how many runs it has.
        means: of each metric.
        deviations: standard deviations over seeds; NaN of one.
        difference: to the baseline with the same seeds; None of the baseline itself.
    """

    row: str
    num_seeds: int
    means: dict[str, float]
    deviations: dict[str, float]
    difference: Difference | None


def write_csv(results: Sequence[dict], path: Path) -> None:
    """Writes a line a run: row, seed, every metric, cost and hashes."""
    metrics = sorted({key for r in results for key in r} - {*_FIRST, *_LAST})
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_FIRST, *metrics, *_LAST], lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


def read_results(path: Path) -> list[dict]:
    """Reads what :func:`write_csv` has written; nothing of another csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {key: _value(key, text) for key, text in record.items() if text}
            for record in csv.DictReader(file)
            if {*_FIRST, *_LAST} <= record.keys()
        ]


def _value(column: str, text: str) -> str | int | float:
    if column in _TEXTS:
        return text
    return int(text) if text.isdigit() else float(text)


def compare(
    results: Sequence[dict], metric: str, baseline: str, detections: dict | None = None
) -> list[Line]:
    """What results show, a line a row in their order.

    Args:
        results: of runs, as :func:`read_results` gives them.
        metric: what is compared, such as "bbox/AP".
        baseline: the row to compare with; without results of it there are no differences.
        detections: of (row, seed), the files of its detections and of the annotations they were
            scored on; where a row has one seed, the interval is then one over images.

    Raises:
        ValueError: if a result lacks the metric.
    """
    for result in results:
        if metric not in result:
            names = [name for name in result if "/" in name]
            scores = [name for name in names if not name.startswith("logs/")]
            logs = ", and logs/... of what training logs" if len(scores) < len(names) else ""
            raise ValueError(
                f"row '{result['row']}' has no metric '{metric}'{suggest(metric, names)}; it has "
                f"{', '.join(scores)}{logs}"
            )
    rows = dict.fromkeys(r["row"] for r in results)
    by_row = {row: {r["seed"]: r for r in results if r["row"] == row} for row in rows}
    lines = []
    for row, own in by_row.items():
        names = [name for name in _shown(metric) if all(name in r for r in own.values())]
        values = {name: np.array([r[name] for r in own.values()]) for name in names}
        deviation = {n: float(v.std(ddof=1)) if len(v) > 1 else np.nan for n, v in values.items()}
        shared = sorted(own.keys() & by_row.get(baseline, {}).keys())
        difference = None
        if row != baseline and shared:
            pairs = [[side[s][metric] for s in shared] for side in (own, by_row[baseline])]
            difference = paired_difference(*pairs)
            one, other = ((name, shared[0]) for name in (row, baseline))
            has_detections = metric in ("bbox/AP", "segm/AP") and {one, other} <= {
                *(detections or ())
            }
            if len(shared) == 1 and has_detections:
                difference = _over_images(detections, one, other, metric.partition("/")[0])
        means = {name: float(v.mean()) for name, v in values.items()}
        lines.append(Line(row, len(own), means, deviation, difference))
    return lines


def _shown(metric: str) -> list[str]:
    """The metrics of a table: the usual ones of this one's kind, and itself."""
    kind = metric.partition("/")[0]
    return list(dict.fromkeys([*(f"{kind}/{name}" for name in _SHOWN), metric]))


def _over_images(detections: dict, one: tuple, other: tuple, iou_type: str) -> Difference:
    (own, annotations), (baseline, _) = detections[one], detections[other]
    return bootstrap_images(annotations, own, baseline, iou_type=iou_type)


def find_other_devices(results: Sequence[dict], baseline: str) -> list[str]:
    """Says which runs were not computed on the device of the baseline with the same seed."""
    devices = {result["seed"]: result["device"] for result in results if result["row"] == baseline}
    return [
        f"row '{result['row']}', seed {result['seed']} was computed on '{result['device']}' and "
        f"the baseline on '{devices[result['seed']]}'"
        for result in results
        if devices.get(result["seed"], result["device"]) != result["device"]
    ]


def make_table(lines: Sequence[Line], metric: str) -> str:
    """A Markdown table; intervals that exclude 0 are bold."""
    names = [name for name in _shown(metric) if all(name in line.means for line in lines)]
    heads = [name.partition("/")[2] for name in names]
    head = ["row", "seeds", *heads, "difference to the first [95 % interval]"]
    decimals = {name: _decimals(name, lines[0].means[name]) for name in names}
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        cells = []
        for name in names:
            mean, deviation = line.means[name], line.deviations[name]
            places = decimals[name]
            spread = f" ± {deviation:.{places}f}" if np.isfinite(deviation) else ""
            cells.append(f"{mean:.{places}f}{spread}")
        text = _difference(line.difference, decimals[metric])
        table.append(f"| {' | '.join([line.row, str(line.num_seeds), *cells, text])} |")
    return "\n".join(table) + "\n"


def _decimals(metric: str, value: float) -> int:
    """One of a score in percent; of what training logs, of any size, three digits that count."""
    if not metric.startswith("logs/") or not np.isfinite(value) or value == 0:
        return 1
    return max(0, 2 - math.floor(math.log10(abs(value))))


def _difference(difference: Difference | None, decimals: int) -> str:
    if difference is None:
        return ""
    ends = (difference.mean, difference.low, difference.high)
    mean, low, high = (f"{round(x, decimals) + 0.0:+.{decimals}f}" for x in ends)  # never -0.0
    text = mean
    if np.isfinite(difference.low):
        over = " over images" if difference.over == "images" else ""
        text += f" [{low}, {high}]{over}"
    return f"**{text}**" if difference.excludes_zero else text


def plot(lines: Sequence[Line], metric: str, path: Path) -> None:
    """Means with standard deviations, and differences to the baseline with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.45 * len(lines) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(lines))
    deviations = [np.nan_to_num(line.deviations[metric]) for line in lines]
    means = [line.means[metric] for line in lines]
    left.errorbar(means, places, xerr=deviations, fmt="o", capsize=3)
    left.set_yticks(places, [f"{line.row} ({line.num_seeds})" for line in lines])
    left.invert_yaxis()
    left.set_xlabel(f"{metric}, mean and standard deviation over seeds")
    right.axvline(0, color="0.6", linewidth=1)
    for place, line in zip(places, lines, strict=True):
        d = line.difference
        if d is not None:
            color = "C2" if d.low > 0 else "C3" if d.high < 0 else "0.4"
            spread = np.nan_to_num([[d.mean - d.low], [d.high - d.mean]])
            right.errorbar(d.mean, place, xerr=spread, fmt="o", capsize=3, color=color)
    for axes in (left, right):
        axes.ticklabel_format(axis="x", useOffset=False)
    right.set_xlabel(f"difference to {lines[0].row}, 95 % interval")
    figure.savefig(path, dpi=110, format="png")
