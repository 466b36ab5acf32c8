#!/usr/bin/env python
"""One page of HTML about a run, or several side by side, which needs nothing beside it.

python tools/report.py output/demo
python tools/report.py output/plain output/demo --output comparison.html

The page of a single run is DIR/report.html unless --output says otherwise.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from libra_d2.checkpoint import refuse_existing
from libra_d2.engine.run import one_sentence_errors
from libra_d2.report import write_report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="folders of runs")
    parser.add_argument("--output", type=Path, help="the page, .html")
    parser.add_argument("--data", default="", help="what the predictions are of, if data moved")
    parser.add_argument("--images", type=int, default=4, help="images of each kind (default: 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        output = args.output or (args.runs[0] / "report.html" if len(args.runs) == 1 else None)
        if output is None:
            raise ValueError("give the page of several runs a name with --output")
        if output.suffix not in (".html", ".htm"):
            raise ValueError(f"--output must end in .html, got '{output}'")
        if args.images < 0:
            raise ValueError(f"--images must not be negative, got {args.images}")
        refuse_existing(output, args.overwrite)
        write_report(args.runs, output, dataset=args.data, number=args.images)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
