"""Checks before a run: whatever would make it fail later is one clear sentence now."""

import json
import os
from pathlib import Path
from urllib.parse import urlparse

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.utils.file_io import PathManager

from ..config import choose, get_key, suggest
from ..data.digits import SPLITS

__all__ = ["check_run", "remove_run"]

_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
}
# detectron2's names for "none".
_NO_OBJECT = ("", "PrecomputedProposals")
# What a training run leaves in its output folder.
_RUN_FILES = (
    "config.yaml",
    "events.out.tfevents.*",
    "last_checkpoint",
    "log.txt*",
    "metrics.json",
    "model_*.pth",
    "inference/*",
)
# Larger annotation files are not read twice.
_MAX_BYTES_TO_CHECK = 64 * 2**20


def check_run(
    cfg: CfgNode, *, eval_only: bool, resume: bool, overwrite: bool, num_processes: int = 1
) -> None:
    """Checks names, data sets, weights and the output folder; draws embedded data sets if needed.

    Args:
        cfg: the run's config.
        eval_only: whether it only evaluates, so that the training data does not matter.
        resume: whether it may go on with what is in the output folder.
        overwrite: whether it may replace that.
        num_processes: over which the batch is divided.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    for key, registry in _REGISTRIES.items():
        if get_key(cfg, key) not in _NO_OBJECT:
            choose(key, cfg, dict(registry))
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if not eval_only and cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the {num_processes} processes, "
            f"got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    output = Path(cfg.OUTPUT_DIR)
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUTPUT_DIR '{output}' is not a folder")
    has_checkpoint = (output / "last_checkpoint").exists()
    if not eval_only and not resume and not overwrite and _has_run(output):
        raise ValueError(
            f"OUTPUT_DIR '{output}' holds a training run; give --resume to go on with it, "
            "--overwrite to replace it, or another OUTPUT_DIR"
        )
    if not (resume and has_checkpoint):
        _check_weights(cfg.MODEL.WEIGHTS)
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a registered data set")
    for name in dict.fromkeys((*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)):
        _check_dataset(name, cfg)


def remove_run(output: Path) -> None:
    """Removes the files of a training run from its output folder, and nothing else."""
    for pattern in _RUN_FILES:
        for file in output.glob(pattern):
            if file.is_file():
                file.unlink()


def _has_run(output: Path) -> bool:
    return any((output / name).exists() for name in ("last_checkpoint", "metrics.json")) or any(
        output.glob("model_*.pth")
    )


def _check_weights(weights: str) -> None:
    url = urlparse(weights)
    if weights and not url.scheme and not PathManager.isfile(url.path):
        raise ValueError(f"MODEL.WEIGHTS '{weights}' does not exist")


def _check_dataset(name: str, cfg: CfgNode) -> None:
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"data set '{name}' is not registered{suggest(name, DatasetCatalog.list())}; "
            "register your own with detectron2.data.datasets.register_coco_instances"
        )
    metadata = MetadataCatalog.get(name)
    if name in SPLITS and not os.path.exists(metadata.json_file):
        DatasetCatalog.get(name)  # draws it
    for kind in ("json_file", "image_root", "dirname"):
        path = metadata.get(kind)
        if path and not PathManager.exists(path):
            raise ValueError(
                f"data set '{name}': {path} does not exist; DETECTRON2_DATASETS names the folder "
                f"of the data sets (now '{os.getenv('DETECTRON2_DATASETS', 'datasets')}')"
            )
    classes = metadata.get("thing_classes")
    if metadata.get("json_file"):
        classes = _check_coco_json(name, metadata) or classes
    key = "RETINANET" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "ROI_HEADS"
    num_classes = cfg.MODEL[key].NUM_CLASSES
    if classes and num_classes < len(classes):
        raise ValueError(
            f"MODEL.{key}.NUM_CLASSES is {num_classes} but data set '{name}' has {len(classes)} "
            "categories; it must be at least that"
        )


def _check_coco_json(name: str, metadata: Metadata) -> list | None:
    """Checks the annotation file; returns its categories, or None if it is too large to read."""
    path = PathManager.get_local_path(metadata.json_file)
    if os.path.getsize(path) > _MAX_BYTES_TO_CHECK:
        return None
    try:
        content = json.loads(Path(path).read_text())
    except ValueError:
        raise ValueError(f"data set '{name}': {path} is not valid json") from None
    wanted = ("images", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list) for part in wanted
    ):
        raise ValueError(
            f"data set '{name}': {path} is not COCO json, an object with the lists images, "
            "annotations and categories"
        )
    return content["categories"]
