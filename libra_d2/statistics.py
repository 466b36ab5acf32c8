"""What repeated trainings show: means, paired differences and their intervals."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import trange

__all__ = ["Difference", "bootstrap_images", "paired_difference"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference and the interval that holds the true one with 95 % confidence.

    Args:
        mean: of the differences.
        low: lower end of the interval; NaN where there is none.
        high: upper end.
        over: what it is an interval over: "seeds" or "images".
    """

    mean: float
    low: float
    high: float
    over: str = "seeds"

    @property
    def excludes_zero(self) -> bool:
        """Whether chance alone hardly explains it."""
        return self.low > 0 or self.high < 0


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The mean of ``values - baseline``, with Student's t interval over the pairs.

    Args:
        values: a number of each seed, at least one.
        baseline: the baseline's with the same seeds, in the same order.

    Raises:
        ValueError: if they are not as many.
    """
    if len(values) != len(baseline) or not len(values):
        raise ValueError(f"pairs must be complete, got {len(values)} and {len(baseline)}")
    differences = np.subtract(values, baseline)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # of one pair, or without a spread: t has no interval
        return Difference(mean, float("nan"), float("nan"))
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high))


def bootstrap_images(
    annotations: Path,
    results: Path,
    baseline: Path,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    iou_type: str = "bbox",
) -> Difference:
    """The difference in AP of two models, with its bootstrap interval over the images.

    The same images are drawn for both, with replacement, and AP is computed anew each time. It says
    how much these images decide, not how much another seed of training would.

    Args:
        annotations: COCO json of the ground truths.
        results: COCO results of the one model, ``coco_instances_results.json``.
        baseline: those of the other.
        num_resamples: how often images are drawn.
        seed: of the drawing.
        iou_type: "bbox" or "segm".

    Returns:
        In points of AP, 0 to 100.
    """
    one, other = (_evaluate(annotations, file, iou_type) for file in (results, baseline))
    rng = np.random.default_rng(seed)
    num_images = len(one.params.imgIds)

    def difference(images: np.ndarray) -> float:
        return _average_precision(one, images) - _average_precision(other, images)

    progress = trange(num_resamples, desc="drawing images", leave=False, disable=None)
    drawn = [difference(rng.integers(num_images, size=num_images)) for _ in progress]
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    low, high = np.nanquantile(drawn, ends)
    return Difference(difference(np.arange(num_images)), float(low), float(high), "images")


def _evaluate(annotations: Path, results: Path, iou_type: str):
    """detectron2's fast evaluation, of which the parts that make AP are kept an image."""
    from detectron2.evaluation.fast_eval_api import COCOeval_opt
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        found = json.loads(results.read_text())
        evaluation = COCOeval_opt(coco, coco.loadRes(found) if found else COCO(), iou_type)
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    return evaluation


def _average_precision(evaluation, images: np.ndarray) -> float:
    """AP over some images, by their indices, each as often as it is named; NaN without objects."""
    from detectron2 import _C

    parts, num_images = evaluation._evalImgs_cpp, len(evaluation.params.imgIds)
    starts = range(0, len(parts), num_images)  # of each class
    drawn = [parts[start + i] for start in starts for i in images]
    # What its accumulate() calls, of all images and telling of it each time.
    found = _C.COCOevalAccumulate(evaluation._paramsEval, drawn)
    precision = np.array(found["precision"])
    precision = precision[precision > -1]
    return float(precision.mean()) * 100 if precision.size else float("nan")
