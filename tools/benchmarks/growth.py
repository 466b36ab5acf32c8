"""How the cost of each part grows with proposals, images, pixels and objects."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from detectron2.modeling.sampling import subsample_labels

from libra_d2.layers import BalancedFeaturePyramid
from libra_d2.ranking import reweight_positives
from libra_d2.sampling import sample_hard, sample_score_hlr_negatives

from .measuring import DEVICE, measure, show
from .parts import make_matchings, peak_memory
from .samplers import make_matches, sample_both

_PROPOSALS = (500, 1000, 2000, 4000, 8000)
_IMAGES = (1, 2, 4, 8, 16)
_SIDES = (320, 480, 640, 960, 1333)
_OBJECTS = (1, 10, 30, 100, 500)


def benchmark_growth(repeats: int) -> None:
    _show("proposals", _PROPOSALS, _by_proposals, repeats * 3)
    _show("images", _IMAGES, _by_images, repeats * 3)
    _show("pixels", _SIDES, _by_pixels, max(3, repeats // 3), of=lambda side: side**2)
    _show("objects", _OBJECTS, make_matchings, max(3, repeats // 3))
    matchings = [make_matchings(number) for number in _OBJECTS]
    rows = [(name, *(peak_memory(steps[name]) for steps in matchings)) for name in matchings[0]]
    title = f"Memory of matching, by objects ({DEVICE}, MiB)"
    show(title, rows, ("matching", *(f"{number}" for number in _OBJECTS)))


def _show(
    what: str,
    sizes: Sequence[int],
    make: Callable[[int], dict[str, Callable]],
    repeats: int,
    of: Callable[[int], float] = float,
) -> None:
    """A row for each part: ms at each size, and the exponent that fits the larger half best."""
    seconds = [measure(make(size), repeats) for size in sizes]
    rows = []
    for name in seconds[0]:
        values = [s[name] for s in seconds]
        # Of small ones the overhead of calls is most.
        tail = slice(len(sizes) // 2, None)
        slope = np.polyfit(np.log([of(s) for s in sizes[tail]]), np.log(values[tail]), 1)[0]
        rows.append((name, *(1000 * v for v in values), slope))
    unit = "longer sides" if what == "pixels" else what
    headers = ("part", *(f"{size}" for size in sizes), "exponent")
    show(f"Growth with {what} ({unit} as columns, ms, {DEVICE})", rows, headers)


def _by_proposals(number: int) -> dict[str, Callable]:
    ious, gt_indices, positives = (x.repeat(4)[:number] for x in make_matches(1, 500))
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(number, 2, generator=generator) * 1000
    boxes = torch.cat([corner, corner + 60], dim=1).to(DEVICE)
    scores = torch.rand(number, generator=generator).to(DEVICE)
    labels = torch.where(positives, 0, 1)
    classes = torch.zeros_like(gt_indices)
    return {
        "random (detectron2)": partial(subsample_labels, labels, 512, 0.25, 1),
        "both Libra samplers": partial(sample_both, ious, gt_indices, positives),
        "OHEM": partial(sample_hard, scores, ~positives, 384),
        "ISR-N": partial(sample_score_hlr_negatives, scores, boxes, ~positives, 384),
        "ISR-P": partial(reweight_positives, ious, gt_indices, classes, scores, k=2.0, bias=0.0),
    }


def _by_images(number: int) -> dict[str, Callable]:
    return {"both Libra samplers": partial(sample_both, *make_matches(number, 400))}


def _by_pixels(side: int) -> dict[str, Callable]:
    """Of images whose shorter side is 0.6 of the longer."""
    height, width = (max(1, round(s / 16)) for s in (side * 0.6, side))
    sizes = [(4 * height, 4 * width), (2 * height, 2 * width), (height, width)]
    sizes += [(-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))]
    levels = [torch.randn(1, 256, *size, device=DEVICE) for size in sizes]
    steps = {}
    for refine in ("non_local", "conv", "none"):
        bfp = BalancedFeaturePyramid(256, 5, refine_type=refine).to(DEVICE).eval()
        steps[f"BFP, {refine}"] = partial(torch.no_grad()(bfp), levels)
    return steps
