"""Classification losses of a one-stage detector, by their names in the config.

Shape shorthand in this module:

    N: number of images
    R: number of anchors of an image
    K: number of classes
    V: number of anchors that are trained on, combined over all images
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.config import CfgNode
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor

from libra_d2.losses import focal_loss
from libra_d2.sampling import sample_hard, sample_hard_nms

__all__ = ["CLASSIFICATION_LOSSES", "ClassificationLoss", "HardAnchors"]

# (logits (V, K), targets (V, K) of 0 and 1, reduction) -> (V, K), or a scalar if reduced
Elementwise = Callable[..., Tensor]


@dataclass
class ClassificationLoss:
    """A loss of each anchor and class, and which anchors are trained on.

    Args:
        elementwise: see above.
        hard_anchors: chooses the anchors; None for all.
    """

    elementwise: Elementwise
    hard_anchors: "HardAnchors | None" = None

    def choose(self, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        """``labels``, (N, R), with -1 for anchors that are not to be trained on.

        Args:
            logits: (N, R, K).
            labels: (N, R) int64 in [-1, K]; -1 ignored, K background.
            anchors: (R, 4) in pixels.
        """
        if self.hard_anchors is None:
            return labels
        return self.hard_anchors(logits, labels, anchors)

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss, summed over anchors and classes.

        Args:
            logits: (N, R, K).
            labels: see :meth:`choose`.
            weights: of each anchor, (N, R); None for 1.
        """
        trained = labels >= 0
        logits, labels = logits[trained], labels[trained]
        if weights is None:
            return self.elementwise(logits, one_hot(labels, logits), reduction="sum")
        return (self.of_anchors(logits, labels) * weights[trained]).sum()

    def of_anchors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each anchor, (V,), from logits (V, K) and labels (V,)."""
        return anchor_losses(self.elementwise, logits, labels)


def anchor_losses(elementwise: Elementwise, logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of each anchor, (V,), summed over classes, from logits (V, K) and labels (V,)."""
    return elementwise(logits, one_hot(labels, logits), reduction="none").sum(dim=1)


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Targets of the shape and type of ``logits``; background has none."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    return (labels.unsqueeze(-1) == classes).to(logits.dtype)


class HardAnchors:
    """OHEM on anchors: those with the largest losses, after NMS (focal-loss paper, table 1d).

    Args:
        elementwise: the loss they are ranked by, summed over classes.
        num_samples: largest number of anchors of an image.
        nms_thresh: of two anchors of a larger IoU only the harder one is taken.
        negative_positive_ub: the largest number of negatives a positive, which an image without
            positives may have too; -1 for no bound.
    """

    def __init__(
        self,
        elementwise: Elementwise,
        *,
        num_samples: int,
        nms_thresh: float,
        negative_positive_ub: int = -1,
    ):
        self.elementwise = elementwise
        self.num_samples = num_samples
        self.nms_thresh = nms_thresh
        self.negative_positive_ub = negative_positive_ub

    @torch.no_grad()
    def __call__(self, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        """``labels``, (N, R), with -1 for all anchors that are not chosen."""
        kept = [self._choose(*image, anchors) for image in zip(logits, labels, strict=True)]
        return labels.masked_fill(~torch.stack(kept), -1)

    def _choose(self, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        losses = anchor_losses(self.elementwise, logits, labels)
        kept = sample_hard_nms(
            losses, anchors, labels >= 0, self.num_samples, nms_thresh=self.nms_thresh
        )
        if self.negative_positive_ub < 0:
            return kept
        negatives = kept & (labels == logits.shape[-1])
        bound = self.negative_positive_ub * (kept & ~negatives).sum().clamp(min=1)
        return kept & (~negatives | sample_hard(losses, negatives, bound))


def _fvcore_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str
) -> Tensor:
    # A scripted function itself can't be copied, nor could a model that holds it.
    return sigmoid_focal_loss_jit(logits, targets, alpha, gamma, reduction)


def _focal_loss(alpha: float, gamma: float) -> Elementwise:
    # fvcore's, as in detectron2, but where its gradient would not be finite.
    function = focal_loss if 0 < gamma < 1 else _fvcore_focal_loss
    return partial(function, alpha=alpha, gamma=gamma)


def _focal(cfg: CfgNode) -> ClassificationLoss:
    options = cfg.MODEL.RETINANET
    return ClassificationLoss(_focal_loss(options.FOCAL_LOSS_ALPHA, options.FOCAL_LOSS_GAMMA))


def _balanced_ce(cfg: CfgNode) -> ClassificationLoss:
    """Alpha-balanced cross entropy: focal loss that does not focus."""
    return ClassificationLoss(_focal_loss(cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, gamma=0.0))


def _ohem(cfg: CfgNode) -> ClassificationLoss:
    options = cfg.MODEL.RETINANET.OHEM
    cross_entropy = _focal_loss(alpha=-1.0, gamma=0.0)
    return ClassificationLoss(
        cross_entropy,
        HardAnchors(
            cross_entropy,
            num_samples=options.BATCH_SIZE_PER_IMAGE,
            nms_thresh=options.NMS_THRESH,
            negative_positive_ub=options.NEGATIVE_POSITIVE_UB,
        ),
    )


# A loss a line: its name in the config and how it is made from the config.
CLASSIFICATION_LOSSES: dict[str, Callable[[CfgNode], ClassificationLoss]] = {
    "focal": _focal,
    "balanced_ce": _balanced_ce,
    "ohem": _ohem,
}
