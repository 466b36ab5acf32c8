"""Checks of config values, so that a wrong one is one clear sentence before anything is built.

What a class of this project refuses it says itself, when it is made: switches are made here, on
trial; ROI heads and other modules with the model. Here are the values that detectron2 takes as they
come, and the switches that a model does not read.
"""

from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
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
    LibraRetinaNet,
    LibraROIHeads,
    LibraRPN,
)

__all__ = ["check_config"]

_META, _HEADS = "MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME"
_RPN = "MODEL.PROPOSAL_GENERATOR.NAME"
# The classes of this project that read switches, and where a config names them.
_READERS = {_META: LibraRetinaNet, _HEADS: LibraROIHeads, _RPN: LibraRPN}
_REGISTRIES = {
    _META: META_ARCH_REGISTRY,
    _HEADS: ROI_HEADS_REGISTRY,
    _RPN: PROPOSAL_GENERATOR_REGISTRY,
}
_ONE_STAGE = {
    "MODEL.RETINANET.CLS_LOSS_TYPE": CLASSIFICATION_LOSSES,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.RETINANET.MATCHER": MATCHERS,
}
_TWO_STAGE = {
    "MODEL.ROI_HEADS.POSITIVE_SAMPLER": POSITIVE_SAMPLERS,
    "MODEL.ROI_HEADS.NEGATIVE_SAMPLER": NEGATIVE_SAMPLERS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.RPN.POSITIVE_SAMPLER": POSITIVE_SAMPLERS,
    "MODEL.RPN.NEGATIVE_SAMPLER": NEGATIVE_SAMPLERS,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
}
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_CHOICES = {
    "MODEL.LIBRA.REFERENCE": ("paper", "mmdet"),
    "MODEL.BFP.REFINE_TYPE": REFINE_TYPES,
    "MODEL.BFP.NORM": _NORMS,
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": (
        *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
}
_COUNT = (1, 10**9)
# The lowest and the highest value.
_RANGES = {
    "MODEL.RPN.POSITIVE_FRACTION": (0.0, 1.0),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": (0.0, 1.0),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.NUM_CLASSES": _COUNT,
    "MODEL.RETINANET.NUM_CLASSES": _COUNT,
    "MODEL.RETINANET.NUM_CONVS": _COUNT,
    "MODEL.RETINANET.PRIOR_PROB": (1e-9, 1 - 1e-9),
    "SOLVER.CHECKPOINT_PERIOD": _COUNT,
    "SOLVER.IMS_PER_BATCH": _COUNT,
    "SOLVER.MAX_ITER": _COUNT,
}


def check_config(cfg: CfgNode) -> None:
    """Checks the values of libra_d2's keys and of the numbers they work with.

    Raises:
        ValueError: naming the key, its value and what would be right.
    """
    for key, choices in _CHOICES.items():
        choose(key, cfg, choices)
    for key, (low, high) in _RANGES.items():
        if not low <= get_key(cfg, key) <= high:
            raise ValueError(f"{key} must be in [{low}, {high}], got {get_key(cfg, key)}")
    for part in (IsrPositive, Carl):
        part.from_config(cfg)
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return  # which is said when the model is built
    is_one_stage = issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), DenseDetector)
    _check_switches(cfg, (_META,) if is_one_stage else (_HEADS, _RPN))
    if is_one_stage:
        _check_one_stage(cfg)
    else:
        _check_two_stage(cfg)
    for key, registry in (_ONE_STAGE if is_one_stage else _TWO_STAGE).items():
        registry.check(key, cfg)


def _check_switches(cfg: CfgNode, places: tuple[str, ...]) -> None:
    """Refuses a switch that the classes named in these places do not read, and would ignore."""
    names = {place: get_key(cfg, place) for place in places}
    present = [_REGISTRIES[p].get(n) for p, n in names.items() if n in _REGISTRIES[p]]
    if any(n not in _REGISTRIES[p] and n != "PrecomputedProposals" for p, n in names.items()):
        return  # which is said when the model is built
    # A user's own class may read anything.
    if not all(hasattr(c, "switches") or c.__module__.startswith("detectron2.") for c in present):
        return
    read = {key for c in present for key in getattr(c, "switches", ())}
    for place, reader in _READERS.items():
        for key, nothing_new in reader.switches.items():
            value = get_key(cfg, key)
            if key in read or value in nothing_new:
                continue
            elsewhere = [p for p in places if key in _READERS[p].switches]
            if elsewhere:
                place = elsewhere[0]
                needed = _READERS[place].__name__
            elif place == _META:
                needed = reader.__name__
            else:
                place, needed = _META, "of a two-stage detector, such as GeneralizedRCNN,"
            raise ValueError(f"{key} {value} needs {place} {needed}, got {get_key(cfg, place)}")


def _check_two_stage(cfg: CfgNode) -> None:
    _check_thresholds(cfg, "RPN")
    _check_thresholds(cfg, "ROI_HEADS")
    _check_box_weights(
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
    )
    if "Cascade" not in cfg.MODEL.ROI_HEADS.NAME:
        return
    name = "MODEL.ROI_BOX_CASCADE_HEAD"
    ious, weights = list(get_key(cfg, f"{name}.IOUS")), get_key(cfg, f"{name}.BBOX_REG_WEIGHTS")
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(
            f"{_HEADS} {cfg.MODEL.ROI_HEADS.NAME} needs "
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
        )
    _check_ious(f"{name}.IOUS", ious)
    if list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS) != ious[:1]:
        raise ValueError(
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS must be the first of {name}.IOUS, {ious[:1]}, "
            f"got {cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS}"
        )
    if len(weights) != len(ious):
        raise ValueError(
            f"{name}.BBOX_REG_WEIGHTS must be four positive numbers for each of the {len(ious)} "
            f"stages, got {weights}"
        )
    for stage in weights:
        _check_box_weights(f"{name}.BBOX_REG_WEIGHTS", stage)


def _check_one_stage(cfg: CfgNode) -> None:
    for key in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"):
        if get_key(cfg, key):
            raise ValueError(
                f"{key} True needs {_META} of a two-stage detector, such as GeneralizedRCNN, "
                f"got {cfg.MODEL.META_ARCHITECTURE}"
            )
    if cfg.MODEL.META_ARCHITECTURE not in ("LibraRetinaNet", "RetinaNet"):
        return
    _check_thresholds(cfg, "RETINANET")
    _check_box_weights("MODEL.RETINANET.BBOX_REG_WEIGHTS", cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS)
    levels = list(cfg.MODEL.RETINANET.IN_FEATURES)
    if levels != sorted(set(levels), key=lambda name: (len(name), name)):
        raise ValueError(
            "MODEL.RETINANET.IN_FEATURES must be levels of the pyramid, the finest first and each "
            f"once, got {levels}"
        )


def _check_box_weights(key: str, weights: tuple) -> None:
    if not (_are_numbers(weights, 1e6) and len(weights) == 4):
        raise ValueError(f"{key} must be four positive numbers, got {weights}")


def _check_ious(key: str, ious: list) -> None:
    if not (_are_numbers(ious, 1.0) and ious and sorted(ious) == list(ious)):
        raise ValueError(f"{key} must be ascending numbers in (0, 1], got {ious}")


def _are_numbers(values: object, highest: float) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) and 0 < value <= highest for value in values
    )


def _check_thresholds(cfg: CfgNode, name: str) -> None:
    thresholds, labels = cfg.MODEL[name].IOU_THRESHOLDS, cfg.MODEL[name].IOU_LABELS
    if len(labels) != len(thresholds) + 1:
        raise ValueError(
            f"MODEL.{name}.IOU_LABELS must be one more than the {len(thresholds)} "
            f"IOU_THRESHOLDS, got {len(labels)}"
        )
    _check_ious(f"MODEL.{name}.IOU_THRESHOLDS", thresholds)
    if any(label not in (-1, 0, 1) for label in labels):
        raise ValueError(
            f"MODEL.{name}.IOU_LABELS must be 0 (negative), -1 (ignored) or 1 (positive), "
            f"got {labels}"
        )
