#!/usr/bin/env python
"""Pictures of what balance does, each with its numbers as a csv of the same name.

python tools/analyse.py run output/demo output/plain training.png
python tools/analyse.py losses losses.svg
python tools/analyse.py sampling output/demo sampling.png --images 50
python tools/analyse.py features output/demo features.png --image 3
python tools/analyse.py matching output/retinanet matching.png --weights model_0000999.pth
python tools/analyse.py ranks output/demo ranks.png

A model is a run's folder, weights with their config, or a config that names weights; images are
those of its test data, or of --val.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from libra_d2.analysis.features import analyse_features
from libra_d2.analysis.losses import analyse_losses
from libra_d2.analysis.matching import analyse_matching
from libra_d2.analysis.pictures import check_output
from libra_d2.analysis.ranks import analyse_ranks
from libra_d2.analysis.runs import analyse_runs
from libra_d2.analysis.sampling import analyse_sampling
from libra_d2.engine.run import one_sentence_errors
from libra_d2.inference.detector import Detector


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    topics = parser.add_subparsers(dest="topic", required=True)

    def add(name: str, what: str, of: str = "") -> argparse.ArgumentParser:
        topic = topics.add_parser(name, help=what, description=what)
        if of == "model":
            topic.add_argument("model", help="a run's folder, weights or a config")
            topic.add_argument("--val", metavar="DATA", help="images: a data set")
            topic.add_argument("--device", help="cpu, cuda (default: a GPU if any)")
            topic.add_argument("--opts", nargs="+", default=(), help="overrides of the config")
        elif of == "runs":
            topic.add_argument("runs", nargs="+", type=Path, help="folders, or metrics.json")
        topic.add_argument("output", help=".png, .svg or .pdf")
        topic.add_argument("--overwrite", action="store_true", help="replace existing files")
        return topic

    add("run", "losses, AP and sampled negatives of runs over iterations", "runs")
    add("losses", "loss and gradient of balanced L1, smooth L1, focal loss")
    sampling = add("sampling", "IoU of the negatives that each sampler chooses", "model")
    sampling.add_argument("--images", type=int, default=50, help="how many (default: 50)")
    one = {"type": int, "default": 0, "help": "which image, from 0 (default: 0)"}
    for name, what in (
        ("features", "each level of the pyramid before and after BFP"),
        ("ranks", "PISA's prime samples on an image"),
        ("matching", "the anchors that IoU and Mutual Guidance give to an object"),
    ):
        topic = add(name, what, "model")
        topic.add_argument("--image", **one)
    topic.add_argument("--object", type=int, help="which of the image's (default: the largest)")
    topic.add_argument(
        "--weights", nargs="+", default=(), help="files, checkpoints of one run: a row for each"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        output = check_output(args.output, args.overwrite)
        for name in ("images", "image"):
            least = 1 if name == "images" else 0
            if getattr(args, name, least) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
        for sentence in _analyse(args, output):
            print(sentence)
    print(f"wrote {output} and {output.with_suffix('.csv')}")


def _analyse(args: argparse.Namespace, output: Path) -> list[str]:
    if args.topic == "run":
        return analyse_runs(args.runs, output)
    if args.topic == "losses":
        return analyse_losses(output)
    # In front, as pairs have to be of a LazyConfig.
    opts = [*(("DATASETS.TEST", str((args.val,))) if args.val else ()), *args.opts]
    if args.topic == "matching":
        own = [Path(args.model, name) for name in args.weights]
        paths = [p if p.exists() else Path(n) for p, n in zip(own, args.weights, strict=True)]
        paths = paths or [Path(args.model)]
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            names = [str(path) for path in paths]
        detectors = {
            name: Detector(path, device=args.device, opts=opts)
            for name, path in zip(names, paths, strict=True)
        }
        return analyse_matching(detectors, output, args.image, args.object)
    detector = Detector(args.model, device=args.device, opts=opts)
    if args.topic == "sampling":
        return analyse_sampling(detector, output, args.images)
    topic = analyse_features if args.topic == "features" else analyse_ranks
    return topic(detector, output, args.image)


if __name__ == "__main__":
    main()
