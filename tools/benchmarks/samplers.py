"""Samplers beside detectron2's, a textbook's and, where it is installed, mmdetection's."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from detectron2.modeling.sampling import subsample_labels
from torch import Tensor

from libra_d2.sampling import sample_instance_balanced_positives, sample_iou_balanced_negatives

from .measuring import DEVICE, measure, show

_NUM_GTS, _NUM_CANDIDATES, _NUM_SAMPLES, _MOST_POSITIVES = 20, 2000, 512, 128


def make_matches(num_images: int, num_positives: int) -> tuple[Tensor, Tensor, Tensor]:
    """IoUs, ground-truth indices and mask of positives of each image's proposals."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, _NUM_CANDIDATES) if num_images > 1 else (_NUM_CANDIDATES,)
    ious = torch.rand(shape, generator=generator) ** 3 * 0.5
    ious[..., :num_positives] += 0.5
    gt_indices = torch.randint(_NUM_GTS, shape, generator=generator)
    return ious.to(DEVICE), gt_indices.to(DEVICE), (ious >= 0.5).to(DEVICE)


def sample_both(ious: Tensor, gt_indices: Tensor, positives: Tensor) -> None:
    """Both Libra samplers."""
    num_positives = positives.sum(-1).clamp(max=_MOST_POSITIVES)
    sample_instance_balanced_positives(gt_indices, positives, _MOST_POSITIVES)
    sample_iou_balanced_negatives(ious, ~positives, _NUM_SAMPLES - num_positives)


def sample_by_the_book(ious: Tensor, gt_indices: Tensor, positives: Tensor) -> None:
    """The same of one image, as one would write it first: loops over lists of indices."""
    generator = np.random.default_rng()

    def draw(pool: list[int], strata: list[list[int]], number: int) -> set[int]:
        if len(pool) <= number:
            return set(pool)
        chosen: set[int] = set()
        for stratum in strata:
            size = min(number // len(strata), len(stratum))
            chosen.update(generator.choice(stratum, size, replace=False).tolist())
        rest = [i for i in pool if i not in chosen]
        missing = generator.choice(rest, number - len(chosen), replace=False)
        return chosen | set(missing.tolist())

    ious, gt_indices, positives = (x.cpu().numpy() for x in (ious, gt_indices, positives))
    pool = positives.nonzero()[0]
    own = [pool[gt_indices[pool] == gt].tolist() for gt in np.unique(gt_indices[pool])]
    chosen = draw(pool.tolist(), own, _MOST_POSITIVES)
    pool = (~positives).nonzero()[0]
    bins = np.digitize(ious[pool], (0.5 / 3, 1 / 3))
    draw(pool.tolist(), [pool[bins == k].tolist() for k in range(3)], _NUM_SAMPLES - len(chosen))


def make_mmdetections(ious: Tensor, gt_indices: Tensor, positives: Tensor) -> Callable:
    """mmdetection's samplers of one image.

    Raises:
        ImportError: if it is not installed.
    """
    from mmdet.models.task_modules.assigners import AssignResult
    from mmdet.models.task_modules.samplers import CombinedSampler
    from mmengine.structures import InstanceData

    sampler = CombinedSampler(
        num=_NUM_SAMPLES,
        pos_fraction=_MOST_POSITIVES / _NUM_SAMPLES,
        add_gt_as_proposals=False,
        pos_sampler={"type": "InstanceBalancedPosSampler"},
        neg_sampler={"type": "IoUBalancedNegSampler", "floor_thr": -1, "num_bins": 3},
    )
    labels = torch.zeros_like(gt_indices)
    boxes = InstanceData(priors=torch.rand(_NUM_CANDIDATES, 4, device=ious.device))
    gts = InstanceData(bboxes=boxes.priors[:_NUM_GTS], labels=labels[:_NUM_GTS])
    assigned = torch.where(positives, gt_indices + 1, 0)

    def sample() -> None:
        sampler.sample(AssignResult(_NUM_GTS, assigned, ious, labels=labels), boxes, gts)

    return sample


def benchmark_samplers(repeats: int) -> None:
    rows = []
    for num_positives, calls in itertools.product((60, 400), (20, 1)):
        one, batch = (make_matches(n, num_positives) for n in (1, 16))
        labels = torch.where(one[2], 0, 1)
        fraction = _MOST_POSITIVES / _NUM_SAMPLES
        ways = {
            "random (detectron2)": partial(subsample_labels, labels, _NUM_SAMPLES, fraction, 1),
            "both Libra samplers": partial(sample_both, *one),
            "16 images, one call": partial(sample_both, *batch),
            "a textbook's": partial(sample_by_the_book, *one),
        }
        # Beside an mmcv that it does not know it fails an assertion.
        with contextlib.suppress(ImportError, AssertionError):
            ways["mmdetection's"] = make_mmdetections(*one)
        seconds = measure(ways, repeats=repeats * 20, calls=calls)
        rows.append((num_positives, calls, *(1000 * value for value in seconds.values())))
    title = f"Sampling {_NUM_SAMPLES} of {_NUM_CANDIDATES:,} proposals ({DEVICE}, ms)"
    show(title, rows, ("positives", "calls in a row", *ways))
