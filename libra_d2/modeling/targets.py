"""What anchors are to learn, of the ground truths they are matched with.

Shape shorthand in this module:

    R: number of anchors of an image
"""

import torch
from detectron2.structures import Instances
from torch import Tensor

__all__ = ["take_boxes", "take_classes"]


def take_boxes(gt: Instances, gt_indices: Tensor) -> Tensor:
    """The ground truths that anchors answer to, (R, 4), by indices, (R,); 0 if there are none."""
    boxes = gt.gt_boxes.tensor
    return boxes[gt_indices] if len(boxes) > 0 else boxes.new_zeros(len(gt_indices), 4)


def take_classes(gt: Instances, gt_indices: Tensor, labels: Tensor, background: int) -> Tensor:
    """The classes that anchors are to learn, (R,) int64.

    Args:
        gt: ground truths of the image.
        gt_indices: (R,) int64.
        labels: (R,) int8; 1 positive, 0 negative, -1 ignored.
        background: number of classes. Negatives get it; those that are ignored get -1.
    """
    if len(gt) == 0:
        return torch.full_like(gt_indices, background)
    classes = torch.where(labels == 1, gt.gt_classes[gt_indices], background)
    return classes.masked_fill(labels == -1, -1)
