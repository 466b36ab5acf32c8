"""Whether an exported detector finds what the detector finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EXACT", "HALF", "Tolerance", "check_agreement", "compare"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far two detectors may be apart.

    Args:
        score: difference of scores.
        pixels: of coordinates, in pixels.
        relative: the same as a share of the box's longer side; the larger of both counts.
        share: how many of the objects that one finds the other has to find.
        mask: difference of a mask's probabilities.
    """

    score: float
    pixels: float
    relative: float
    share: float
    mask: float


EXACT = Tolerance(score=1e-3, pixels=0.1, relative=1e-3, share=1.0, mask=0.01)
HALF = Tolerance(score=0.1, pixels=2.0, relative=0.1, share=0.9, mask=1.0)


def compare(
    expected: Sequence[Tensor],
    got: Sequence[Tensor],
    tolerance: Tolerance,
    border: float,
    most: int = 100,
) -> tuple[int, str]:
    """Compares what two detectors found in the same images.

    Objects are matched by image, class, score, box and mask, as the order of equal scores is open.
    One whose score is near the lowest that is kept may be missing on either side.

    Args:
        expected: boxes (M, 4), scores (M,), classes (M,), image of each (M,); masks, if any.
        got: the same of the other.
        tolerance: how far they may be apart.
        border: the lowest score that is kept.
        most: how many objects of an image are kept.

    Returns:
        How many objects were expected, and what is wrong; "" if nothing is.
    """
    sides = [[x.detach().cpu() for x in side] for side in (expected, got)]
    for name, one, other in zip(("missing", "too many"), sides, sides[::-1], strict=True):
        counts = one[1] > border + tolerance.score
        for image in one[3].unique():
            of_image = one[3] == image
            if of_image.sum() >= most:  # of those that score alike, others may be cut off
                counts &= ~of_image | (one[1] > one[1][of_image].min() + tolerance.score)
        found = _are_found(one, other, tolerance)[counts]
        if len(found) > 0 and found.float().mean() < tolerance.share:
            return len(expected[1]), f"{int((~found).sum())} of {len(found)} objects are {name}"
    return len(expected[1]), ""


def _are_found(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: Tolerance) -> Tensor:
    """Which objects of the one have a counterpart in the other, (M,) bool."""
    if len(other[1]) == 0:
        return torch.zeros(len(one[1]), dtype=torch.bool)
    boxes, scores, classes, images = one[:4]
    extent = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
    limit = (extent * tolerance.relative).clamp(min=tolerance.pixels)
    near = (boxes[:, None] - other[0][None]).abs().amax(dim=2) <= limit
    near &= (scores[:, None] - other[1][None]).abs() <= tolerance.score
    near &= classes[:, None] == other[2][None]
    near &= images[:, None] == other[3][None]
    if len(one) > 4:
        near &= torch.cdist(one[4].flatten(1), other[4].flatten(1), p=torch.inf) <= tolerance.mask
    return near.any(dim=1)


def check_agreement(
    model: Callable[[Tensor], Sequence[Tensor]],
    exported: Callable[[Tensor], Sequence[Tensor]],
    images: Sequence[Tensor],
    tolerance: Tolerance,
    border: float,
    most: int = 100,
) -> list[dict]:
    """Runs both on images and compares what they find.

    Returns:
        Of each image its height, width and the number of objects found.

    Raises:
        ValueError: if they differ, or nothing was found in any image.
    """
    report = []
    for image in images:
        number, problem = compare(model(image), exported(image), tolerance, border, most)
        height, width = image.shape[-2:]
        if problem:
            raise ValueError(
                f"the exported model does not agree with the model at {width}x{height}: {problem}"
            )
        report.append({"height": height, "width": width, "objects": number})
    if not any(entry["objects"] for entry in report):
        raise ValueError(
            "nothing was found in the images the exported model is compared on, which shows "
            "nothing; name some with objects with --images"
        )
    return report
