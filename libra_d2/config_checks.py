"""Checks of config values, so that a wrong one is one clear sentence before anything is built.

Names of samplers, builders and anything else that is registered are checked where they are looked
up, when the model is built.
"""

from detectron2.config import CfgNode

from .config import background_threshold, balanced_l1_options, choose, get_key
from .layers import REFINE_TYPES
from .losses.balanced_l1 import REFERENCES, check_balanced_l1
from .matching import check_mutual_guidance
from .ranking import check_importance

__all__ = ["check_config"]

OPTIMIZERS = ("SGD", "AdamW")
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
BOX_REG_LOSSES = ("smooth_l1", "giou", "diou", "ciou", "balanced_l1")
MAX_IOU_BINS = 100
MAX_NUMBER = 10**9
FRACTIONS = (
    "MODEL.RPN.POSITIVE_FRACTION",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    "MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU",
    "MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_FRACTION",
    "MODEL.ROI_HEADS.SCORE_HLR.SCORE_THRESH",
    "MODEL.ROI_HEADS.SCORE_HLR.NMS_THRESH",
    "MODEL.RETINANET.OHEM.NMS_THRESH",
)
AT_LEAST_ONE = (
    "MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "MODEL.RETINANET.NUM_CLASSES",
    "MODEL.RETINANET.NUM_CONVS",
    "MODEL.RETINANET.OHEM.BATCH_SIZE_PER_IMAGE",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
)
# Where k and bias of PISA's three parts are.
IMPORTANCE = ("MODEL.ROI_HEADS.SCORE_HLR", "MODEL.PISA.ISR_POSITIVE", "MODEL.PISA.CARL")
# These need the softmax over classes and background.
SOFTMAX_SWITCHES = (
    ("MODEL.ROI_HEADS.POSITIVE_SAMPLER", ("ohem",)),
    ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", ("ohem", "score_hlr")),
    ("MODEL.PISA.ISR_POSITIVE.ENABLED", (True,)),
    ("MODEL.PISA.CARL.ENABLED", (True,)),
)
NEGATIVE_BOUNDS = ("MODEL.RPN.NEGATIVE_POSITIVE_UB", "MODEL.RETINANET.OHEM.NEGATIVE_POSITIVE_UB")
# What detectron2's own classes do not read: the key, its values that ask for nothing new, the key
# of the class, and the class that reads it.
_META, _HEADS = "MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME"
TWO_STAGE_SWITCHES = (
    ("MODEL.ROI_HEADS.POSITIVE_SAMPLER", ("random",), _HEADS, "LibraROIHeads"),
    ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", ("random",), _HEADS, "LibraROIHeads"),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", BOX_REG_LOSSES[:-1], _HEADS, "LibraROIHeads"),
    ("MODEL.PISA.ISR_POSITIVE.ENABLED", (False,), _HEADS, "LibraROIHeads"),
    ("MODEL.PISA.CARL.ENABLED", (False,), _HEADS, "LibraROIHeads"),
    ("MODEL.RPN.NEGATIVE_POSITIVE_UB", (-1,), "MODEL.PROPOSAL_GENERATOR.NAME", "LibraRPN"),
)
ONE_STAGE_SWITCHES = (
    ("MODEL.RETINANET.MATCHER", ("max_iou",), _META, "LibraRetinaNet"),
    ("MODEL.RETINANET.CLS_LOSS_TYPE", ("focal",), _META, "LibraRetinaNet"),
    ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", BOX_REG_LOSSES[:-1], _META, "LibraRetinaNet"),
    ("MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT", (1.0,), _META, "LibraRetinaNet"),
    ("MODEL.PISA.ISR_POSITIVE.ENABLED", (False,), _META, "LibraRetinaNet"),
    ("MODEL.PISA.CARL.ENABLED", (False,), _META, "LibraRetinaNet"),
)
DETECTRON2_CLASSES = (
    *("StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads", "RPN"),
    *("GeneralizedRCNN", "ProposalNetwork", "PanopticFPN", "SemanticSegmentor"),
    *("RetinaNet", "FCOS"),
)
ONE_STAGE = ("LibraRetinaNet", "RetinaNet", "FCOS")


def check_config(cfg: CfgNode) -> None:
    """Checks the values of libra_d2's keys and of the numbers they work with.

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
        if not 1 <= get_key(cfg, key) <= MAX_NUMBER:
            raise ValueError(
                f"{key} must be at least 1 (and at most {MAX_NUMBER}), got {get_key(cfg, key)}"
            )
    for key in NEGATIVE_BOUNDS:
        bound = get_key(cfg, key)
        if bound != -1 and not 1 <= bound <= MAX_NUMBER:
            raise ValueError(f"{key} must be -1 (no bound) or at least 1, got {bound}")
    for part in IMPORTANCE:
        options = get_key(cfg, part)
        try:
            check_importance(options.K, options.BIAS)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
    _check_switches(cfg)
    if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        _check_two_stage(cfg)
    elif cfg.MODEL.META_ARCHITECTURE in ("LibraRetinaNet", "RetinaNet"):
        _check_retinanet(cfg)


def _check_switches(cfg: CfgNode) -> None:
    """Refuses a switch that the model does not read: it would do nothing, silently."""
    is_one_stage = cfg.MODEL.META_ARCHITECTURE in ONE_STAGE
    own, other = TWO_STAGE_SWITCHES, ONE_STAGE_SWITCHES
    if is_one_stage:
        own, other = other, own
    for key, nothing_new, reader, needed in own:
        value, name = get_key(cfg, key), get_key(cfg, reader)
        if value not in nothing_new and name in DETECTRON2_CLASSES:
            raise ValueError(f"{key} {value} needs {reader} {needed}, got {name}")
    needed = (
        "of a two-stage detector, such as GeneralizedRCNN" if is_one_stage else "LibraRetinaNet"
    )
    own_keys = {key for key, *_ in own}
    for key, nothing_new, *_ in other:
        value = get_key(cfg, key)
        if value not in nothing_new and key not in own_keys:
            name = cfg.MODEL.META_ARCHITECTURE
            raise ValueError(f"{key} {value} needs {_META} {needed}, got {name}")


def _check_two_stage(cfg: CfgNode) -> None:
    choose("MODEL.RPN.BBOX_REG_LOSS_TYPE", cfg, BOX_REG_LOSSES[:-1])
    num_bins = cfg.MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS
    if num_bins > MAX_IOU_BINS:
        raise ValueError(
            f"MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS must be at most {MAX_IOU_BINS}, got {num_bins}"
        )
    _check_box_loss(cfg, "ROI_BOX_HEAD")
    if "Cascade" in cfg.MODEL.ROI_HEADS.NAME:
        _check_cascade(cfg)
    for key, values in SOFTMAX_SWITCHES:
        if get_key(cfg, key) in values and cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE:
            raise ValueError(
                f"{key} {get_key(cfg, key)} needs MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE False"
            )
    _check_thresholds(cfg, "RPN")
    _check_thresholds(cfg, "ROI_HEADS")
    floor_iou = cfg.MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU
    if floor_iou >= background_threshold(cfg):
        raise ValueError(
            "MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU must be below the background threshold "
            f"{background_threshold(cfg)}, got {floor_iou}"
        )


def _check_cascade(cfg: CfgNode) -> None:
    options, heads = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(
            f"MODEL.ROI_HEADS.NAME {heads.NAME} needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
        )
    ious = list(options.IOUS)
    if not ious or sorted(ious) != ious or not all(0 < iou <= 1 for iou in ious):
        raise ValueError(
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS must be ascending numbers in (0, 1], got {ious}"
        )
    if list(heads.IOU_THRESHOLDS) != ious[:1]:
        raise ValueError(
            "MODEL.ROI_HEADS.IOU_THRESHOLDS must be the first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS, "
            f"{ious[:1]}, got {heads.IOU_THRESHOLDS}"
        )
    weights = options.BBOX_REG_WEIGHTS
    if len(weights) != len(ious) or not all(_are_box_weights(stage) for stage in weights):
        raise ValueError(
            "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS must be four positive numbers for each of "
            f"the {len(ious)} stages, got {weights}"
        )


def _are_box_weights(value) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 4
        and all(isinstance(x, (int, float)) and 0 < x < 1e6 for x in value)
    )


def _check_retinanet(cfg: CfgNode) -> None:
    options = cfg.MODEL.RETINANET
    _check_box_loss(cfg, "RETINANET")
    _check_thresholds(cfg, "RETINANET")
    for key in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"):
        if get_key(cfg, key):
            raise ValueError(
                f"{key} True needs {_META} of a two-stage detector, such as GeneralizedRCNN, "
                f"got {cfg.MODEL.META_ARCHITECTURE}"
            )
    levels = list(options.IN_FEATURES)
    if levels != sorted(set(levels), key=lambda name: (len(name), name)):
        raise ValueError(
            "MODEL.RETINANET.IN_FEATURES must be levels of the pyramid, the finest first and each "
            f"once, got {levels}"
        )
    if not 0.0 < options.PRIOR_PROB < 1.0:
        raise ValueError(
            f"MODEL.RETINANET.PRIOR_PROB must be between 0 and 1, got {options.PRIOR_PROB}"
        )
    if not options.FOCAL_LOSS_ALPHA <= 1.0:
        raise ValueError(
            "MODEL.RETINANET.FOCAL_LOSS_ALPHA must be in [0, 1], or negative for no balance, "
            f"got {options.FOCAL_LOSS_ALPHA}"
        )
    for name in ("FOCAL_LOSS_GAMMA", "BBOX_REG_LOSS_WEIGHT", "SMOOTH_L1_LOSS_BETA"):
        if not 0.0 <= options[name] < 1e6:
            raise ValueError(
                f"MODEL.RETINANET.{name} must not be negative, or huge, got {options[name]}"
            )
    if options.MATCHER == "mutual_guidance":
        if list(options.IOU_LABELS) != [0, -1, 1]:
            raise ValueError(
                "MODEL.RETINANET.IOU_THRESHOLDS must be two for MATCHER mutual_guidance, and "
                f"IOU_LABELS [0, -1, 1]; got {options.IOU_THRESHOLDS} and {options.IOU_LABELS}"
            )
        negative_iou, positive_iou = options.IOU_THRESHOLDS
        try:
            check_mutual_guidance(positive_iou, negative_iou, options.MUTUAL_GUIDANCE.SIGMA)
        except ValueError as error:
            keys = "MODEL.RETINANET's IOU_THRESHOLDS or MUTUAL_GUIDANCE.SIGMA"
            raise ValueError(f"{keys}: {error}") from None


def _check_box_loss(cfg: CfgNode, head: str) -> None:
    """Checks the box loss of a head, and the weights of its deltas."""
    if not _are_box_weights(cfg.MODEL[head].BBOX_REG_WEIGHTS):
        raise ValueError(
            f"MODEL.{head}.BBOX_REG_WEIGHTS must be four positive numbers, "
            f"got {cfg.MODEL[head].BBOX_REG_WEIGHTS}"
        )
    choose(f"MODEL.{head}.BBOX_REG_LOSS_TYPE", cfg, BOX_REG_LOSSES)
    try:
        check_balanced_l1(**balanced_l1_options(cfg, cfg.MODEL[head]))
    except ValueError as error:
        raise ValueError(f"MODEL.{head}.BALANCED_L1: {error}") from None


def _check_thresholds(cfg: CfgNode, name: str) -> None:
    thresholds, labels = cfg.MODEL[name].IOU_THRESHOLDS, cfg.MODEL[name].IOU_LABELS
    if len(labels) != len(thresholds) + 1:
        raise ValueError(
            f"MODEL.{name}.IOU_LABELS must be one more than the {len(thresholds)} "
            f"IOU_THRESHOLDS, got {len(labels)}"
        )
    if not all(isinstance(value, (int, float)) and 0 < value <= 1 for value in thresholds) or (
        not thresholds or sorted(thresholds) != list(thresholds)
    ):
        raise ValueError(
            f"MODEL.{name}.IOU_THRESHOLDS must be ascending numbers in (0, 1], got {thresholds}"
        )
    if any(label not in (-1, 0, 1) for label in labels):
        raise ValueError(
            f"MODEL.{name}.IOU_LABELS must be 0 (negative), -1 (ignored) or 1 (positive), "
            f"got {labels}"
        )
