"""Every config key this project adds, with its default and its paper, and the checks of values.

The checks collect here, so that a wrong value is one clear sentence before anything is built.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from detectron2.config import CfgNode

from .layers import REFINE_TYPES
from .losses.balanced_l1 import REFERENCES, check_balanced_l1

__all__ = ["add_libra_config", "check_config"]

T = TypeVar("T")

OPTIMIZERS = ("SGD", "AdamW")
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
BOX_REG_LOSSES = ("smooth_l1", "giou", "diou", "ciou", "balanced_l1")
FRACTIONS = (
    "MODEL.RPN.POSITIVE_FRACTION",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    "MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU",
    "MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_FRACTION",
)
MAX_IOU_BINS = 100
AT_LEAST_ONE = (
    "MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
)
# What detectron2's own classes do not read: the key, its values that ask for nothing new, the key
# of the class, and the class that reads it.
NEW_SWITCHES = (
    ("MODEL.ROI_HEADS.POSITIVE_SAMPLER", ("random",), "MODEL.ROI_HEADS.NAME", "LibraROIHeads"),
    ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", ("random",), "MODEL.ROI_HEADS.NAME", "LibraROIHeads"),
    (
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
        BOX_REG_LOSSES[:-1],
        "MODEL.ROI_HEADS.NAME",
        "LibraROIHeads",
    ),
    ("MODEL.RPN.NEGATIVE_POSITIVE_UB", (-1,), "MODEL.PROPOSAL_GENERATOR.NAME", "LibraRPN"),
)
DETECTRON2_CLASSES = ("StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads", "RPN")


def add_libra_config(cfg: CfgNode) -> None:
    """Adds the keys of libra_d2 to a detectron2 config, in place.

    With all of them at their defaults a model computes what detectron2's own computes.
    """
    # Which reading to follow where a paper and mmdetection differ: "paper" or "mmdet".
    cfg.MODEL.LIBRA = CfgNode()
    cfg.MODEL.LIBRA.REFERENCE = "paper"

    # ---- Balanced feature pyramid (Libra R-CNN, section 3.2): BACKBONE.NAME build_bfp_backbone
    cfg.MODEL.BFP = CfgNode()
    # Registered builder of the pyramid to balance.
    cfg.MODEL.BFP.FPN_BUILDER = "build_resnet_fpn_backbone"
    # Levels to balance, finest first; empty for all. Levels not named pass through.
    cfg.MODEL.BFP.IN_FEATURES = []
    # Index into these levels: at whose size the average of all is refined.
    cfg.MODEL.BFP.REFINE_LEVEL = 2
    # "non_local", "conv" or "none" (no parameters).
    cfg.MODEL.BFP.REFINE_TYPE = "non_local"
    # Normalization after the convolution of REFINE_TYPE "conv".
    cfg.MODEL.BFP.NORM = ""

    # ---- RPN: PROPOSAL_GENERATOR.NAME LibraRPN
    # At most this many negatives a positive, and at least this many in all; -1 for no limit.
    cfg.MODEL.RPN.NEGATIVE_POSITIVE_UB = -1

    # ---- Sampling (Libra R-CNN, section 3.1): ROI_HEADS.NAME LibraROIHeads
    # "random" or "instance_balanced".
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER = "random"
    # "random" or "iou_balanced".
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = "random"
    cfg.MODEL.ROI_HEADS.IOU_BALANCED = CfgNode()
    cfg.MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS = 3
    # Negatives below this IoU form a set of their own, which gives FLOOR_FRACTION; 0 for none.
    cfg.MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU = 0.0
    cfg.MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_FRACTION = 0.0

    # ---- Balanced L1 loss (Libra R-CNN, section 3.3): BBOX_REG_LOSS_TYPE "balanced_l1"
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1 = CfgNode()
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1.ALPHA = 0.5
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1.GAMMA = 1.5
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1.BETA = 1.0

    # ---- A ResNet small enough for a CPU: BACKBONE.NAME build_small_resnet_fpn_backbone
    cfg.MODEL.SMALL_RESNET = CfgNode()
    # Output channels of the stages res2 .. res5, each of one basic block.
    cfg.MODEL.SMALL_RESNET.OUT_CHANNELS = [32, 64, 96, 128]

    # ---- Training
    # "SGD" or "AdamW" (BASE_LR and WEIGHT_DECAY are read by both).
    cfg.SOLVER.OPTIMIZER = "SGD"


def check_config(cfg: CfgNode) -> None:
    """Checks the values of libra_d2's keys and of the numbers they work with.

    Names of samplers, builders and anything else that is registered are checked where they are
    looked up, when the model is built.

    Raises:
        ValueError: naming the key, its value and what would be right.
    """
    choose("MODEL.LIBRA.REFERENCE", cfg, REFERENCES)
    choose("SOLVER.OPTIMIZER", cfg, OPTIMIZERS)
    choose("SOLVER.LR_SCHEDULER_NAME", cfg, LR_SCHEDULERS)
    choose("MODEL.BFP.REFINE_TYPE", cfg, REFINE_TYPES)
    choose("MODEL.BFP.NORM", cfg, ("", *NORMS))
    for key in FRACTIONS:
        if not 0.0 <= get_key(cfg, key) <= 1.0:
            raise ValueError(f"{key} must be in [0, 1], got {get_key(cfg, key)}")
    for key in AT_LEAST_ONE:
        if get_key(cfg, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {get_key(cfg, key)}")
    bound = cfg.MODEL.RPN.NEGATIVE_POSITIVE_UB
    if bound != -1 and bound < 1:
        raise ValueError(
            f"MODEL.RPN.NEGATIVE_POSITIVE_UB must be -1 (no bound) or at least 1, got {bound}"
        )
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        _check_two_stage(cfg)


def _check_two_stage(cfg: CfgNode) -> None:
    choose("MODEL.RPN.BBOX_REG_LOSS_TYPE", cfg, BOX_REG_LOSSES[:-1])
    choose("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", cfg, BOX_REG_LOSSES)
    num_bins = cfg.MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS
    if num_bins > MAX_IOU_BINS:
        raise ValueError(
            f"MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS must be at most {MAX_IOU_BINS}, got {num_bins}"
        )
    try:
        check_balanced_l1(**balanced_l1_options(cfg, cfg.MODEL.ROI_BOX_HEAD))
    except ValueError as error:
        raise ValueError(f"MODEL.ROI_BOX_HEAD.BALANCED_L1: {error}") from None
    for name in ("RPN", "ROI_HEADS"):
        thresholds, labels = cfg.MODEL[name].IOU_THRESHOLDS, cfg.MODEL[name].IOU_LABELS
        if len(labels) != len(thresholds) + 1:
            raise ValueError(
                f"MODEL.{name}.IOU_LABELS must be one more than the {len(thresholds)} "
                f"IOU_THRESHOLDS, got {len(labels)}"
            )
    floor_iou = cfg.MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU
    if floor_iou >= background_threshold(cfg):
        raise ValueError(
            "MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU must be below the background threshold "
            f"{background_threshold(cfg)}, got {floor_iou}"
        )
    for key, nothing_new, reader, needed in NEW_SWITCHES:
        value, name = get_key(cfg, key), get_key(cfg, reader)
        if value not in nothing_new and name in DETECTRON2_CLASSES:
            # It would do nothing, silently.
            raise ValueError(f"{key} {value} needs {reader} {needed}, got {name}")


def choose(key: str, cfg: CfgNode, choices: Mapping[str, T] | Iterable[str]) -> T | str:
    """What ``choices`` holds for the value of ``key`` (the value itself if they are no mapping).

    Raises:
        ValueError: if the value is not among the choices; it names the nearest and lists all.
    """
    value = get_key(cfg, key)
    if value not in choices:
        raise ValueError(
            f"{key} '{value}' does not exist{suggest(value, choices)}; "
            f"there is {', '.join(choices)}"
        )
    return choices[value] if isinstance(choices, Mapping) else value


def get_key(cfg: CfgNode, key: str):
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def suggest(word: str, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to ``word``, or nothing if none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


def background_threshold(cfg: CfgNode) -> float:
    """The IoU below which the ROI heads' matcher calls a proposal background."""
    thresholds, labels = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS, cfg.MODEL.ROI_HEADS.IOU_LABELS
    edges = [upper for upper, label in zip([*thresholds, 1.0], labels, strict=True) if label == 0]
    return max(edges, default=thresholds[0])


def balanced_l1_options(cfg: CfgNode, head: CfgNode) -> dict:
    """Keyword arguments of :func:`libra_d2.losses.balanced_l1_loss` for a head of the config."""
    options = head.BALANCED_L1
    return {
        "alpha": options.ALPHA,
        "gamma": options.GAMMA,
        "beta": options.BETA,
        "reference": cfg.MODEL.LIBRA.REFERENCE,
    }
