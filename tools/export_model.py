#!/usr/bin/env python
"""Exports a trained detector to a file that runs without this project.

python tools/export_model.py output/RUN model.onnx --format onnx

Beside model.onnx it writes model.onnx.json (classes, input, outputs) and model.onnx.py, which runs
it on images. The file is kept only if it finds what the detector finds, at three sizes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from libra_d2 import Detector
from libra_d2.checkpoint import refuse_existing
from libra_d2.deploy import FORMATS, bundle_files, export_detector
from libra_d2.engine.run import one_sentence_errors


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run's folder, weights with their config, or a config")
    parser.add_argument("output", help="file to write: .onnx, .pt2 for torch-export, .pt else")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--half", action="store_true", help="compute in half precision")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="lowest score (default: 0.05)"
    )
    parser.add_argument("--device", help="where it is exported: cpu, cuda (default: a GPU if any)")
    parser.add_argument(
        "--images", nargs="+", default=(), help="to compare on (default: of the test data)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--opts", nargs="+", default=(), help="overrides of the config")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        for file in bundle_files(args.output):
            refuse_existing(file, args.overwrite)
        detector = Detector(
            args.model, threshold=args.threshold, device=args.device, opts=args.opts
        )
        record = export_detector(
            detector,
            args.output,
            format=args.format,
            batch=args.batch,
            half=args.half,
            images=args.images,
        )
    sizes = [f"{e['objects']} objects at {e['width']}x{e['height']}" for e in record["agreed_at"]]
    print(f"wrote {', '.join(map(str, bundle_files(args.output)))}")
    print(f"it agrees with the detector on {', '.join(sizes)}")


if __name__ == "__main__":
    main()
