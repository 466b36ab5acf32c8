"""What a detector found in a data set, compared with what is there.

Shape shorthand in this module:

    D: number of detections
    G: number of ground truths, of an image
    K: number of classes
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pycocotools import mask as mask_util

__all__ = ["Image", "average_precision", "match", "precision_recall"]

_IOU = 0.5
_RECALLS = np.linspace(0, 1, 101)


@dataclass
class Image:
    """One image: boxes are (N, 4), corners in pixels, classes (N,) from 0, scores (N,)."""

    file: str
    truth_boxes: np.ndarray
    truth_classes: np.ndarray
    crowds: np.ndarray  # (G,) bool: groups, in which any number of detections is right
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    truth_of: np.ndarray = field(init=False)  # (D,): the ground truth found; -1 none, -2 ignored
    ious: np.ndarray = field(init=False)  # (D, G)

    def __post_init__(self):
        order = np.argsort(-self.scores, kind="stable")
        self.boxes, self.scores = self.boxes[order], self.scores[order]
        self.classes = self.classes[order]
        self.ious = _ious(self.boxes, self.truth_boxes, self.crowds)
        self.truth_of = match(self)


def _ious(boxes: np.ndarray, truths: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    if not len(boxes) or not len(truths):
        return np.zeros((len(boxes), len(truths)))
    as_xywh = [np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], axis=1) for x in (boxes, truths)]
    return mask_util.iou(*(x.astype(np.float64) for x in as_xywh), crowds.astype(np.uint8))


def match(image: Image, minimum: float = 0.0, by_class: bool = True) -> np.ndarray:
    """Which ground truth each detection finds, as COCO's evaluation at an IoU of 0.5 has it.

    Args:
        image: whose detections are in the order of their scores.
        minimum: detections that score less find nothing.
        by_class: whether the classes must be the same.

    Returns:
        (D,) int: index of the ground truth; -1 for none, -2 for one that counts neither way.
    """
    found = np.full(len(image.scores), -1)
    taken = np.zeros(len(image.truth_classes), bool)
    for i in range(len(found)):
        if image.scores[i] < minimum:
            continue
        fits = image.ious[i] >= _IOU
        if by_class:
            fits = fits & (image.truth_classes == image.classes[i])
        free = np.flatnonzero(fits & ~taken & ~image.crowds)
        if len(free):
            # The last of equal ones, as COCO's.
            best = free[len(free) - 1 - np.argmax(image.ious[i][free][::-1])]
            taken[best], found[i] = True, best
        elif (fits & image.crowds).any():
            found[i] = -2
    return found


def precision_recall(images: Sequence[Image], number: int) -> np.ndarray:
    """Precision at recalls 0, 0.01, ... 1 of each class, (K, 101); NaN where it has no objects."""
    curves = np.full((number, len(_RECALLS)), np.nan)
    for k in range(number):
        count = sum(int(((x.truth_classes == k) & ~x.crowds).sum()) for x in images)
        own = [(x.classes == k) & (x.truth_of != -2) for x in images]
        scores = np.concatenate([x.scores[o] for x, o in zip(images, own, strict=True)] or [[]])
        right = np.concatenate(
            [x.truth_of[o] >= 0 for x, o in zip(images, own, strict=True)] or [[]]
        )
        if count:
            curves[k] = _curve(scores, right, count)
    return curves


def _curve(scores: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(-scores, kind="mergesort")
    hits = np.cumsum(right[order].astype(float))
    recall = hits / count
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(recall, _RECALLS, side="left")
    return np.where(place < len(hits), np.append(precision, 0.0)[place], 0.0)


def average_precision(scores: np.ndarray, right: np.ndarray, count: int) -> float:
    """AP at one IoU of one class, in percent; NaN where it has no objects."""
    return 100 * float(_curve(scores, right, count).mean()) if count > 0 else float("nan")
