"""Classification losses of a one-stage detector, in a registry.

Shape shorthand in this module:

    N: number of images
    R: number of anchors of an image
    K: number of classes
    V: number of anchors that are trained on, combined over all images
"""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor

from libra_d2.losses import focal_loss
from libra_d2.sampling import sample_hard, sample_hard_nms

from .switches import SwitchRegistry, check_bound, from_keys

__all__ = [
    "CLASSIFICATION_LOSSES",
    "BalancedCrossEntropy",
    "ClassificationLoss",
    "FocalLoss",
    "OhemLoss",
]

# Named by MODEL.RETINANET.CLS_LOSS_TYPE.
CLASSIFICATION_LOSSES = SwitchRegistry("CLASSIFICATION_LOSSES", ("MODEL.RETINANET.CLS_LOSS_TYPE",))


class ClassificationLoss:
    """A loss of each anchor and class, and which anchors are trained on.

    Subclasses have :meth:`elementwise`, and :meth:`choose` if they do not train on all.
    """

    def elementwise(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The loss of logits (V, K) and targets (V, K) of 0 and 1: (V, K) for "none"; or "sum"."""
        raise NotImplementedError

    def choose(self, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        """``labels``, (N, R), with -1 for anchors that are not to be trained on.

        Args:
            logits: (N, R, K).
            labels: (N, R) int64 in [-1, K]; -1 ignored, K background.
            anchors: (R, 4) in pixels.
        """
        return labels

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss, summed over anchors and classes.

        Args:
            logits: (N, R, K).
            labels: see :meth:`choose`.
            weights: of each anchor, (N, R); None for 1.
        """
        trained = (labels >= 0).nonzero(as_tuple=True)
        logits, labels = logits[trained], labels[trained]
        if weights is None:
            return self.elementwise(logits, one_hot(labels, logits), reduction="sum")
        return (self.of_anchors(logits, labels) * weights[trained]).sum()

    def of_anchors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each anchor, (V,), summed over classes, from logits (V, K), labels (V,)."""
        return self.elementwise(logits, one_hot(labels, logits), reduction="none").sum(dim=1)


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Targets of the shape and type of ``logits``; background has none."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    return (labels.unsqueeze(-1) == classes).to(logits.dtype)


@CLASSIFICATION_LOSSES.register(name="focal")
@dataclass(frozen=True, kw_only=True)
class FocalLoss(ClassificationLoss):
    """Focal loss (Lin et al., ICCV 2017, equation 5).

    Args:
        alpha: weight of targets of 1, those of 0 having ``1 - alpha``; negative for no weights.
        gamma: how much easy examples are weighed down.

    Raises:
        ValueError: if one is out of its range.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self):
        if not self.alpha <= 1.0:
            raise ValueError(
                f"alpha must be in [0, 1], or negative for no balance, got {self.alpha}"
            )
        if not 0.0 <= self.gamma < 1e6:
            raise ValueError(f"gamma must not be negative, or huge, got {self.gamma}")

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "FocalLoss":
        return from_keys(cls, cfg, f"MODEL.{head}", prefix="FOCAL_LOSS_")

    def elementwise(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        # fvcore's, as in detectron2, but where its gradient would not be finite.
        function = focal_loss if 0 < self.gamma < 1 else sigmoid_focal_loss_jit
        return function(logits, targets, self.alpha, self.gamma, reduction)


@CLASSIFICATION_LOSSES.register(name="balanced_ce")
@dataclass(frozen=True, kw_only=True)
class BalancedCrossEntropy(FocalLoss):
    """Alpha-balanced cross entropy: focal loss that does not focus."""

    gamma: float = 0.0

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "BalancedCrossEntropy":
        return from_keys(cls, cfg, f"MODEL.{head}", prefix="FOCAL_LOSS_", gamma=0.0)


@CLASSIFICATION_LOSSES.register(name="ohem")
@dataclass(frozen=True, kw_only=True)
class OhemLoss(ClassificationLoss):
    """Cross entropy of the hardest anchors after NMS (focal-loss paper, table 1d).

    Args:
        batch_size_per_image: largest number of anchors of an image.
        nms_thresh: of two anchors of a larger IoU only the harder one is taken, in [0, 1].
        negative_positive_ub: the largest number of negatives a positive, which an image without
            positives may have too; -1 for no bound.

    Raises:
        ValueError: if one is out of its range.
    """

    batch_size_per_image: int = 512
    nms_thresh: float = 0.7
    negative_positive_ub: int = -1

    def __post_init__(self):
        if self.batch_size_per_image < 1:
            raise ValueError(
                f"batch_size_per_image must be at least 1, got {self.batch_size_per_image}"
            )
        if not 0.0 <= self.nms_thresh <= 1.0:
            raise ValueError(f"nms_thresh must be in [0, 1], got {self.nms_thresh}")
        check_bound(self.negative_positive_ub)

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "OhemLoss":
        return from_keys(cls, cfg, f"MODEL.{head}.OHEM")

    def elementwise(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return sigmoid_focal_loss_jit(logits, targets, -1.0, 0.0, reduction)

    @torch.no_grad()
    def choose(self, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        kept = [self._choose(*image, anchors) for image in zip(logits, labels, strict=True)]
        return labels.masked_fill(~torch.stack(kept), -1)

    def _choose(self, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        losses = self.of_anchors(logits, labels)
        kept = sample_hard_nms(
            losses, anchors, labels >= 0, self.batch_size_per_image, nms_thresh=self.nms_thresh
        )
        if self.negative_positive_ub < 0:
            return kept
        negatives = kept & (labels == logits.shape[-1])
        bound = self.negative_positive_ub * (kept & ~negatives).sum().clamp(min=1)
        return kept & (~negatives | sample_hard(losses, negatives, bound))
