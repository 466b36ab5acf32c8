"""Kinds of error, and what each costs (TIDE, Bolya et al., ECCV 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scored import Image, average_precision, match

__all__ = ["KINDS", "ErrorKind", "confusion_matrix", "error_kinds"]

_RIGHT, _NEAR = 0.5, 0.1  # IoU from which a box is right, and from which it is about an object
KINDS = {
    "classification": "a right box of the wrong class",
    "localization": f"the right class, IoU {_NEAR} to {_RIGHT}",
    "both": f"the wrong class, IoU {_NEAR} to {_RIGHT}",
    "duplicate": "a second box of an object that is found",
    "background": f"no object of any class by IoU {_NEAR}",
    "missed": "an object that no box is about",
}


@dataclass(frozen=True)
class ErrorKind:
    """One kind of error: how many there are, and how much AP50 would rise without them."""

    name: str
    meaning: str
    number: int
    cost: float


def error_kinds(images: Sequence[Image], number: int) -> list[ErrorKind]:
    """Sorts what is wrong at an IoU of 0.5 into kinds.

    Args:
        images: of a data set.
        number: K, number of classes.
    """
    kinds, targets = zip(*map(_kinds_of, images), strict=True) if images else ((), ())
    missed = [_missed(*parts) for parts in zip(images, kinds, targets, strict=True)]
    found = np.concatenate(kinds) if kinds else np.zeros(0, dtype=object)
    counts = {name: int((found == name).sum()) for name in KINDS}
    counts["missed"] = sum(int(m.sum()) for m in missed)
    whole = _ap50(images, kinds, targets, missed, number, "")
    return [
        ErrorKind(
            name,
            meaning,
            counts[name],
            _ap50(images, kinds, targets, missed, number, name) - whole,
        )
        for name, meaning in KINDS.items()
    ]


def _kinds_of(image: Image) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each detection, "" if it is right or ignored, and the object it is about."""
    kinds = np.full(len(image.scores), "", dtype=object)
    about = np.full(len(image.scores), -1)
    truths = ~image.crowds
    for i in np.flatnonzero(image.truth_of == -1):
        same = np.where(truths & (image.truth_classes == image.classes[i]), image.ious[i], 0.0)
        other = np.where(truths & (image.truth_classes != image.classes[i]), image.ious[i], 0.0)
        best_same, best_other = same.max(initial=0.0), other.max(initial=0.0)
        if _NEAR <= best_same < _RIGHT:
            kinds[i], about[i] = "localization", same.argmax()
        elif best_other >= _RIGHT:
            kinds[i], about[i] = "classification", other.argmax()
        elif best_same >= _RIGHT:
            kinds[i] = "duplicate"
        elif max(best_same, best_other) < _NEAR:
            kinds[i] = "background"
        else:
            kinds[i] = "both"
    return kinds, about


def _missed(image: Image, kinds: np.ndarray, about: np.ndarray) -> np.ndarray:
    """Which objects are neither found nor meant by a detection that another kind is about."""
    missed = ~image.crowds
    missed[image.truth_of[image.truth_of >= 0]] = False
    missed[about[about >= 0]] = False
    return missed


def _ap50(images, kinds, targets, missed, number: int, mended: str) -> float:
    """Mean AP50 over classes when one kind of error is mended."""
    scores, right, classes = [], [], []
    counts = np.zeros(number, dtype=int)
    for image, own, about, lost in zip(images, kinds, targets, missed, strict=True):
        truths = ~image.crowds & ~(lost if mended == "missed" else np.zeros_like(lost))
        counts += np.bincount(image.truth_classes[truths], minlength=number)
        taken = set(image.truth_of[image.truth_of >= 0].tolist())
        for i in range(len(image.scores)):
            is_right, label = image.truth_of[i] >= 0, image.classes[i]
            if image.truth_of[i] == -2:
                continue
            if mended and own[i] == mended:
                if about[i] < 0 or int(about[i]) in taken:
                    continue
                taken.add(int(about[i]))
                is_right, label = True, image.truth_classes[about[i]]
            scores.append(image.scores[i])
            right.append(is_right)
            classes.append(label)
    scores, right, classes = np.array(scores), np.array(right, bool), np.array(classes, int)
    aps = [
        average_precision(scores[classes == k], right[classes == k], int(counts[k]))
        for k in range(number)
        if counts[k]
    ]
    return float(np.mean(aps)) if aps else 0.0


def confusion_matrix(images: Sequence[Image], number: int, minimum: float) -> np.ndarray:
    """Objects by true and predicted class, (K + 1, K + 1) int; the last is background.

    Args:
        images: of a data set.
        number: K, number of classes.
        minimum: the lowest score of what is looked at.
    """
    matrix = np.zeros((number + 1, number + 1), dtype=int)
    for image in images:
        of = match(image, minimum, by_class=False)
        seen = image.scores >= minimum
        for label, truth in zip(image.classes[seen], of[seen], strict=True):
            if truth != -2:
                matrix[image.truth_classes[truth] if truth >= 0 else number, label] += 1
        missed = ~image.crowds
        missed[of[of >= 0]] = False
        for label in image.truth_classes[missed]:
            matrix[label, number] += 1
    return matrix
