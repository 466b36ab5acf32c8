"""detectron2's matching of anchors by their largest IoU, from those pairs alone that overlap.

Shape shorthand in this module:

    N: number of images
    R: number of anchors of an image
"""

from collections.abc import Iterator

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes
from torch import Tensor

from .overlaps import find_overlaps, split_batch
from .samplers import Matches

__all__ = ["match_anchors"]


@torch.no_grad()
def match_anchors(matcher: Matcher, gt_boxes: list[Boxes], anchors: Boxes) -> Iterator[Matches]:
    """What a matcher makes of each image's ``pairwise_iou(gt_boxes, anchors)``, to the bit.

    The matrix of all pairs is never made, which for many objects takes most of the time and memory.
    Images are matched together as far as that takes little memory, so that the host waits for a GPU
    hardly more often than for one.

    Args:
        matcher: detectron2's own, whose thresholds, labels and low-quality matches are read.
        gt_boxes: of each of N images, in pixels.
        anchors: R boxes, the same for all images.

    Yields:
        IoUs, indices and labels, (R,) each, of one image after the other.
    """
    for part in split_batch(gt_boxes, len(anchors)):
        yield from _match(matcher, gt_boxes[part], anchors)


def _match(matcher: Matcher, gt_boxes: list[Boxes], anchors: Boxes) -> Iterator[Matches]:
    overlaps = find_overlaps(gt_boxes, anchors.tensor.unsqueeze(0))
    num_gts, num_columns = overlaps.shape
    (gts, columns), values = overlaps.indices(), overlaps.values()
    ious = values.new_zeros(num_columns).scatter_reduce(0, columns, values, "amax")
    # The first of equal ones, and of those that do not overlap.
    candidates = gts.masked_fill(values != ious.index_select(0, columns), num_gts)
    matched = gts.new_full((num_columns,), num_gts).scatter_reduce(0, columns, candidates, "amin")
    matched = matched.masked_fill(ious == 0, 0)

    labels = torch.ones_like(matched, dtype=torch.int8)
    edges = zip(matcher.thresholds[:-1], matcher.thresholds[1:], strict=True)
    for label, (low, high) in zip(matcher.labels, edges, strict=True):
        labels = labels.masked_fill((ious >= low) & (ious < high), label)
    shape = len(gt_boxes), len(anchors)
    labels = labels.view(shape)
    if matcher.allow_low_quality_matches:
        labels = labels.masked_fill(_are_best(overlaps, gt_boxes, shape), 1)

    first = 0
    images = zip(gt_boxes, ious.view(shape), matched.view(shape), labels, strict=True)
    for boxes, of_anchors, index, label in images:
        yield Matches(of_anchors, (index - first).clamp(min=0), label)
        first += len(boxes)


def _are_best(overlaps: Tensor, gt_boxes: list[Boxes], shape: tuple[int, int]) -> Tensor:
    """Whether an anchor is among the best of some ground truth, (N, R) bool."""
    (gts, columns), values = overlaps.indices(), overlaps.values()
    highest = values.new_zeros(len(overlaps)).scatter_reduce(0, gts, values, "amax")
    # Numbers, as to choose columns by a mask would make the host wait for a GPU.
    is_best = (values == highest.index_select(0, gts)).to(torch.int8)
    are_best = torch.zeros(overlaps.shape[1], dtype=torch.int8, device=values.device)
    are_best = are_best.scatter_reduce(0, columns, is_best, "amax").view(shape) == 1
    # All anchors are the best of a ground truth that overlaps none, as detectron2 has it.
    images = highest.split([len(boxes) for boxes in gt_boxes])
    overlaps_none = torch.stack([(of_image == 0).any() for of_image in images])
    return are_best | overlaps_none.unsqueeze(1)
