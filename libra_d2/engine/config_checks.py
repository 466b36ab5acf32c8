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
    "DATASETS.ON_BAD_BOXES": ("refuse", "drop"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": _SCHEDULERS,
    "SOLVER.WARMUP_METHOD": ("constant", "linear"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.RESIZE": ("pil", "torch"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    # detectron2's others need keys that its config has not.
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
}
_MOST = 10**9
_CHANNELS = {"L": 1}  # of INPUT.FORMAT; three of the others


def _are_positive(values: Any, highest: float) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) and 0 < value <= highest for value in values
    )


def _ascend(ious: Any) -> bool:
    return _are_positive(ious, 1.0) and bool(ious) and sorted(ious) == list(ious)


def _are_weights(values: Any) -> bool:
    return _are_positive(values, 1e6) and len(values) == 4


def _are_levels(names: Any) -> bool:
    return list(names) == sorted(set(names), key=lambda name: (len(name), name))


def _are_all_positive(values: Any) -> bool:
    """Of numbers, or of lists of them: detectron2's anchors take both."""
    return bool(values) and all(
        _are_all_positive(x) if isinstance(x, (list, tuple)) else 0 < x <= _MOST for x in values
    )


def _are_expectations(rows: Any) -> bool:
    return isinstance(rows, (list, tuple)) and all(
        isinstance(row, (list, tuple))
        and [type(x) for x in row[:2]] == [str, str]
        and len(row) == 4
        and all(isinstance(x, (int, float)) for x in row[2:])
        for row in rows
    )


# What values must be, whether one is, and the keys that hold them.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "in [1, 1000000000]",
        lambda value: 1 <= value <= _MOST,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE "
        "MODEL.ROI_HEADS.NUM_CLASSES MODEL.RETINANET.NUM_CLASSES MODEL.RETINANET.NUM_CONVS "
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN MODEL.RPN.PRE_NMS_TOPK_TEST MODEL.RPN.POST_NMS_TOPK_TRAIN "
        "MODEL.RPN.POST_NMS_TOPK_TEST MODEL.RETINANET.TOPK_CANDIDATES_TEST MODEL.FPN.OUT_CHANNELS "
        "MODEL.RESNETS.STEM_OUT_CHANNELS MODEL.ROI_BOX_HEAD.FC_DIM MODEL.ROI_BOX_HEAD.CONV_DIM "
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION INPUT.MAX_SIZE_TRAIN INPUT.MAX_SIZE_TEST "
        "SOLVER.CHECKPOINT_PERIOD SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER SOLVER.NUM_DECAYS "
        "SOLVER.LOG_PERIOD TEST.PRECISE_BN.NUM_ITER",
    ),
    (
        "in [0, 1000000000]",
        lambda value: 0 <= value <= _MOST,
        "SOLVER.BASE_LR SOLVER.BASE_LR_END SOLVER.WEIGHT_DECAY SOLVER.WEIGHT_DECAY_NORM "
        "SOLVER.BIAS_LR_FACTOR SOLVER.GAMMA SOLVER.WARMUP_FACTOR SOLVER.WARMUP_ITERS "
        "SOLVER.REFERENCE_WORLD_SIZE SOLVER.MAX_TO_KEEP SOLVER.MAX_SKIPPED DATALOADER.NUM_WORKERS "
        "TEST.PATIENCE TEST.NUM_SHOWN "
        "DATALOADER.MAX_BAD_IMAGES DATALOADER.REPEAT_THRESHOLD INPUT.MIN_SIZE_TEST "
        "TEST.EVAL_PERIOD VIS_PERIOD MODEL.BACKBONE.FREEZE_AT MODEL.PROPOSAL_GENERATOR.MIN_SIZE "
        "MODEL.RPN.LOSS_WEIGHT MODEL.RPN.BBOX_REG_LOSS_WEIGHT MODEL.RPN.SMOOTH_L1_BETA "
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA "
        "MODEL.ROI_BOX_HEAD.NUM_FC MODEL.ROI_BOX_HEAD.NUM_CONV "
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO MODEL.RETINANET.SMOOTH_L1_LOSS_BETA",
    ),
    (
        "above 0",
        lambda value: 0 < value <= _MOST,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    ),
    (
        "in [0.0, 1.0]",
        lambda value: 0 <= value <= 1,
        "MODEL.RPN.POSITIVE_FRACTION MODEL.ROI_HEADS.POSITIVE_FRACTION MODEL.RPN.NMS_THRESH "
        "MODEL.ROI_HEADS.NMS_THRESH_TEST MODEL.ROI_HEADS.SCORE_THRESH_TEST "
        "MODEL.RETINANET.NMS_THRESH_TEST MODEL.RETINANET.SCORE_THRESH_TEST",
    ),
    ("in [0.0, 1.0)", lambda value: 0 <= value < 1, "SOLVER.MOMENTUM SOLVER.EMA.DECAY"),
    ("in [1e-09, 1)", lambda value: 1e-9 <= value < 1, "MODEL.RETINANET.PRIOR_PROB"),
    (
        "at least 1, or -1 for all",
        lambda value: 1 <= value <= _MOST or value == -1,
        "TEST.DETECTIONS_PER_IMAGE",
    ),
    ("below 2147483648", lambda value: value < 2**31, "SEED"),
    (
        "ascending numbers in (0, 1]",
        _ascend,
        "MODEL.RPN.IOU_THRESHOLDS MODEL.ROI_HEADS.IOU_THRESHOLDS MODEL.RETINANET.IOU_THRESHOLDS "
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
    ),
    (
        "ascending iterations",
        lambda steps: all(0 < step for step in steps) and sorted(steps) == list(steps),
        "SOLVER.STEPS",
    ),
    (
        "0 (negative), -1 (ignored) or 1 (positive)",
        lambda labels: all(label in (-1, 0, 1) for label in labels),
        "MODEL.RPN.IOU_LABELS MODEL.ROI_HEADS.IOU_LABELS MODEL.RETINANET.IOU_LABELS",
    ),
    (
        "four positive numbers",
        _are_weights,
        "MODEL.RPN.BBOX_REG_WEIGHTS MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS "
        "MODEL.RETINANET.BBOX_REG_WEIGHTS",
    ),
    (
        "positive numbers",
        _are_all_positive,
        "MODEL.ANCHOR_GENERATOR.SIZES MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS INPUT.MIN_SIZE_TRAIN "
        "INPUT.CROP.SIZE MODEL.PIXEL_STD TEST.AUG.MIN_SIZES",
    ),
    (
        "rows of task, metric, value and tolerance",
        _are_expectations,
        "TEST.EXPECTED_RESULTS",
    ),
    (
        "levels of the pyramid, the finest first and each once",
        _are_levels,
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
                _require(_holds(is_right, get_key(cfg, key)), key, what, cfg)
    channels = _CHANNELS.get(cfg.INPUT.FORMAT, 3)
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        what = f"{channels} numbers, of the channels of INPUT.FORMAT {cfg.INPUT.FORMAT}"
        _require(len(get_key(cfg, key)) == channels, key, what, cfg)
    for key in ("TEST.BEST_METRIC", "TEST.LOSSES", "TEST.NUM_SHOWN"):
        if get_key(cfg, key) and cfg.TEST.EVAL_PERIOD == 0:
            raise ValueError(f"{key} {get_key(cfg, key)} needs a TEST.EVAL_PERIOD above 0")
    needs = "0 without a TEST.BEST_METRIC"
    _require(not cfg.TEST.PATIENCE or bool(cfg.TEST.BEST_METRIC), "TEST.PATIENCE", needs, cfg)
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


def _holds(is_right: Callable[[Any], bool], value: Any) -> bool:
    try:
        return is_right(value)
    except TypeError:  # of what is no number, or no list
        return False


def _require(is_right: bool, key: str, what: str, cfg: CfgNode) -> None:
    if not is_right:
        raise ValueError(f"{key} must be {what}, got {get_key(cfg, key)}")
