"""IoU of those boxes alone that overlap."""

import torch
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["find_overlaps"]

_BLOCK = 64  # boxes that are looked at together, or not at all
_AT_ONCE = 2**18  # boxes compared in one step: 4 MiB of coordinates


@torch.no_grad()
def find_overlaps(gt_boxes: Boxes, boxes: Boxes) -> Tensor:
    """What detectron2's ``pairwise_iou`` gives, without the pairs that do not overlap.

    Anchors and the boxes predicted from them lie near the neighbours in their list, so that most
    blocks of 64 in a row are passed over as a whole. A crowd's matrix has a few percent of
    the entries of a dense one.

    Args:
        gt_boxes: G boxes, in pixels.
        boxes: A boxes; in any order, but it is fast where neighbours in the list are neighbours in
            the image.

    Returns:
        (G, A) sparse COO, coalesced, of the boxes' dtype.
    """
    num_gts, num_boxes = len(gt_boxes), len(boxes)
    missing = -num_boxes % _BLOCK
    blocks = pad(boxes.tensor, (0, 0, 0, missing)).reshape(-1, _BLOCK, 4)
    areas = pad(boxes.area(), (0, missing)).reshape(-1, _BLOCK)
    gt_areas = gt_boxes.area()
    indices, ious = [], []
    extents = torch.cat([blocks[..., :2].amin(dim=1), blocks[..., 2:].amax(dim=1)], dim=1)
    near = (_intersect(gt_boxes.tensor[:, None], extents) > 0).nonzero()
    for gts, chosen in zip(*(i.split(_AT_ONCE // _BLOCK) for i in near.t()), strict=True):
        shared = _intersect(gt_boxes.tensor[gts, None], blocks[chosen])
        pair, place = (shared > 0).nonzero().t()
        ious.append((shared / (gt_areas[gts, None] + areas[chosen] - shared))[pair, place])
        indices.append(torch.stack([gts[pair], chosen[pair] * _BLOCK + place]))
    return torch.sparse_coo_tensor(
        torch.cat(indices, dim=1),
        torch.cat(ious),
        (num_gts, num_boxes),
        is_coalesced=True,
        check_invariants=False,
    )


def _intersect(boxes: Tensor, others: Tensor) -> Tensor:
    """Area that boxes, (..., 4), have in common."""
    starts = torch.maximum(boxes[..., :2], others[..., :2])
    sides = (torch.minimum(boxes[..., 2:], others[..., 2:]) - starts).clamp(min=0)
    return sides[..., 0] * sides[..., 1]
