"""Checks of data sets before a run: what would make it fail later is one clear sentence now."""

import json
import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from libra_d2.config import suggest

from .digits import SPLITS

__all__ = ["check_dataset"]

# Larger annotation files are not read twice.
MAX_BYTES = 64 * 2**20


def check_dataset(
    name: str, *, for_training: bool, num_classes: int, num_classes_key: str, fields: tuple = ()
) -> None:
    """Checks that a data set is registered, there, and fits the model; draws an embedded one.

    Args:
        name: the data set.
        for_training: whether it is trained on, and so has to have annotations.
        num_classes: of the model.
        num_classes_key: the config key of this number.
        fields: further fields that annotations for training must have, such as "segmentation".

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"data set '{name}' is not registered{suggest(str(name), DatasetCatalog.list())}; "
            "register your own with detectron2.data.datasets.register_coco_instances"
        )
    metadata = MetadataCatalog.get(name)
    if name in SPLITS:
        try:
            DatasetCatalog.get(name)  # draws it
        except OSError as error:
            raise ValueError(f"data set '{name}' cannot be drawn: {error}") from error
    for kind in ("json_file", "image_root", "dirname"):
        path = metadata.get(kind)
        if path and not PathManager.exists(path):
            raise ValueError(
                f"data set '{name}': {path} does not exist; DETECTRON2_DATASETS names the folder "
                f"of the data sets (now '{os.getenv('DETECTRON2_DATASETS', 'datasets')}')"
            )
    classes = metadata.get("thing_classes")
    if metadata.get("json_file"):
        path = PathManager.get_local_path(metadata.json_file)
        if not os.path.isfile(path):
            raise ValueError(f"data set '{name}': {path} is not a file")
        if os.path.getsize(path) <= MAX_BYTES:
            try:
                is_lvis = metadata.get("evaluator_type") == "lvis"
                classes = _check_coco(read_json(path), for_training, fields, is_lvis)
            except ValueError as error:
                raise ValueError(f"data set '{name}': {path} {error}") from None
    if classes and num_classes < len(classes):
        raise ValueError(
            f"{num_classes_key} is {num_classes} but data set '{name}' has {len(classes)} "
            "categories; it must be at least that"
        )


def read_json(path: str):
    """The content of a json file; ``ValueError`` if it is none."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise ValueError("is not valid json") from None


def _check_coco(content, for_training: bool, fields: tuple, is_lvis: bool = False) -> list:
    """Checks the content of an annotation file; returns its categories."""
    lists = ("images", "categories", *(("annotations",) if for_training else ()))
    if not isinstance(content, dict) or not all(isinstance(content.get(x), list) for x in lists):
        raise ValueError(f"is not COCO json, an object with the lists {', '.join(lists)}")
    annotations = content.get("annotations") or []
    # pycocotools wants area and iscrowd of what it evaluates on.
    needed = ("id", "image_id", "category_id", "bbox", *(fields if for_training else ()))
    needed += () if for_training else ("area",) if is_lvis else ("area", "iscrowd")
    # LVIS names its images by their address in COCO.
    file_name = "coco_url" if is_lvis else "file_name"
    image_ids = _ids(content["images"], "images", ("id", file_name, "height", "width"))
    category_ids = _ids(content["categories"], "categories", ("id", "name"))
    _ids(annotations, "annotations", needed)
    if not image_ids or not category_ids or (for_training and not annotations):
        raise ValueError("has no images, no categories or no annotations")
    for annotation in annotations:
        for key, known in (("image_id", image_ids), ("category_id", category_ids)):
            if annotation[key] not in known:
                raise ValueError(
                    f"has annotation {annotation['id']} with the unknown {key} {annotation[key]}"
                )
        for field in fields if for_training else ():
            if not annotation[field]:
                raise ValueError(f"has annotation {annotation['id']} whose {field} is empty")
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(x) for x in box)):
            raise ValueError(
                f"has annotation {annotation['id']} whose bbox is not four numbers x, y, w, h"
            )
    return content["categories"]


def _ids(records: list, kind: str, needed: tuple) -> set:
    """The ids of records, once all are seen to have what they need."""
    for i, record in enumerate(records):
        missing = [key for key in needed if not isinstance(record, dict) or key not in record]
        if missing:
            raise ValueError(f"lacks '{missing[0]}' in number {i} of its {kind}")
    ids = {record["id"] for record in records}
    if len(ids) < len(records):
        raise ValueError(f"has two {kind} of the same id")
    return ids


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")
