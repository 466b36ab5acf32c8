#!/usr/bin/env python
"""Draws what a model finds: a sheet of images, each with its ground truth beside it if it has one.

python tools/predict.py --config-file CONFIG --output sheet.jpg --dataset digits_val
python tools/predict.py --config-file CONFIG --output sheet.jpg --images a.jpg b.jpg
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from libra_d2.engine import check_run, load_config
from libra_d2.engine.run import one_sentence_errors
from libra_d2.engine.weights import WeightsCheckpointer

GAP = 6  # pixels between the tiles of the sheet


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FILE", help="the sheet, .jpg or .png")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", metavar="NAME", help="a registered data set")
    what.add_argument("--images", nargs="+", metavar="FILE")
    parser.add_argument("--num-images", type=int, default=8, help="of the data set")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="in [0, 1]")
    parser.add_argument("--columns", type=int, default=2, help="images side by side")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    return parser


def read_records(args: argparse.Namespace) -> list[dict]:
    """detectron2's dataset dicts of the images to draw; of plain images, their file name alone."""
    if args.images:
        for name in args.images:
            if not cv2.haveImageReader(name):
                raise ValueError(f"'{name}' does not exist or is not an image")
        return [{"file_name": name} for name in args.images]
    return DatasetCatalog.get(args.dataset)[: args.num_images]


def write(sheet: np.ndarray, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output '{output}': {error.strerror}") from error
    if output.is_dir() or not cv2.imwrite(str(output), sheet):
        raise ValueError(f"--output '{output}' cannot be written")


def draw(record: dict, predictor: DefaultPredictor) -> list[np.ndarray]:
    """The tiles (H, W, 3) BGR of an image: the ground truth, if it has one, and the predictions."""
    image = cv2.imread(record["file_name"])
    # Labels are drawn at a readable size whatever the image's.
    scale = 640 / max(image.shape[:2])
    make_visualizer = lambda: Visualizer(image[:, :, ::-1], predictor.metadata, scale)  # noqa: E731
    tiles = []
    if "annotations" in record:
        tiles.append(make_visualizer().draw_dataset_dict(record))
    instances = predictor(image)["instances"].to("cpu")
    tiles.append(make_visualizer().draw_instance_predictions(instances))
    return [tile.get_image()[:, :, ::-1] for tile in tiles]


def make_sheet(images: list[list[np.ndarray]], columns: int) -> np.ndarray:
    """Puts the tiles of all images on one sheet, with those of an image side by side."""
    height, width = (max(t.shape[i] for tiles in images for t in tiles) for i in (0, 1))
    per_image = max(len(tiles) for tiles in images)
    rows = -(-len(images) // columns)
    sheet = np.full(
        (rows * (height + GAP) + GAP, columns * per_image * (width + GAP) + GAP, 3), 255, np.uint8
    )
    for i, tiles in enumerate(images):
        for j, tile in enumerate(tiles):
            y = GAP + i // columns * (height + GAP)
            x = GAP + (i % columns * per_image + j) * (width + GAP)
            sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return sheet


def prepare(args: argparse.Namespace) -> CfgNode:
    """The config for prediction: test scores above the threshold, data set as asked for."""
    for name, value in (("--num-images", args.num_images), ("--columns", args.columns)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= args.score_threshold <= 1:
        raise ValueError(f"--score-threshold must be in [0, 1], got {args.score_threshold}")
    if Path(args.output).resolve() in [Path(name).resolve() for name in args.images or ()]:
        raise ValueError(f"--output '{args.output}' is one of the images; it would be lost")
    if Path(args.output).suffix not in (".jpg", ".png"):
        raise ValueError(f"--output must end in .jpg or .png, got '{args.output}'")
    threshold = []
    for head in ("ROI_HEADS", "RETINANET"):
        threshold += [f"MODEL.{head}.SCORE_THRESH_TEST", str(args.score_threshold)]
    cfg = load_config(args.config_file, [*threshold, *args.opts]).clone()
    cfg.defrost()
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "a model on precomputed proposals (MODEL.LOAD_PROPOSALS) can be evaluated with "
            "train_net.py --eval-only, not used here"
        )
    # Plain images need no data set; if it is there, its class names are drawn.
    metadata_of = cfg.DATASETS.TEST
    cfg.DATASETS.TEST = (args.dataset,) if args.dataset else ()
    check_run(cfg, eval_only=True)
    cfg.DATASETS.TEST = cfg.DATASETS.TEST or metadata_of
    return cfg


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        cfg = prepare(args)
        records = read_records(args)
    weights, cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS, ""
    predictor = DefaultPredictor(cfg)
    WeightsCheckpointer(predictor.model).load(weights)
    images = [draw(record, predictor) for record in tqdm(records, unit="image")]
    with one_sentence_errors(parser.prog):
        write(make_sheet(images, min(args.columns, len(images))), Path(args.output))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
