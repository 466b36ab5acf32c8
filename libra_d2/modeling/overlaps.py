"""IoU of those boxes alone that overlap."""

from collections.abc import Iterator

import torch
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["find_overlaps", "make_sparse", "split_batch"]

_BLOCK = 64  # boxes that are looked at together, or not at all
# Boxes compared in one step: 4 MiB of coordinates on a CPU; 64 on a GPU, which is waited for once
# in each step.
_AT_ONCE, _AT_ONCE_ON_GPU = 2**18, 2**22
# Pairs, overlapping or not, of the images that are taken together: 64 objects and the anchors of
# 800x1333 pixels. On a CPU, which is not waited for, that would only take memory.
_PAIRS_AT_ONCE, _PAIRS_AT_ONCE_ON_GPU = 0, 2**24


def split_batch(gt_boxes: list[Boxes], num_boxes: int) -> Iterator[slice]:
    """The images whose overlaps are best found together; one has any number of pairs.

    Args:
        gt_boxes: of each of N images, at least one.
        num_boxes: of an image, that are compared with them.
    """
    on_cpu = gt_boxes[0].device.type == "cpu"
    most = _PAIRS_AT_ONCE if on_cpu else _PAIRS_AT_ONCE_ON_GPU
    first, num_pairs = 0, 0
    for image, boxes in enumerate(gt_boxes):
        num_pairs += len(boxes) * num_boxes
        if image > first and num_pairs > most:
            yield slice(first, image)
            first, num_pairs = image, len(boxes) * num_boxes
    yield slice(first, len(gt_boxes))


@torch.no_grad()
def find_overlaps(gt_boxes: list[Boxes], boxes: Tensor) -> Tensor:
    """What detectron2's ``pairwise_iou`` gives in each image, without pairs that do not overlap.

    Anchors and the boxes predicted from them lie near the neighbours in their list, so that most
    blocks of 64 in a row are passed over as a whole. A crowd's matrix has a few percent of
    the entries of a dense one. The host waits for a GPU hardly more often than for an image.

    Args:
        gt_boxes: of each of N images, G in all, in pixels.
        boxes: of each image, (N, R, 4), or (1, R, 4) if all have the same; in any order, but it is
            fast where neighbours in the list are neighbours in the image.

    Returns:
        (G, N * R) sparse COO, coalesced, of the boxes' dtype; R columns an image.
    """
    num_images, (num_sets, num_boxes, _) = len(gt_boxes), boxes.shape
    blocks = pad(boxes, (0, 0, 0, -num_boxes % _BLOCK)).reshape(num_sets, -1, _BLOCK, 4)
    extents = torch.cat([blocks[..., :2].amin(dim=2), blocks[..., 2:].amax(dim=2)], dim=2)
    near = [
        _intersect(of_image.tensor[:, None], extent) > 0
        for of_image, extent in zip(gt_boxes, extents.expand(num_images, -1, -1), strict=True)
    ]
    near = torch.cat(near).nonzero().t()

    gts = Boxes.cat(gt_boxes)
    images = [near.new_full((len(of_image),), i) for i, of_image in enumerate(gt_boxes)]
    images = torch.cat(images)
    blocks = blocks.flatten(end_dim=1)  # of all sets, num_blocks each
    num_blocks = len(blocks) // num_sets
    gt_areas, areas = gts.area(), Boxes(blocks.flatten(end_dim=1)).area().reshape(-1, _BLOCK)
    at_once = _AT_ONCE if boxes.device.type == "cpu" else _AT_ONCE_ON_GPU
    rows, columns, ious = [], [], []
    for gt, block in near.split(at_once // _BLOCK, dim=1):
        # index_select takes a fraction of the time of brackets.
        image = images.index_select(0, gt)
        chosen = image % num_sets * num_blocks + block  # of the only set, or of the image's
        own = gts.tensor.index_select(0, gt).unsqueeze(1)
        shared = _intersect(own, blocks.index_select(0, chosen))
        union = gt_areas.index_select(0, gt).unsqueeze(1) + areas.index_select(0, chosen) - shared
        overlapping = (shared > 0).flatten().nonzero()[:, 0]
        ious.append((shared / union).flatten().index_select(0, overlapping))
        pair, place = overlapping // _BLOCK, overlapping % _BLOCK
        rows.append(gt.index_select(0, pair))
        columns.append((image * num_boxes + block * _BLOCK).index_select(0, pair) + place)
    shape = len(gts), num_images * num_boxes
    return make_sparse(torch.cat(rows + columns).view(2, -1), torch.cat(ious), shape)


# The argument check_invariants does the same, but does not keep torch 2.11 from warning.
@torch.sparse.check_sparse_tensor_invariants(enable=False)
def make_sparse(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse COO matrix of ascending indices, (2, P), none of them twice, and values, (P,)."""
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True)


def _intersect(boxes: Tensor, others: Tensor) -> Tensor:
    """Area that boxes, (..., 4), have in common."""
    starts = torch.maximum(boxes[..., :2], others[..., :2])
    sides = (torch.minimum(boxes[..., 2:], others[..., 2:]) - starts).clamp(min=0)
    return sides[..., 0] * sides[..., 1]
