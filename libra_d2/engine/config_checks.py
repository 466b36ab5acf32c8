"""Checks of config values, so that a wrong one is one clear sentence before anything is built.

What a class of this project refuses it says itself, when it is made: switches are made here, on
trial; ROI heads and other modules with the model. Here are the values that detectron2 takes as they
come.
"""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from libra_d2.config import choose, get_key
from libra_d2.layers import REFINE_TYPES
from libra_d2.modeling import (
    BOX_LOSSES,
    CLASSIFICATION_LOSSES,
    MATCHERS,
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    Carl,
    IsrPositive,
)
from libra_d2.modeling.reading import check_switches_are_read

__all__ = ["check_config"]

_REGISTRIES = (BOX_LOSSES, CLASSIFICATION_LOSSES, MATCHERS, NEGATIVE_SAMPLERS, POSITIVE_SAMPLERS)
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
_CHOICES = {
    "MODEL.LIBRA.REFERENCE": ("paper", "mmdet"),
    "MODEL.BFP.REFINE_TYPE": REFINE_TYPES,
    "MODEL.BFP.NORM": _NORMS,
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": _SCHEDULERS,
}


def _are_positive(values: Any, highest: float) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) and 0 < value <= highest for value in values
    )


def _ascend(ious: Any) -> bool:
    return _are_positive(ious, 1.0) and bool(ious) and sorted(ious) == list(ious)


def _are_weights(values: Any) -> bool:
    return _are_positive(values, 1e6) and len(values) == 4


# What values must be, whether one is, and the keys that hold them.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "in [1, 1000000000]",
        lambda value: 1 <= value <= 10**9,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE "
        "MODEL.ROI_HEADS.NUM_CLASSES MODEL.RETINANET.NUM_CLASSES MODEL.RETINANET.NUM_CONVS "
        "SOLVER.CHECKPOINT_PERIOD SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER",
    ),
    (
        "in [0.0, 1.0]",
        lambda value: 0 <= value <= 1,
        "MODEL.RPN.POSITIVE_FRACTION MODEL.ROI_HEADS.POSITIVE_FRACTION",
    ),
    ("in [1e-09, 1)", lambda value: 1e-9 <= value < 1, "MODEL.RETINANET.PRIOR_PROB"),
    (
        "ascending numbers in (0, 1]",
        _ascend,
        "MODEL.RPN.IOU_THRESHOLDS MODEL.ROI_HEADS.IOU_THRESHOLDS MODEL.RETINANET.IOU_THRESHOLDS "
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
    ),
    (
        "0 (negative), -1 (ignored) or 1 (positive)",
        lambda labels: all(label in (-1, 0, 1) for label in labels),
        "MODEL.RPN.IOU_LABELS MODEL.ROI_HEADS.IOU_LABELS MODEL.RETINANET.IOU_LABELS",
    ),
    (
        "four positive numbers",
        _are_weights,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS MODEL.RETINANET.BBOX_REG_WEIGHTS",
    ),
    (
        "levels of the pyramid, the finest first and each once",
        lambda names: list(names) == sorted(set(names), key=lambda name: (len(name), name)),
        "MODEL.RETINANET.IN_FEATURES",
    ),
)


def check_config(cfg: CfgNode) -> None:
    """Checks the values of libra_d2's keys and of the numbers they work with.

    Raises:
        ValueError: naming the key, its value and what would be right.
    """
    for key, choices in _CHOICES.items():
        choose(key, cfg, choices)
    for part in (IsrPositive, Carl):
        part.from_config(cfg)
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return  # which is said when the model is built
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    is_one_stage = issubclass(model, DenseDetector)
    # What a model of the other kind reads may be as it is.
    unread = ("MODEL.RPN.", "MODEL.ROI_") if is_one_stage else ("MODEL.RETINANET.",)
    for what, is_right, keys in _RULES:
        for key in keys.split():
            if not key.startswith(unread):
                _require(is_right(get_key(cfg, key)), key, what, cfg)
    check_switches_are_read(cfg)
    for name in ("RETINANET",) if is_one_stage else ("RPN", "ROI_HEADS"):
        thresholds, labels = cfg.MODEL[name].IOU_THRESHOLDS, f"MODEL.{name}.IOU_LABELS"
        is_right = len(get_key(cfg, labels)) == len(thresholds) + 1
        _require(is_right, labels, f"one more than the {len(thresholds)} IOU_THRESHOLDS", cfg)
    if is_one_stage:
        for key in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"):
            _require(not get_key(cfg, key), key, "False for a one-stage detector", cfg)
    for registry in _REGISTRIES:
        for key in registry.config_keys:
            if not key.startswith(unread):
                registry.check(key, cfg)


def _require(is_right: bool, key: str, what: str, cfg: CfgNode) -> None:
    if not is_right:
        raise ValueError(f"{key} must be {what}, got {get_key(cfg, key)}")
