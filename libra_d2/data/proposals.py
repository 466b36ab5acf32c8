"""Checks of precomputed proposals (``MODEL.LOAD_PROPOSALS``) before a run."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from libra_d2.config import get_key
from libra_d2.pickles import read_pickle

from .coco_json import read_coco

__all__ = ["check_proposals"]

# The names that Detectron, before detectron2, gave them; detectron2 reads both.
_OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}


def check_proposals(cfg: CfgNode, split: str) -> None:
    """Checks that files of proposals are there and have those of every image of their data sets.

    What is at an address is fetched. A file is unpickled whatever its size: detectron2 will do so
    without looking at what it would run.

    Args:
        cfg: the run's config.
        split: of which data sets, "TRAIN" or "TEST".

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    loads, name = cfg.MODEL.LOAD_PROPOSALS, cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if loads != (name == "PrecomputedProposals"):
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals needs MODEL.LOAD_PROPOSALS True "
            f"and the reverse, got {name} and {loads}"
        )
    if not loads:
        return
    datasets, key = cfg.DATASETS[split], f"DATASETS.PROPOSAL_FILES_{split}"
    files = get_key(cfg, key)
    if len(files) != len(datasets) or not all(isinstance(file, str) for file in files):
        raise ValueError(
            f"{key} must name a file for each of the {len(datasets)} data sets of "
            f"DATASETS.{split}, got {files}"
        )
    for dataset, file in zip(datasets, files, strict=True):
        try:
            local = PathManager.get_local_path(file)
        except Exception as error:
            raise ValueError(f"{key} '{file}' cannot be fetched: {error}") from error
        if not PathManager.isfile(local):
            raise ValueError(f"{key} '{file}' does not exist or is not a file")
        try:
            _check_file(local, dataset)
        except ValueError as error:
            raise ValueError(f"{key} '{file}' {error}") from None


def _check_file(file: str, dataset: str) -> None:
    content = read_pickle(file)
    names = ("ids", "boxes", "objectness_logits")
    if isinstance(content, dict):
        content = {_OLD_NAMES.get(name, name): value for name, value in content.items()}
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), (list, np.ndarray)) for name in names
    ):
        raise ValueError(f"is not a dict of the lists {', '.join(names)}")
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"has bbox_mode {mode}; it must be XYXY_ABS or XYWH_ABS")
    parts = [content[name] for name in names]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"has {' and '.join(str(len(p)) for p in parts)} {', '.join(names)}")
    for image, boxes, logits in zip(*parts, strict=True):
        shapes = [x.shape if _is_finite(x) else "no finite numbers" for x in (boxes, logits)]
        if shapes != [(len(logits), 4), (len(logits),)]:
            raise ValueError(
                f"has, for image {image}, boxes of {shapes[0]} and objectness_logits of "
                f"{shapes[1]}; they must be arrays of (N, 4) and (N,)"
            )
    annotations = MetadataCatalog.get(dataset).get("json_file")
    if annotations:
        images = {str(image.id) for image in read_coco(annotations).images}
        lacking = images - {str(image) for image in content["ids"]}
        if lacking:
            raise ValueError(
                f"has no proposals for {len(lacking)} of the {len(images)} images of data set "
                f"'{dataset}', among them {min(lacking)}"
            )


def _is_finite(values) -> bool:
    is_array = isinstance(values, np.ndarray) and values.dtype.kind in "fiu"
    return is_array and bool(np.isfinite(values).all())
