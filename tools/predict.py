#!/usr/bin/env python
"""Finds objects in images, folders, videos, a camera or a data set, and writes them down.

python tools/predict.py output/mine photos/ --save-images found/ --json found.json
python tools/predict.py output/mine "photos/*.jpg" --csv found.csv --classes WBC RBC
python tools/predict.py output/mine clip.mp4 --video clip_found.mp4
python tools/predict.py output/mine voc:mine:val --sheet sheet.jpg
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from libra_d2.engine.run import one_sentence_errors
from libra_d2.inference.detector import Detector
from libra_d2.inference.inputs import open_images
from libra_d2.inference.outputs import check_outputs, open_sinks
from libra_d2.inference.predict import predict


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run's folder, a file of weights, or a config")
    parser.add_argument(
        "source",
        nargs="+",
        help="images, folders, globs; or one video, camera (its number) or data set, registered or "
        "as coco:ANNOTATIONS[:IMAGES], voc:ROOT:SPLIT, yolo:DATA.yaml:SPLIT",
    )
    write = parser.add_argument_group("what to write (nothing: a line an image on the screen)")
    write.add_argument("--json", metavar="FILE", help="COCO results")
    write.add_argument("--json-images", metavar="FILE", help="a list an image, with class names")
    write.add_argument("--csv", metavar="FILE", help="a line an object")
    write.add_argument("--txt", metavar="FOLDER", help="YOLO labels with scores, a file an image")
    write.add_argument("--save-images", metavar="FOLDER", help="images with what was found")
    write.add_argument("--crop", metavar="FOLDER", help="each object cut out, a folder a class")
    write.add_argument(
        "--sheet",
        metavar="FILE",
        help="one .jpg or .png of 8 images, or --num-images",
    )
    write.add_argument("--video", metavar="FILE", help="a video with what was found, .mp4")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score: %(default)s")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--batch-size", type=int, default=1, help="images of one size at once")
    parser.add_argument(
        "--half", action="store_true", help="bfloat16 on a CPU, float16 on a GPU: faster on some"
    )
    parser.add_argument("--device", help="cuda, cpu, ...; default: a GPU where there is one")
    parser.add_argument("--num-images", type=int, metavar="N", help="stop after N")
    parser.add_argument("--columns", type=int, default=2, help="of the sheet")
    parser.add_argument("--overwrite", action="store_true", help="write over what exists")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        for name in ("num_images", "columns"):
            value, option = getattr(args, name), name.replace("_", "-")
            if value is not None and value < 1:
                raise ValueError(f"--{option} must be at least 1, got {value}")
        images = open_images(args.source, args.num_images)
        check_outputs(vars(args), images, args.model)
        detector = Detector(
            args.model,
            threshold=args.threshold,
            classes=args.classes,
            device=args.device,
            batch_size=args.batch_size,
            half=args.half,
            opts=args.opts,
        )
        num_skipped = predict(detector, images, lambda: open_sinks(vars(args), images))
    sys.exit(1 if num_skipped else 0)


if __name__ == "__main__":
    main()
