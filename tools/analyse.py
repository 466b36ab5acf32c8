#!/usr/bin/env python
"""Plots a training run: losses, AP and what the samplers chose, over iterations.

python tools/analyse.py output/demo/metrics.json training.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from libra_d2.metrics import read_metrics


def plot(axes: Axes, records: list[dict], names: dict[str, str], title: str) -> None:
    """Plots the named metrics that the run has, each with its label."""
    for name, label in names.items():
        points = [(r["iteration"], r[name]) for r in records if name in r]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else ""
            )
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def draw(records: list[dict], output: Path) -> None:
    metrics = sorted({name for record in records for name in record})
    figure, (losses, scores, sampled) = plt.subplots(1, 3, figsize=(15, 4.2))
    plot(losses, records, {n: n for n in metrics if n.endswith("loss") or "loss_" in n}, "losses")
    losses.set_yscale("log")
    plot(scores, records, {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}, "validation")
    bins = [name for name in metrics if name.startswith("roi_head/negative_iou_bin")]
    labels = {name: f"IoU bin {name.rsplit('bin')[-1]}" for name in bins}
    plot(sampled, records, labels, "share of the sampled negatives")
    figure.tight_layout()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110)
    except OSError as error:
        raise ValueError(f"'{output}' cannot be written: {error.strerror}") from error
    finally:
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path, help="metrics.json of a run")
    parser.add_argument("output", type=Path, help="the plot, .png, .pdf or .svg")
    args = parser.parse_args(argv)
    try:
        if args.output.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"output must end in .png, .pdf or .svg, got '{args.output}'")
        records = read_metrics(args.metrics)
        if not records:
            raise ValueError(f"'{args.metrics}' holds no metrics yet")
        draw(records, args.output)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
