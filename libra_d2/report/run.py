"""What a run has left in its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from libra_d2 import data  # noqa: F401  (imported to register)
from libra_d2.config import add_libra_config, list_keys
from libra_d2.engine.config_file import ObjectsAside
from libra_d2.engine.own_data import register_data
from libra_d2.metrics import read_metrics, split_score

from .scored import Image

__all__ = ["Run", "read_run"]

_ENVIRONMENT = "Environment info:"


@dataclass
class Run:
    """A run, as its folder tells of it."""

    name: str
    folder: Path
    config: dict[str, Any]
    records: list[dict]
    environment: str
    dataset: str  # of the images
    class_names: list[str]
    images: list[Image]
    problem: str  # why there are no images; "" if there are

    @property
    def results(self) -> dict[str, float]:
        """The last value of each metric of an evaluation."""
        return {
            name: value
            for record in self.records
            for name, value in record.items()
            if split_score(name)
        }


def read_run(folder: Path, name: str, dataset: str = "") -> Run:
    """Reads a run's folder.

    Args:
        folder: OUTPUT_DIR.
        name: what to call it.
        dataset: what its predictions are of; "" for the last of its test data, whose evaluation
            replaces those of the others.

    Raises:
        ValueError: if it is not one.
    """
    try:
        config = yaml.load((folder / "config.yaml").read_text(), ObjectsAside)
        config = {k: v for k, v in list_keys(config) if not isinstance(v, dict)}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"'{folder}' is no run's folder: it has no config.yaml") from error
    records = read_metrics(folder / "metrics.json")
    problem, seen, names, images = "", "", [], []
    try:
        seen, names, images = _read_images(folder, config, dataset)
    except (ValueError, OSError, KeyError, TypeError, AssertionError) as error:
        problem = f"There are no predictions to look at: {error}"
    environment = _environment(folder)
    return Run(name, folder, config, records, environment, seen, names, images, problem)


def _environment(folder: Path) -> str:
    """What detectron2 has logged of the machine, the last time."""
    try:
        lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    starts = [i for i, line in enumerate(lines) if line.endswith(_ENVIRONMENT)]
    if not starts:
        return ""
    own = lines[starts[-1] + 1 :]
    end = next((i for i, line in enumerate(own) if line.startswith("[")), len(own))
    return "\n".join(own[:end])


def _read_images(folder: Path, config: dict, dataset: str) -> tuple[str, list[str], list[Image]]:
    """The data set, its classes, and each image with its ground truths and predictions."""
    file = folder / "inference" / "coco_instances_results.json"
    if not file.is_file():
        raise ValueError(f"'{file}' is missing; a COCO evaluation writes it")
    tests = config.get("DATASETS.TEST", config.get("dataloader.test.dataset.names")) or ()
    tests = [tests] if isinstance(tests, str) else list(tests)
    if not dataset and not tests:
        raise ValueError("the config names no test data")
    cfg = get_cfg()
    add_libra_config(cfg)
    name = dataset or tests[-1]
    cfg.DATASETS.TEST = (name,)
    classes = config.get("DATASETS.CLASS_NAMES", config.get("dataloader.class_names")) or []
    cfg.DATASETS.CLASS_NAMES = list(classes)
    bad = config.get("DATASETS.ON_BAD_BOXES", config.get("dataloader.on_bad_boxes"))
    cfg.DATASETS.ON_BAD_BOXES = bad or cfg.DATASETS.ON_BAD_BOXES
    register_data(cfg, eval_only=True)
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    found = {}
    for prediction in json.loads(file.read_text()):
        found.setdefault(prediction["image_id"], []).append(prediction)
    if not set(found) <= {record["image_id"] for record in records}:
        raise ValueError(f"those of '{file}' are not of '{name}'")
    images = [_image(record, found.get(record["image_id"], []), ids) for record in records]
    return name, list(metadata.get("thing_classes") or classes), images


def _image(record: dict, predictions: list[dict], ids: dict[int, int] | None) -> Image:
    truths = record.get("annotations", [])
    boxes = [BoxMode.convert(t["bbox"], t["bbox_mode"], BoxMode.XYXY_ABS) for t in truths]
    return Image(
        file=record["file_name"],
        truth_boxes=np.array(boxes, float).reshape(-1, 4),
        truth_classes=np.array([t["category_id"] for t in truths], int),
        crowds=np.array([t.get("iscrowd", 0) for t in truths], bool),
        boxes=_corners([p["bbox"] for p in predictions]),
        classes=np.array(
            [ids[p["category_id"]] if ids else p["category_id"] for p in predictions], int
        ),
        scores=np.array([p["score"] for p in predictions], float),
    )


def _corners(boxes: list) -> np.ndarray:
    boxes = np.array(boxes, float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
