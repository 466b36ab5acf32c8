"""Every config key this project adds, with its default and its paper; and how keys are read."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from detectron2.config import CfgNode

__all__ = [
    "add_libra_config",
    "background_threshold",
    "balanced_l1_options",
    "choose",
    "get_key",
    "pisa_options",
    "suggest",
]

T = TypeVar("T")


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

    # ---- Sampling (Libra R-CNN, section 3.1): ROI_HEADS.NAME LibraROIHeads, LibraCascadeROIHeads
    # "random", "instance_balanced" or "ohem".
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER = "random"
    # "random", "iou_balanced", "ohem" or "score_hlr" (PISA's ISR-N).
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = "random"
    cfg.MODEL.ROI_HEADS.IOU_BALANCED = CfgNode()
    cfg.MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS = 3
    # Negatives below this IoU form a set of their own, which gives FLOOR_FRACTION; 0 for none.
    cfg.MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU = 0.0
    cfg.MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_FRACTION = 0.0

    # ISR-N (PISA, section 4.2): negatives that score more are clustered by NMS and ranked,
    cfg.MODEL.ROI_HEADS.SCORE_HLR = CfgNode()
    cfg.MODEL.ROI_HEADS.SCORE_HLR.SCORE_THRESH = 0.05
    cfg.MODEL.ROI_HEADS.SCORE_HLR.NMS_THRESH = 0.5
    # and weigh (BIAS + (1 - BIAS) u) ** K, u falling from 1 at the first rank.
    cfg.MODEL.ROI_HEADS.SCORE_HLR.K = 0.5
    cfg.MODEL.ROI_HEADS.SCORE_HLR.BIAS = 0.0

    # ---- PISA (Prime Sample Attention): ROI_HEADS.NAME Libra..., META_ARCHITECTURE LibraRetinaNet
    # ISR-P (section 4.1): positives weigh by rank, as above.
    cfg.MODEL.PISA = CfgNode()
    cfg.MODEL.PISA.ISR_POSITIVE = CfgNode()
    cfg.MODEL.PISA.ISR_POSITIVE.ENABLED = False
    cfg.MODEL.PISA.ISR_POSITIVE.K = 2.0
    cfg.MODEL.PISA.ISR_POSITIVE.BIAS = 0.0
    # CARL (section 4.3): box losses weigh by the predicted probability of the true class.
    cfg.MODEL.PISA.CARL = CfgNode()
    cfg.MODEL.PISA.CARL.ENABLED = False
    cfg.MODEL.PISA.CARL.K = 1.0
    cfg.MODEL.PISA.CARL.BIAS = 0.2

    # ---- Balanced L1 loss (Libra R-CNN, section 3.3): BBOX_REG_LOSS_TYPE "balanced_l1"
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1 = CfgNode()
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1.ALPHA = 0.5
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1.GAMMA = 1.5
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1.BETA = 1.0

    # ---- RetinaNet: META_ARCHITECTURE LibraRetinaNet
    # "focal", "balanced_ce" (alpha-balanced cross entropy) or "ohem".
    cfg.MODEL.RETINANET.CLS_LOSS_TYPE = "focal"
    # OHEM on anchors (focal-loss paper, table 1d).
    cfg.MODEL.RETINANET.OHEM = CfgNode()
    # How many anchors of an image are trained on.
    cfg.MODEL.RETINANET.OHEM.BATCH_SIZE_PER_IMAGE = 512
    # Of two anchors of a larger IoU only the one with the larger loss is.
    cfg.MODEL.RETINANET.OHEM.NMS_THRESH = 0.7
    # At most this many negatives a positive, and at least this many in all; -1 for no limit.
    cfg.MODEL.RETINANET.OHEM.NEGATIVE_POSITIVE_UB = -1
    # The same as for the ROI heads; beta 0.11 is the published Libra RetinaNet's.
    cfg.MODEL.RETINANET.BALANCED_L1 = CfgNode()
    cfg.MODEL.RETINANET.BALANCED_L1.ALPHA = 0.5
    cfg.MODEL.RETINANET.BALANCED_L1.GAMMA = 1.5
    cfg.MODEL.RETINANET.BALANCED_L1.BETA = 0.11
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0
    # "max_iou" or "mutual_guidance" (ACCV 2020), which reads IOU_THRESHOLDS too.
    cfg.MODEL.RETINANET.MATCHER = "max_iou"
    cfg.MODEL.RETINANET.MUTUAL_GUIDANCE = CfgNode()
    # Greater than 1; the larger, the less the predicted scores matter for box regression.
    cfg.MODEL.RETINANET.MUTUAL_GUIDANCE.SIGMA = 2.0

    # ---- A ResNet small enough for a CPU: BACKBONE.NAME build_small_resnet_fpn_backbone
    cfg.MODEL.SMALL_RESNET = CfgNode()
    # Output channels of the stages res2 .. res5, each of one basic block.
    cfg.MODEL.SMALL_RESNET.OUT_CHANNELS = [32, 64, 96, 128]

    # ---- Training
    # "SGD" or "AdamW" (BASE_LR and WEIGHT_DECAY are read by both).
    cfg.SOLVER.OPTIMIZER = "SGD"


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


def pisa_options(cfg: CfgNode, part: str) -> dict | None:
    """``k`` and ``bias`` of a part of PISA, "ISR_POSITIVE" or "CARL"; None if it is off."""
    options = cfg.MODEL.PISA[part]
    return {"k": options.K, "bias": options.BIAS} if options.ENABLED else None
