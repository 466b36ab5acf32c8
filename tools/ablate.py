#!/usr/bin/env python
"""Trains and scores every row and seed of a plan, and compares them.

python tools/ablate.py tools/plans/libra_parts.yaml --output output/libra_parts --jobs 2
python tools/ablate.py tools/plans/libra_parts.yaml --train voc:mine:train --test voc:mine:val \
  --seeds 1 2 3 --output output/libra_parts_mine

It goes on where it was interrupted: finished runs are kept, one that was under way goes on from its
last checkpoint.
OUTPUT gets PLAN.csv (a line a run), PLAN.md and PLAN.png, anew after each run. A run that a .csv
there has, of this plan or another, is not made again.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

import torch

from libra_d2 import data, modeling  # noqa: F401  (imported to register)
from libra_d2.checkpoint import write_whole
from libra_d2.engine.ablation import find_detections, keep_results, run_all
from libra_d2.engine.comparison import (
    Line,
    compare,
    find_other_devices,
    make_table,
    plot,
    read_results,
)
from libra_d2.engine.plan import Data, Plan, add_former, check_unmixed, list_runs, read_plan
from libra_d2.engine.run import one_sentence_errors

ONE_SEED = (
    "With one seed an interval is over the images: what these images decide. Another seed of the "
    "same row can differ by more: on the demo, seeds have a standard deviation of 2 AP."
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", help="yaml; see tools/plans")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="of the tables")
    parser.add_argument(
        "--runs", metavar="FOLDER", help="of the trainings; default: OUTPUT/runs/PLAN"
    )
    parser.add_argument("--train", metavar="DATA", help="instead of the plan's")
    parser.add_argument("--test", metavar="DATA", help="instead of the plan's")
    parser.add_argument(
        "--folds", nargs=2, metavar=("DATA", "N"), help="cross-validation, seeds 1 to N"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the plan's")
    parser.add_argument("--rows", nargs="+", help="only these; the first is compared with")
    parser.add_argument(
        "--jobs", type=int, default=max(1, torch.cuda.device_count()), help="runs at once"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    return parser


def write_tables(
    place: Path, plan: Plan, results: Sequence[dict], detections: dict | None = None
) -> list[Line]:
    """Writes what results show, as Markdown and as a picture, once there is a baseline.

    Args:
        place: of the files, without their endings.
        plan: what is compared with what.
        results: of runs, the baseline's first.
        detections: as :func:`libra_d2.engine.comparison.compare` takes them.
    """
    lines = compare(results, plan.metric, plan.baseline, detections)
    if lines and lines[0].row == plan.baseline:
        table = make_table(lines, plan.metric)
        write_whole(f"{place}.md", lambda file: Path(file).write_text(table))
        write_whole(f"{place}.png", lambda file: plot(lines, plan.metric, Path(file)))
    return lines


def take_plan(args: argparse.Namespace) -> Plan:
    """The plan as the arguments change it; all its rows, also where some alone are asked for.

    Raises:
        ValueError: naming the argument, or what of the plan, is wrong.
    """
    plan = read_plan(args.plan)
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    if bool(args.train) != bool(args.test) or (args.folds and args.train):
        raise ValueError("give --train and --test, or --folds")
    seeds = args.seeds
    if args.train:
        plan.data = Data(train=args.train, test=args.test)
    if args.folds:
        if not args.folds[1].isdigit():
            raise ValueError(f"--folds must be a data set and a number, got {args.folds[1]}")
        plan.data = Data(all=args.folds[0], folds=int(args.folds[1]))
        seeds = seeds or list(range(1, plan.data.folds + 1))
    unknown = [row for row in args.rows or () if row not in plan.rows]
    if unknown:
        raise ValueError(f"there is no row '{unknown[0]}'; there is {', '.join(plan.rows)}")
    if seeds:
        plan.seeds = seeds
        for row in plan.rows.values():
            row.seeds = None
    plan.opts = [*plan.opts, *args.opts]
    return plan


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    # So that the runs are ended too, which save what they have.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_sentence_errors(parser.prog):
        plan = take_plan(args)
        output, name = Path(args.output), Path(args.plan).stem
        folder = Path(args.runs) if args.runs else output / "runs" / name
        known = {file: read_results(file) for file in sorted(output.glob("*.csv"))}
        csv_file = output / f"{name}.csv"
        asked = {row: plan.rows[row].seeds or plan.seeds for row in args.rows or plan.rows}
        plan.rows = add_former(plan, asked, known.get(csv_file, []))
        every = list_runs(plan, folder, list(chain(*known.values())))
        check_unmixed(known.get(csv_file, []), every, csv_file)
        runs = [run for run in every if run.seed in asked.get(run.row, ())]
        results = keep_results(csv_file, runs, plan)
        with contextlib.closing(run_all(runs, args.jobs)) as finished:
            for _ in finished:
                results = keep_results(csv_file, runs, plan)
                write_tables(output / name, plan, results)
        lines = write_tables(output / name, plan, results, find_detections(runs))
    for other in find_other_devices(results, plan.baseline)[:1]:
        print(
            f"warning: {other}, which is as much of a difference as another seed", file=sys.stderr
        )
    print(make_table(lines, plan.metric))
    if any(line.num_seeds == 1 for line in lines):
        print(ONE_SEED)
    print(f"wrote {output}/{name}.csv, {name}.md and {name}.png")


if __name__ == "__main__":
    main()
