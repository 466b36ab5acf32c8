"""Whether a detector's anchors meet the boxes of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .coco_json import Coco, is_crowd
from .inspection import SIZES
from .problems import is_useful

__all__ = ["AnchorRecall", "anchor_recall", "best_ious"]

# The IoU below which a box is hard to learn from its nearest anchor. RPN's positives have 0.7, but
# the best anchor of a box is one in any case.
_MET = 0.5


@dataclass
class AnchorRecall:
    """How well anchors meet boxes.

    Args:
        by_size: share of the boxes that have an anchor with an IoU of 0.5, of each of COCO's sizes,
            and how many boxes there are.
        suggestion: what would be better; empty if few boxes miss.
        min_size: shorter side of the images they are looked for in, in pixels.
    """

    by_size: dict[str, tuple[float, int]]
    suggestion: str
    min_size: int

    def lines(self) -> list[str]:
        """A line of text, and one with the suggestion."""
        shares = ", ".join(f"{name} {r:.0%} of {n}" for name, (r, n) in self.by_size.items() if n)
        text = (
            f"boxes that have an anchor with an IoU of {_MET}, at {self.min_size} pixels: {shares}"
        )
        return [text, *([self.suggestion] if self.suggestion else [])]


def best_ious(
    boxes: Tensor, cell_anchors: Sequence[Tensor], strides: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The largest IoU of each box with any anchor of the grid, as near as a grid point gets.

    Args:
        boxes: (N, 4), corners in pixels of the network's input.
        cell_anchors: (A, 4) of each level, around the origin.
        strides: of each level, in pixels.

    Returns:
        The IoUs, (N,), and what they would be if the anchor had the box's centre, (N,).
    """
    centers, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    best = boxes.new_zeros(2, len(boxes))
    for anchors, stride in zip(cell_anchors, strides, strict=True):
        own = anchors.to(boxes)
        shapes = own[:, 2:] - own[:, :2]
        offsets = centers - (centers / stride).round() * stride
        for i, moved in enumerate((offsets.abs(), torch.zeros_like(offsets))):
            reach = (sizes[:, None] + shapes) / 2 - moved[:, None]
            shared = torch.minimum(torch.minimum(sizes[:, None], shapes), reach).clamp(min=0)
            area = shared.prod(dim=2)
            ious = area / (sizes.prod(dim=1)[:, None] + shapes.prod(dim=1) - area)
            best[i] = torch.maximum(best[i], ious.amax(dim=1))
    return best[0], best[1]


def anchor_recall(
    coco: Coco,
    cell_anchors: Sequence[Tensor],
    strides: Sequence[int],
    *,
    min_size: int,
    max_size: int,
) -> AnchorRecall:
    """How many boxes an anchor meets, once images are resized as for testing.

    Args:
        coco: the data set.
        cell_anchors: (A, 4) of each level, around the origin.
        strides: of each level, in pixels.
        min_size: to which the shorter side of an image is resized, in pixels.
        max_size: the most that the longer side may have then.
    """
    images = {image.id: image for image in coco.images}
    boxes, sides = [], []
    for annotation in coco.annotations or ():
        image = images[annotation.image_id]
        if is_crowd(annotation) or not is_useful(annotation.bbox, image.width, image.height):
            continue
        scale = min_size / min(image.height, image.width)
        scale = min(scale, max_size / max(image.height, image.width))
        x, y, w, h = annotation.bbox
        boxes.append([x * scale, y * scale, (x + w) * scale, (y + h) * scale])
        sides.append((w * h) ** 0.5)
    tensor, sides = torch.tensor(boxes).reshape(-1, 4), np.array(sides)
    ious, centered = best_ious(tensor, cell_anchors, strides)
    met = (ious >= _MET).numpy()
    by_size = {}
    for name, (low, high) in SIZES.items():
        own = (sides >= low) & (sides < high)
        by_size[name] = (float(met[own].mean()) if own.any() else 0.0, int(own.sum()))
    missed = tensor[torch.from_numpy(~met)]
    centered = centered[torch.from_numpy(~met)]
    suggestion = ""
    if len(missed) > 0.1 * len(tensor):
        suggestion = _suggest(missed, centered, cell_anchors)
    return AnchorRecall(by_size, suggestion, min_size)


def _suggest(missed: Tensor, centered: Tensor, cell_anchors: Sequence[Tensor]) -> str:
    """What would meet most of the boxes that no anchor meets."""
    shapes = torch.cat([anchors[:, 2:] - anchors[:, :2] for anchors in cell_anchors])
    areas, ratios = shapes.prod(dim=1), shapes[:, 1] / shapes[:, 0]
    extents = missed[:, 2:] - missed[:, :2]
    own_areas, own_ratios = extents.prod(dim=1), extents[:, 1] / extents[:, 0]
    kinds = {
        "smaller": own_areas < areas.min(),
        "larger": own_areas > areas.max(),
        "flatter": own_ratios < ratios.min(),
        "taller": own_ratios > ratios.max(),
    }
    kind = max(kinds, key=lambda name: int(kinds[name].sum()))
    start = f"{len(missed)} boxes have no anchor; "
    if kinds[kind].float().mean() < 0.3:
        if (centered >= _MET).float().mean() > 0.5:
            return (
                f"{start}most would with anchors nearer to their centres: larger images "
                "(INPUT.MIN_SIZE_TRAIN, MIN_SIZE_TEST) help"
            )
        return (
            f"{start}most lie between the sizes and shapes there are: more sizes a level "
            "(MODEL.ANCHOR_GENERATOR.SIZES) or ratios (ASPECT_RATIOS) help"
        )
    of_kind = kinds[kind]
    if kind in ("smaller", "larger"):
        side = own_areas[of_kind].median().sqrt()
        edge = (areas.min() if kind == "smaller" else areas.max()).sqrt()
        return (
            f"{start}most are {kind} (half of them than {side:.0f} pixels at the network's input) "
            f"than the {'smallest' if kind == 'smaller' else 'largest'} anchor of {edge:.0f}: "
            f"multiply MODEL.ANCHOR_GENERATOR.SIZES by {side / edge:.2g}, or resize images "
            f"{edge / side:.2g} times as large (INPUT.MIN_SIZE_TRAIN, MIN_SIZE_TEST)"
        )
    ratio = own_ratios[of_kind].median()
    edge = ratios.min() if kind == "flatter" else ratios.max()
    return (
        f"{start}most are {kind} than any anchor (height / width {edge:.2g}): add {ratio:.2g} to "
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
    )
