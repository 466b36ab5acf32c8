"""Box regression losses of each predicted box, in a registry.

Shape shorthand in this module:

    P: number of positives, combined over all images
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from detectron2.config import CfgNode
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

from libra_d2.config import settle
from libra_d2.losses import balanced_l1_loss
from libra_d2.losses.balanced_l1 import check_balanced_l1

from .switches import SwitchRegistry, from_keys

__all__ = [
    "BOX_LOSSES",
    "DETECTRON2S",
    "BalancedL1",
    "BoxLoss",
    "CIoU",
    "DIoU",
    "DecodedLoss",
    "DeltaLoss",
    "GIoU",
    "SmoothL1",
    "detectron2s_box_loss",
]

_HEADS = ("ROI_BOX_HEAD", "RPN", "RETINANET")
BOX_LOSSES = SwitchRegistry("BOX_LOSSES", [f"MODEL.{h}.BBOX_REG_LOSS_TYPE" for h in _HEADS])

# (transform, deltas (P, 4), source boxes (P, 4), ground truths (P, 4)) -> (P, 4) or (P,)
BoxLoss = Callable[[Box2BoxTransform, Tensor, Tensor, Tensor], Tensor]


class DeltaLoss:
    """A loss that compares deltas: subclasses have :meth:`compare`."""

    def compare(self, deltas: Tensor, targets: Tensor) -> Tensor:
        """(P, 4) of predicted and wanted deltas, (P, 4) each."""
        raise NotImplementedError

    def __call__(
        self, transform: Box2BoxTransform, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor
    ) -> Tensor:
        return self.compare(deltas, transform.get_deltas(boxes, gt_boxes))


class DecodedLoss:
    """A loss that compares decoded boxes: subclasses have :meth:`compare`."""

    def compare(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """(P,) of predicted boxes and ground truths, (P, 4) each."""
        raise NotImplementedError

    def __call__(
        self, transform: Box2BoxTransform, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor
    ) -> Tensor:
        return self.compare(transform.apply_deltas(deltas, boxes), gt_boxes)


@BOX_LOSSES.register(name="smooth_l1")
@dataclass(frozen=True, kw_only=True)
class SmoothL1(DeltaLoss):
    """detectron2's default.

    Args:
        beta: where the quadratic part ends, in units of deltas; 0 for L1.

    Raises:
        ValueError: if beta is negative or huge.
    """

    beta: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.beta < 1e6:
            raise ValueError(f"beta must not be negative, or huge, got {self.beta}")

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "SmoothL1":
        prefix = "SMOOTH_L1_LOSS_" if head == "RETINANET" else "SMOOTH_L1_"
        return from_keys(cls, cfg, f"MODEL.{head}", prefix=prefix)

    def compare(self, deltas: Tensor, targets: Tensor) -> Tensor:
        return smooth_l1_loss(deltas, targets, beta=self.beta)


@BOX_LOSSES.register(name="giou")
@dataclass(frozen=True)
class GIoU(DecodedLoss):
    """Generalized IoU (Rezatofighi et al., CVPR 2019)."""

    def compare(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        return giou_loss(boxes, gt_boxes)


@BOX_LOSSES.register(name="diou")
@dataclass(frozen=True)
class DIoU(DecodedLoss):
    """Distance IoU (Zheng et al., AAAI 2020)."""

    def compare(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        return diou_loss(boxes, gt_boxes)


@BOX_LOSSES.register(name="ciou")
@dataclass(frozen=True)
class CIoU(DecodedLoss):
    """Complete IoU (Zheng et al., AAAI 2020)."""

    def compare(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        return ciou_loss(boxes, gt_boxes)


@BOX_LOSSES.register(name="balanced_l1")
@dataclass(frozen=True, kw_only=True)
class BalancedL1(DeltaLoss):
    """Balanced L1 (Libra R-CNN, section 3.3); its arguments are those of
    :func:`libra_d2.losses.balanced_l1_loss`.

    Raises:
        ValueError: if one is out of its range.
    """

    alpha: float = 0.5
    gamma: float = 1.5
    beta: float = 1.0
    reference: str = "paper"

    def __post_init__(self):
        check_balanced_l1(self.alpha, self.gamma, self.beta, self.reference)
        if self.reference == "mmdet" and self.beta > 1:
            raise ValueError(
                f"beta must be at most 1 in mmdetection's form, which is negative for small errors "
                f"otherwise; got {self.beta}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "BalancedL1":
        group = f"MODEL.{head}.BALANCED_L1"
        reference = settle(f"{group}.FORM", cfg, paper="paper", mmdet="mmdet")
        return from_keys(cls, cfg, group, reference=reference)

    def compare(self, deltas: Tensor, targets: Tensor) -> Tensor:
        return balanced_l1_loss(deltas, targets, **asdict(self))


# Those that detectron2's own classes know too.
DETECTRON2S = {"smooth_l1": SmoothL1, "giou": GIoU, "diou": DIoU, "ciou": CIoU}


def detectron2s_box_loss(name: str, smooth_l1_beta: float) -> BoxLoss:
    """What detectron2's own ``box_reg_loss_type`` and ``smooth_l1_beta`` stand for.

    Raises:
        ValueError: if there is no such loss; it names those there are.
    """
    if name not in DETECTRON2S:
        raise ValueError(
            f"box_reg_loss_type must be one of {', '.join(DETECTRON2S)}, got '{name}'; "
            "give any other loss as box_loss"
        )
    return SmoothL1(beta=smooth_l1_beta) if name == "smooth_l1" else DETECTRON2S[name]()
