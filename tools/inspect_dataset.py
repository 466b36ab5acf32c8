#!/usr/bin/env python
"""Looks data sets over before they are trained on, and writes report.html with pictures.

python tools/inspect_dataset.py voc:mine:train voc:mine:val
python tools/inspect_dataset.py coco:mine/train.json:mine/images --mend mine/train_clean.json

Exit status 1 says that training on one of them would fail.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

import msgspec
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from libra_d2.checkpoint import write_whole
from libra_d2.config import suggest
from libra_d2.data.anchors import anchor_recall
from libra_d2.data.inspection import Inspection, find_shared_images, inspect, mend
from libra_d2.data.report import MARK, make_report
from libra_d2.data.sources import FORMS, open_data
from libra_d2.engine import load_config
from libra_d2.engine.run import one_sentence_errors

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", nargs="+", help=f"a registered name, {', '.join(FORMS.values())}; training first"
    )
    parser.add_argument(
        "--config-file",
        default=str(CONFIGS / "Base-Libra-RCNN-FPN.yaml"),
        help="of the detector whose anchors are looked at (%(default)s)",
    )
    parser.add_argument("--report", default="report.html", metavar="FILE", help="'' for none")
    parser.add_argument("--mend", metavar="OUT.json", help="write a clean copy, in COCO's format")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.json")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    return parser


def find_anchors(cfg: CfgNode) -> dict:
    """Arguments of ``anchor_recall`` that a config settles."""
    model = build_model(cfg)
    place = model if hasattr(model, "anchor_generator") else model.proposal_generator
    generator = place.anchor_generator
    return {
        "cell_anchors": list(generator.cell_anchors),
        "strides": generator.strides,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
    }


def tell(inspections: list[Inspection], recalls: list[list[str]], shared: list[str]) -> list[str]:
    """Prints what was found; returns classes that the first data set lacks."""
    for found, recall in zip(inspections, recalls, strict=True):
        print(found.source.name)
        for line in (*found.lines(), *recall):
            print(f"  {line}")
        for problem in found.problems:
            print(f"  {'PROBLEM' if problem.is_fatal else 'note'}: {problem.what}")
        for hint in found.hints:
            print(f"  note: {hint}")
    for sentence in shared:
        print(f"PROBLEM: {sentence}")
    first = inspections[0].source
    unknown = [c for s in inspections[1:] for c in s.source.classes if c not in first.classes]
    for name in unknown:
        what = f"class '{name}' is not in {first.name}{suggest(name, first.classes)}"
        print(f"PROBLEM: {what}")
    return unknown


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        if args.mend and len(args.data) > 1:
            raise ValueError("--mend needs a single data set")
        if args.mend and Path(args.mend).exists() and not args.overwrite:
            raise ValueError(f"--mend '{args.mend}' exists; give --overwrite to replace it")
        for file in filter(None, (args.mend, args.report)):
            if not Path(file).resolve().parent.is_dir() or Path(file).is_dir():
                raise ValueError(f"'{file}' must be a file in a folder that exists")
        report = Path(args.report) if args.report else None
        if report and args.mend and report.resolve() == Path(args.mend).resolve():
            raise ValueError(f"--report and --mend are both '{report}'")
        if report and report.exists() and not report.read_bytes().startswith(MARK.encode()):
            raise ValueError(f"--report '{report}' exists and is no such report; give another name")
        opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *args.opts]
        anchors = find_anchors(load_config(args.config_file, opts))
        sources = [open_data(name) for name in args.data]
        if args.mend and Path(args.mend).resolve() in map(Path.resolve, sources[0].files):
            raise ValueError(f"--mend '{args.mend}' is read itself; give the copy another name")
        inspections = [inspect(source) for source in sources]
        recalls = [anchor_recall(source.coco, **anchors).lines() for source in sources]
        shared = find_shared_images(inspections)
        unknown = tell(inspections, recalls, shared)
        if args.report:
            text = make_report(inspections, shared, recalls)
            write_whole(args.report, lambda file: Path(file).write_text(text, encoding="utf-8"))
            print(f"wrote {args.report}")
        if args.mend:
            content = msgspec.json.encode(mend(inspections[0]))
            write_whole(args.mend, lambda file: Path(file).write_bytes(content))
            print(f"wrote {args.mend}: train on coco:{args.mend}:{sources[0].image_root}")
    would_fail = any(found.would_fail for found in inspections) or bool(unknown)
    if would_fail:
        print("training would fail" + (" on the data as they were" if args.mend else ""))
    sys.exit(1 if would_fail else 0)


if __name__ == "__main__":
    main()
