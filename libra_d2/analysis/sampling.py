"""The IoU of the negatives that samplers choose (Libra R-CNN, figure 3)."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from libra_d2.inference.detector import Detector
from libra_d2.modeling import IouBalancedSampler, OhemSampler, ScoreHlrSampler
from libra_d2.sampling import sample_random

from .looking import annotated_images, candidates_of
from .pictures import new_figure, save

__all__ = ["analyse_sampling"]

_EDGES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
# Of these each takes as many.
_SAMPLERS = {
    "random": lambda matches, negatives, n: sample_random(negatives, n),
    "IoU-balanced": IouBalancedSampler(),
    "OHEM: the hardest": OhemSampler(),
    "PISA": ScoreHlrSampler(),
}


def analyse_sampling(detector: Detector, output: Path, number: int) -> list[str]:
    """Draws which share of each sampler's negatives lies where, by IoU with the nearest object.

    Each sampler takes as many of an image's negatives, a quarter of them, so that there is a
    choice.

    Args:
        detector: two-stage.
        output: the picture.
        number: how many images to sample from.

    Returns:
        Sentences with the shares above an IoU of 0.05.
    """
    torch.manual_seed(0)
    ious, used = defaultdict(list), 0
    for image in annotated_images(detector, number):
        if len(image["instances"]) == 0:
            continue
        used += 1
        matches = candidates_of(detector, image).matches
        negatives = matches.labels == 0
        ious["all negatives"].append(matches.ious[negatives])
        wanted = max(1, int(negatives.sum()) // 4)
        for name, sampler in _SAMPLERS.items():
            ious[name].append(matches.ious[sampler(matches, negatives, wanted) & negatives])
    if not ious:
        raise ValueError("none of the images has an object")
    shares = {name: _shares(torch.cat(parts)) for name, parts in ious.items()}
    figure, ((axes,),) = new_figure(1, width=7, height=4.2)
    for name, values in shares.items():
        axes.stairs([100 * v for v in values], _EDGES, label=name, linewidth=1.8)
    axes.set_xlabel("IoU with the nearest ground truth")
    axes.set_ylabel("share of the chosen negatives (%)")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"Negatives of {used} images")
    save(figure, output, _rows(shares))
    return [
        f"{name}: {100 * (torch.cat(parts) > 0.05).float().mean():.1f} % have an IoU above 0.05 "
        f"({sum(map(len, parts))} negatives)"
        for name, parts in ious.items()
    ]


def _shares(ious: Tensor) -> list[float]:
    counts = torch.histogram(ious.cpu().clamp(max=_EDGES[-1]), torch.tensor(_EDGES)).hist
    return (counts / max(len(ious), 1)).tolist()


def _rows(shares: dict[str, list[float]]) -> Iterable[dict]:
    for i, (low, high) in enumerate(pairwise(_EDGES)):
        yield {"iou_from": low, "iou_to": high, **{name: v[i] for name, v in shares.items()}}
