"""Every config key this project adds, with its default and its paper; and how keys are read."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from detectron2.config import CfgNode

__all__ = [
    "NUM_CLASSES",
    "add_libra_config",
    "choose",
    "get_key",
    "list_keys",
    "set_key",
    "settle",
    "suggest",
]

T = TypeVar("T")

# Those of two-stage and of one-stage detectors.
NUM_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")


def add_libra_config(cfg: CfgNode) -> None:
    """Adds the keys of libra_d2 to a detectron2 config, in place.

    With all of them at their defaults a model computes what detectron2's own computes. Keys that
    are "auto" are settled by ``MODEL.LIBRA.REFERENCE``.
    """
    # Which reading to follow where a paper and mmdetection differ: "paper" or "mmdet".
    cfg.MODEL.LIBRA = CfgNode()
    cfg.MODEL.LIBRA.REFERENCE = "paper"
    _add_bfp(cfg)
    _add_rpn(cfg)
    _add_roi_heads(cfg)
    _add_pisa(cfg)
    _add_retinanet(cfg)
    _add_training(cfg)
    _add_following(cfg)
    _add_speed(cfg)


def _add_bfp(cfg: CfgNode) -> None:
    """Balanced feature pyramid (Libra R-CNN, section 3.2): BACKBONE.NAME build_bfp_backbone."""
    cfg.MODEL.BFP = CfgNode()
    # False for the plain pyramid of FPN_BUILDER.
    cfg.MODEL.BFP.ENABLED = True
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


def _add_rpn(cfg: CfgNode) -> None:
    """RPN: PROPOSAL_GENERATOR.NAME LibraRPN. BBOX_REG_LOSS_TYPE may be "balanced_l1"."""
    # At most this many negatives a positive, and at least this many in all; -1 for no limit.
    cfg.MODEL.RPN.NEGATIVE_POSITIVE_UB = -1
    # What losses are divided by: "batch_size", BATCH_SIZE_PER_IMAGE times the images, or "sampled",
    # the anchors really sampled. "auto": the latter where negatives are bounded, or with "mmdet".
    cfg.MODEL.RPN.LOSS_NORMALIZER = "auto"
    # As for the ROI heads, of those that need no predictions (Libra R-CNN, table 3).
    cfg.MODEL.RPN.POSITIVE_SAMPLER = "random"
    cfg.MODEL.RPN.NEGATIVE_SAMPLER = "random"
    # Of NEGATIVE_SAMPLER "iou_balanced".
    cfg.MODEL.RPN.IOU_BALANCED = _iou_balanced()
    # Of BBOX_REG_LOSS_TYPE "balanced_l1".
    cfg.MODEL.RPN.BALANCED_L1 = _balanced_l1(beta=1.0)


def _add_roi_heads(cfg: CfgNode) -> None:
    """Sampling and box loss (Libra R-CNN, sections 3.1 and 3.3): ROI_HEADS.NAME Libra..."""
    # "random", "instance_balanced" or "ohem".
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER = "random"
    # "random", "iou_balanced", "ohem" or "score_hlr" (PISA's ISR-N).
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = "random"
    # Of NEGATIVE_SAMPLER "iou_balanced".
    cfg.MODEL.ROI_HEADS.IOU_BALANCED = _iou_balanced()
    # Of BBOX_REG_LOSS_TYPE "balanced_l1".
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_L1 = _balanced_l1(beta=1.0)
    # Former names of MODEL.PISA.ISR_NEGATIVE's keys; they count if they are given.
    cfg.MODEL.ROI_HEADS.SCORE_HLR = CfgNode()
    for name in ("SCORE_THRESH", "NMS_THRESH", "K", "BIAS"):
        cfg.MODEL.ROI_HEADS.SCORE_HLR[name] = None


def _iou_balanced() -> CfgNode:
    options = CfgNode()
    # Of IoU, each of which gives as many negatives (Libra R-CNN, table 4).
    options.NUM_BINS = 3
    # Negatives below this IoU form a set of their own; 0 for none.
    options.FLOOR_IOU = 0.0
    # The share of the negatives that this set gives.
    options.FLOOR_FRACTION = 0.0
    # Where the bins end: "background", the matcher's threshold (paper), or "image_max", the largest
    # IoU of the image (mmdet).
    options.UPPER_IOU = "auto"
    return options


def _balanced_l1(beta: float) -> CfgNode:
    options = CfgNode()
    # The smaller, the more gradient small errors have (Libra R-CNN, equation 8 and table 6).
    options.ALPHA = 0.5
    # The gradient of large errors (the same).
    options.GAMMA = 1.5
    # Up to which error it bends; 1 in the paper, 0.11 in the published Libra RetinaNet.
    options.BETA = beta
    # What it is with a BETA other than 1: "paper" or "mmdet".
    options.FORM = "auto"
    return options


def _add_pisa(cfg: CfgNode) -> None:
    """Prime Sample Attention: ROI_HEADS.NAME Libra..., META_ARCHITECTURE LibraRetinaNet."""
    cfg.MODEL.PISA = CfgNode()
    # Of the weights of positives (BIAS + (1 - BIAS) u) ** K, u falling from 1 at the first rank.
    cfg.MODEL.PISA.ISR_POSITIVE = CfgNode()
    # ISR-P (section 4.1): positives weigh by their IoU rank.
    cfg.MODEL.PISA.ISR_POSITIVE.ENABLED = False
    # The power: the larger, the less the last ranks weigh.
    cfg.MODEL.PISA.ISR_POSITIVE.K = 2.0
    # The weight of the last rank, before the power.
    cfg.MODEL.PISA.ISR_POSITIVE.BIAS = 0.0
    # Of ISR-N (section 4.2), NEGATIVE_SAMPLER "score_hlr": negatives weigh by rank as above.
    cfg.MODEL.PISA.ISR_NEGATIVE = CfgNode()
    # ISR-N (section 4.2), NEGATIVE_SAMPLER "score_hlr": negatives that score more are ranked.
    cfg.MODEL.PISA.ISR_NEGATIVE.SCORE_THRESH = 0.05
    # The IoU from which boxes are of one cluster.
    cfg.MODEL.PISA.ISR_NEGATIVE.NMS_THRESH = 0.5
    # As for ISR-P.
    cfg.MODEL.PISA.ISR_NEGATIVE.K = 0.5
    cfg.MODEL.PISA.ISR_NEGATIVE.BIAS = 0.0
    # Of the weights (BIAS + (1 - BIAS) p) ** K, p the predicted probability of the true class.
    cfg.MODEL.PISA.CARL = CfgNode()
    # CARL (section 4.3): box losses weigh by the predicted probability of the true class.
    cfg.MODEL.PISA.CARL.ENABLED = False
    # The power of that weight.
    cfg.MODEL.PISA.CARL.K = 1.0
    # The weight at a probability of 0, before the power.
    cfg.MODEL.PISA.CARL.BIAS = 0.2


def _add_retinanet(cfg: CfgNode) -> None:
    """RetinaNet: META_ARCHITECTURE LibraRetinaNet. BBOX_REG_LOSS_TYPE may be "balanced_l1"."""
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
    # Of BBOX_REG_LOSS_TYPE "balanced_l1".
    cfg.MODEL.RETINANET.BALANCED_L1 = _balanced_l1(beta=0.11)
    # Factor of the box loss; 0.25 in Mutual Guidance's code.
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0
    # "max_iou" or "mutual_guidance" (ACCV 2020), which reads IOU_THRESHOLDS too.
    cfg.MODEL.RETINANET.MATCHER = "max_iou"
    cfg.MODEL.RETINANET.MUTUAL_GUIDANCE = CfgNode()
    # Greater than 1; the larger, the less the predicted scores matter for box regression.
    cfg.MODEL.RETINANET.MUTUAL_GUIDANCE.SIGMA = 2.0
    # What P7 is made from: "relu" of P6 (paper, detectron2) or P6 itself, "none" (mmdet).
    cfg.MODEL.RETINANET.P7_ACTIVATION = "auto"
    # When predicted boxes are clipped to the image: "after_nms" (paper, detectron2) or "before_nms"
    # (mmdet), where those outside of it are dropped.
    cfg.MODEL.RETINANET.CLIP_BOXES = "auto"


def _add_training(cfg: CfgNode) -> None:
    """Optimizer, epochs and classes; a ResNet small enough for a CPU, build_small_resnet_..."""
    cfg.MODEL.SMALL_RESNET = CfgNode()
    # Output channels of the stages res2 .. res5, each of one basic block.
    cfg.MODEL.SMALL_RESNET.OUT_CHANNELS = [32, 64, 96, 128]
    # "SGD" or "AdamW" (BASE_LR and WEIGHT_DECAY are read by both).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # In epochs what MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD are in
    # iterations, which it settles by the number of training images; 0 (or none) where those count.
    cfg.SOLVER.MAX_EPOCHS = 0.0
    cfg.SOLVER.STEP_EPOCHS = ()
    cfg.SOLVER.WARMUP_EPOCHS = 0.0
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0
    cfg.TEST.EVAL_EPOCHS = 0.0
    # Names of the model's classes, in its order; empty for those of the training data.
    cfg.DATASETS.CLASS_NAMES = []
    # "refuse" boxes of negative size, which tell of a mistake, or "drop" them. Those without extent
    # or outside of their image are left out either way; a data set of another format is refused.
    cfg.DATASETS.ON_BAD_BOXES = "refuse"
    # Whether annotations may name images that are not below the data set's folder.
    cfg.DATASETS.ALLOW_OUTSIDE = False
    # How many images that can't be read a training leaves out before it stops.
    cfg.DATALOADER.MAX_BAD_IMAGES = 0
    # Iterations between two lines of the log.
    cfg.SOLVER.LOG_PERIOD = 20
    # How many of the numbered checkpoints stay, the last ones; 0 for all.
    cfg.SOLVER.MAX_TO_KEEP = 0
    # How many steps whose losses or gradients are not finite it leaves out before it stops.
    cfg.SOLVER.MAX_SKIPPED = 0


def _add_following(cfg: CfgNode) -> None:
    """What a run shows of itself (docs/runs.md)."""
    # Of the moving average of weights.
    cfg.SOLVER.EMA = CfgNode()
    # Whether a moving average of the weights is what is evaluated and saved as the model.
    cfg.SOLVER.EMA.ENABLED = False
    # The share of it that a step keeps; less in the first steps.
    cfg.SOLVER.EMA.DECAY = 0.9998
    # Logs grad_norm, the gradients' norm before they are clipped.
    cfg.SOLVER.LOG_GRAD_NORM = False
    # The metric of an evaluation, such as "bbox/AP", whose best keeps model_best.pth; of a loss,
    # such as "validation/total_loss", the lowest is best. Empty for none.
    cfg.TEST.BEST_METRIC = ""
    # After how many evaluations without a better one the run ends; 0 for never.
    cfg.TEST.PATIENCE = 0
    # Whether evaluations measure the losses too, as validation/...
    cfg.TEST.LOSSES = False
    # Whether the AP of each class is logged.
    cfg.TEST.AP_PER_CLASS = True
    # How many images with what is found in them go to TensorBoard at each evaluation.
    cfg.TEST.NUM_SHOWN = 0


def _add_speed(cfg: CfgNode) -> None:
    """What makes a step faster than detectron2's (docs/speed.md)."""
    # Whether to switch on, of what follows, what is safe on the machine at hand; it says what.
    cfg.SOLVER.FAST = False
    # Whether the optimizer's step is one kernel; numbers stay what they are up to rounding.
    cfg.SOLVER.FUSED = False
    # Whether a process keeps the memory it frees, on Linux: a step on a CPU then need not wait for
    # the kernel to clear it again, and memory use stays at its peak.
    cfg.SOLVER.KEEP_MEMORY = False
    # With SOLVER.AMP.ENABLED: "float16", scaled, on GPUs; "bfloat16" there and on CPUs; "auto" is
    # float16 on a GPU, as in detectron2, and bfloat16 on a CPU.
    cfg.SOLVER.AMP.DTYPE = "auto"
    # Whether convolutions see channels as the last dimension, which kernels of today prefer.
    cfg.MODEL.CHANNELS_LAST = False
    # What pools boxes' features on a CPU: "torchvision", as in detectron2, or "sparse", products of
    # sparse matrices, several times as fast; numbers stay what they are up to rounding.
    cfg.MODEL.ROI_ALIGN = "torchvision"
    # What brings images to their size: "pil", as in detectron2, or "torch", which is faster; it
    # smooths as PIL does, and values differ by at most 1 of 255.
    cfg.INPUT.RESIZE = "pil"
    # Whether images wait in pinned memory, from which a GPU copies directly.
    cfg.DATALOADER.PIN_MEMORY = False
    # A folder in which images are kept at their size, for the next epoch and other runs; "": none.
    cfg.DATALOADER.CACHE = ""


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


def settle(key: str, cfg: CfgNode, *, paper: str, mmdet: str) -> str:
    """The value of a key that may be "auto": then it is what ``MODEL.LIBRA.REFERENCE`` asks for.

    Raises:
        ValueError: if the value is neither that nor one of the two.
    """
    own, by_reference = get_key(cfg, key), {"paper": paper, "mmdet": mmdet}
    if own == "auto":
        return choose("MODEL.LIBRA.REFERENCE", cfg, by_reference)
    return choose(key, cfg, ("auto", *by_reference.values()))


def get_key(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def list_keys(cfg: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys and their values, those of groups of keys among them."""
    for key, value in cfg.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from list_keys(value, f"{prefix}{key}.")


def set_key(cfg: CfgNode, key: str, value: Any) -> None:
    """Gives a dotted key a value."""
    *groups, name = key.split(".")
    for group in groups:
        cfg = cfg[group]
    cfg[name] = value


def suggest(word: str, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to ``word``, or nothing if none is near.

    If ``word`` is the end of known keys, it names these.
    """
    known = list(known)
    near = [other for other in known if other.endswith(f".{word}")]
    near = near or difflib.get_close_matches(str(word), known, n=1)
    named = " or ".join(f"'{other}'" for other in near)
    return f" (did you mean {named}?)" if near else ""
