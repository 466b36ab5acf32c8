"""Checks of precomputed proposals (``MODEL.LOAD_PROPOSALS``) before a run."""

import os
import pickle
from urllib.parse import urlparse

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .checks import MAX_BYTES, read_json

__all__ = ["check_proposals"]

# The names that Detectron, before detectron2, gave them; detectron2 reads both.
_OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}
# What a pickle of lists and arrays is made of. Anything else could run code.
_HARMLESS = {
    ("_codecs", "encode"),
    ("detectron2.structures.boxes", "BoxMode"),
    *(
        (f"numpy.{core}multiarray", name)
        for core in ("core.", "_core.")
        for name in ("_reconstruct", "scalar")
    ),
    *((f"numpy.{core}numeric", "_frombuffer") for core in ("core.", "_core.")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _HARMLESS:
            raise ValueError(f"holds {module}.{name}, not only lists and numpy arrays")
        return super().find_class(module, name)


def check_proposals(dataset: str, file: str, key: str) -> None:
    """Checks that a file of proposals is there and has those of every image of a data set.

    Addresses are left to detectron2. A file is unpickled whatever its size: detectron2 will do so
    without looking at what it would run.

    Args:
        dataset: a registered data set.
        file: a pickle of a dict with "ids", "boxes" and "objectness_logits".
        key: the config key that names the file.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    if not isinstance(file, str):
        raise ValueError(f"{key} must name files, got {file}")
    if urlparse(file).scheme:
        return
    if not PathManager.isfile(file):
        raise ValueError(f"{key} '{file}' does not exist or is not a file")
    try:
        ids = _read_ids(file)
    except ValueError as error:
        raise ValueError(f"{key} '{file}' {error}") from None
    annotations = MetadataCatalog.get(dataset).get("json_file")
    if annotations and os.path.getsize(annotations) <= MAX_BYTES:
        images = {str(image["id"]) for image in read_json(annotations)["images"]}
        if images - ids:
            raise ValueError(
                f"{key} '{file}' has no proposals for {len(images - ids)} of the {len(images)} "
                f"images of data set '{dataset}', among them {min(images - ids)}"
            )


def _read_ids(file: str) -> set[str]:
    """The ids of the images that a file has proposals for."""
    try:
        with open(file, "rb") as stream:
            content = _Unpickler(stream, encoding="latin1").load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError("is not a pickle") from error
    if not isinstance(content, dict):
        raise ValueError("is not a dict of ids, boxes and objectness_logits")
    content = {_OLD_NAMES.get(name, name): value for name, value in content.items()}
    for name in ("ids", "boxes", "objectness_logits"):
        if name not in content:
            raise ValueError(f"lacks '{name}'")
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"has bbox_mode {mode}; it must be XYXY_ABS or XYWH_ABS")
    ids, boxes, logits = (content[name] for name in ("ids", "boxes", "objectness_logits"))
    if not all(isinstance(part, (list, np.ndarray)) for part in (ids, boxes, logits)):
        raise ValueError("must have lists of ids, boxes and objectness_logits")
    if not len(ids) == len(boxes) == len(logits):
        raise ValueError(
            f"has {len(ids)} ids, {len(boxes)} boxes and {len(logits)} objectness_logits; they "
            "must be as many"
        )
    for image, own_boxes, own_logits in zip(ids, boxes, logits, strict=True):
        _check_image(image, own_boxes, own_logits)
    return {str(image) for image in ids}


def _check_image(image, boxes, logits) -> None:
    """Checks that one image's boxes are (N, 4) and its logits (N,), finite numbers in arrays."""
    for name, value in (("boxes", boxes), ("objectness_logits", logits)):
        if not (isinstance(value, np.ndarray) and value.dtype.kind in "fiu"):
            raise ValueError(f"has {name} that are no array of numbers for image {image}")
        if not np.isfinite(value).all():
            raise ValueError(f"has {name} that are not finite for image {image}")
    if logits.ndim != 1 or boxes.shape != (len(logits), 4):
        raise ValueError(
            f"has boxes of shape {boxes.shape} and objectness_logits of shape {logits.shape} for "
            f"image {image}; they must be (N, 4) and (N,)"
        )
