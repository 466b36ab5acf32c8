"""Tiny data sets in three formats and a run trained on one, for tests of a user's own data."""

import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from formats import make_coco, make_voc, make_yolo
from toys import CONFIGS, TOY

from libra_d2.data.sources import is_source
from libra_d2.engine import main

SPLITS = {"train": [1, 2, 3, 4, 5, 6], "val": [7, 8]}
FINETUNE = sorted(path.name for path in (CONFIGS / "Finetune").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with masks, in all three formats."""
    folder = tmp_path_factory.mktemp("own")
    content = make_coco(folder / "coco")
    make_voc(folder / "voc", content, folder / "coco" / "images", SPLITS)
    make_yolo(folder / "yolo", content, folder / "coco" / "images", SPLITS)
    return folder


@pytest.fixture(autouse=True)
def fresh_loggers():
    """Each run in this process gets handlers of its own, as if it were in one of its own."""
    yield
    for name in ("detectron2", "fvcore", "libra_d2"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
    setup_logger.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in filter(is_source, catalog.list()):
            catalog.remove(name)


def sources(data, form):
    if form == "coco":
        return (f"coco:{data}/coco/annotations.json",) * 2
    place = data / "voc" if form == "voc" else data / "yolo" / "data.yaml"
    return f"{form}:{place}:train", f"{form}:{place}:val"


def command(train, val, output, *opts, config="libra_faster_rcnn_small_cpu.yaml", flags=()):
    """A toy run of a config of configs/Finetune; the number of classes is left to the data."""
    toy = list(TOY)
    iterations = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "TEST.EVAL_PERIOD")
    for key in ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES", *iterations):
        at = toy.index(key)
        del toy[at : at + 2]
    epochs = [("SOLVER.MAX_EPOCHS", 1), ("SOLVER.STEP_EPOCHS", ()), ("SOLVER.WARMUP_EPOCHS", 0)]
    # Untrained models find something too, that there be something to score.
    epochs += [(f"MODEL.{head}.SCORE_THRESH_TEST", 0.0) for head in ("ROI_HEADS", "RETINANET")]
    toy += [part for pair in epochs for part in pair]
    return [
        *("--config-file", str(CONFIGS / "Finetune" / config), *flags),
        *("--train", train, "--val", val, "--output", str(output), *map(str, [*toy, *opts])),
    ]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run on VOC's format that has seen each image twice."""
    output = tmp_path_factory.mktemp("run") / "mine"
    names = sources(data, "voc")
    main(command(*names, output, "SOLVER.MAX_EPOCHS", 2, "SOLVER.BASE_LR", 0.001))
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in filter(is_source, catalog.list()):
            catalog.remove(name)
    return output
