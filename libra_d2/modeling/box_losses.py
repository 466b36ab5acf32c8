"""Box regression losses of each predicted box, by their names in the config.

Shape shorthand in this module:

    P: number of positives, combined over all images
"""

from collections.abc import Callable
from functools import partial

from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

from libra_d2.losses import balanced_l1_loss

__all__ = ["BOX_LOSSES", "BoxLoss"]

# (transform, deltas (P, 4), source boxes (P, 4), ground truths (P, 4)) -> (P, 4) or (P,)
BoxLoss = Callable[[Box2BoxTransform, Tensor, Tensor, Tensor], Tensor]


def _of_deltas(loss: Callable[[Tensor, Tensor], Tensor]) -> BoxLoss:
    """A loss that compares deltas: (P, 4)."""
    return lambda transform, deltas, boxes, gt_boxes: loss(
        deltas, transform.get_deltas(boxes, gt_boxes)
    )


def _of_boxes(loss: Callable[[Tensor, Tensor], Tensor]) -> BoxLoss:
    """A loss that compares decoded boxes: (P,)."""
    return lambda transform, deltas, boxes, gt_boxes: loss(
        transform.apply_deltas(deltas, boxes), gt_boxes
    )


# A loss a line: how it is made from smooth L1's beta and the options of balanced L1.
BOX_LOSSES: dict[str, Callable[[float, dict], BoxLoss]] = {
    "smooth_l1": lambda beta, _: _of_deltas(partial(smooth_l1_loss, beta=beta)),
    "giou": lambda *_: _of_boxes(giou_loss),
    "diou": lambda *_: _of_boxes(diou_loss),
    "ciou": lambda *_: _of_boxes(ciou_loss),
    "balanced_l1": lambda _, options: _of_deltas(partial(balanced_l1_loss, **options)),
}
