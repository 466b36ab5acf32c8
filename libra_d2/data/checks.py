"""Checks of data sets before a run: what would make it fail later is one clear sentence now."""

import logging
import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .coco_json import BOM, Coco, is_crowd, is_usual_id, need, need_masks, need_polygons, read_coco
from .digits import SPLITS
from .problems import find_box_problems, find_image_problems, find_mask_problems, raise_fatal
from .sources import check_registered, is_source

__all__ = ["check_dataset"]


def check_dataset(
    name: str,
    *,
    for_training: bool,
    num_classes: int | None,
    num_classes_key: str,
    fields: tuple = (),
    allow_outside: bool = False,
    drop_bad_boxes: bool = False,
    filter_empty: bool = False,
) -> None:
    """Checks that a data set is registered, there, and fits the model; draws an embedded one.

    Args:
        name: the data set.
        for_training: whether it is trained on, and so has to have annotations.
        num_classes: of the model; None if that does not matter.
        num_classes_key: the config key of this number.
        fields: further fields that annotations for training must have, "segmentation",
            "polygons" (of masks) or "keypoints".
        allow_outside: whether images may lie outside of the data set's folder.
        drop_bad_boxes: whether boxes of negative size, which training leaves out, are no error.
        filter_empty: whether images without objects are not trained on, which is told.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    check_registered(name)
    metadata = MetadataCatalog.get(name)
    try:
        if name in SPLITS:
            DatasetCatalog.get(name)  # draws it
        for path in filter(None, (metadata.get(k) for k in ("json_file", "image_root", "dirname"))):
            if not PathManager.exists(path):
                raise ValueError(
                    f"{path} does not exist; DETECTRON2_DATASETS names the folder of the data sets "
                    f"(now '{os.getenv('DETECTRON2_DATASETS', 'datasets')}'); your own are named "
                    f"with {'--train' if for_training else '--val'}"
                )
        classes = metadata.get("thing_classes")
        if metadata.get("json_file"):
            options = {
                "allow_outside": allow_outside,
                "drop": drop_bad_boxes and for_training,
                "filter_empty": filter_empty and for_training,
            }
            classes = _check_coco(metadata, fields, for_training, **options)
    except OSError as error:
        raise ValueError(f"data set '{name}' cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"data set '{name}': {error}") from None
    if classes and num_classes not in (None, len(classes)):
        raise ValueError(
            f"{num_classes_key} is {num_classes} but data set '{name}' has {len(classes)} "
            "classes; leave it out and it is what the data has"
        )


def _check_coco(
    metadata,
    fields: tuple,
    for_training: bool,
    *,
    allow_outside: bool,
    drop: bool,
    filter_empty: bool,
) -> list:
    """Checks what detectron2 and pycocotools will read of an annotation file; its categories."""
    try:
        coco = read_coco(PathManager.get_local_path(metadata.json_file))
        _check_annotations(coco, metadata, fields, for_training)
        problems = find_box_problems(coco, drop) + find_mask_problems(coco)
        if not _is_lvis(metadata) and metadata.get("image_root"):
            problems += find_image_problems(coco, Path(metadata.image_root), allow_outside)
        raise_fatal(problems)
    except ValueError as error:
        # What is behind a data set named in place is nothing that a user knows.
        place = "" if is_source(metadata.name) else f"{metadata.json_file} "
        raise ValueError(f"{place}{error}") from None
    filled = {a.image_id for a in coco.annotations or () if not is_crowd(a)}
    num_empty = len(coco.images) - len(filled)
    if filter_empty and num_empty:
        logging.getLogger(__name__).warning(
            "data set '%s' has %d images without objects, which are not trained on; "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them",
            metadata.name,
            num_empty,
        )
    for problem in problems:
        logging.getLogger(__name__).warning("data set '%s' %s", metadata.name, problem.what)
    return coco.categories


def _is_lvis(metadata) -> bool:
    return metadata.get("evaluator_type") == "lvis"


def _check_annotations(coco: Coco, metadata, fields: tuple, for_training: bool) -> None:
    """Refuses what detectron2 and pycocotools do not read, and what lacks what they need."""
    is_lvis, annotations = _is_lvis(metadata), coco.annotations or []
    for image in coco.images:
        if not (image.coco_url if is_lvis else image.file_name):
            raise ValueError(f"has no {'coco_url' if is_lvis else 'file_name'} of {image.id!r}")
    if for_training and all(map(is_crowd, annotations)):
        raise ValueError("has no annotations, but for crowd regions and difficult objects")
    has_masks = bool({"polygons", "segmentation"} & {*fields})
    if metadata.name.startswith("voc:") and has_masks:
        raise ValueError("has no masks, as none of Pascal VOC's; MODEL.MASK_ON must be False")
    with PathManager.open(metadata.json_file, "rb") as file:
        if file.read(len(BOM)) == BOM:  # which the reader here passes over
            raise ValueError("begins with a byte order mark; save it as UTF-8 without one")
    if not is_source(metadata.name) and any(a.ignore for a in annotations):
        raise ValueError(
            "has annotations with ignore, which detectron2 does not read; name the data set in "
            "place, as coco:..., where they are crowd regions"
        )
    if "polygons" in fields and for_training:
        need_polygons(annotations)
    # pycocotools wants area and iscrowd of what it evaluates on.
    needed = fields if for_training else (*fields, "area", *(() if is_lvis else ("iscrowd",)))
    need(annotations, tuple("segmentation" if f == "polygons" else f for f in needed))
    if not for_training:
        _check_ids(coco)
        if has_masks:
            need_masks(annotations)


def _check_ids(coco: Coco) -> None:
    """Refuses ids of annotations that pycocotools can't read, or takes for "no object"."""
    for annotation in coco.annotations or ():
        if not is_usual_id(annotation):
            raise ValueError(
                f"has an annotation of id {annotation.id!r}, which pycocotools cannot read or "
                "scores as missed; count them from 1, or name the data set in place, as coco:..., "
                "where they are counted anew"
            )
