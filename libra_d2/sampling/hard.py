"""Hard examples: the candidates with the largest losses."""

import math

import torch
from torch import Tensor
from torchvision.ops import nms

from .masks import check, count_so_far, undo

__all__ = ["sample_hard", "sample_hard_nms"]


def sample_hard(losses: Tensor, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
    """Keeps the candidates with the largest losses (OHEM, CVPR 2016, section 4).

    Args:
        losses: float, shape ``(..., N)``.
        candidates: bool mask, shape ``(..., N)``.
        num_samples: how many to keep; an int, or an integer tensor that broadcasts to ``(...)``.

    Returns:
        Bool mask, shape ``(..., N)``, True ``min(num_samples, candidates)`` times; of equal losses
        the first is kept.

    Raises:
        ValueError: if shapes differ, ``candidates`` is not bool or ``num_samples`` is negative.
    """
    num_samples = check(candidates, num_samples, losses=losses)
    order = losses.masked_fill(~candidates, -math.inf).argsort(dim=-1, descending=True, stable=True)
    kept = candidates.gather(-1, order)
    kept &= count_so_far(kept) <= num_samples
    return undo(order, kept)


def sample_hard_nms(
    losses: Tensor, boxes: Tensor, candidates: Tensor, num_samples: int, *, nms_thresh: float
) -> Tensor:
    """Keeps the candidates with the largest losses that survive non-maximum suppression.

    OHEM as the focal-loss paper compares itself with (ICCV 2017, section 5.1 and table 1d).

    Args:
        losses: float, (N,); what boxes are ranked by.
        boxes: (N, 4), x1, y1, x2, y2.
        candidates: bool mask, (N,).
        num_samples: how many to keep.
        nms_thresh: of two boxes of a larger IoU only the harder one is kept; in [0, 1].

    Returns:
        Bool mask, (N,), True at most ``num_samples`` times.

    Raises:
        ValueError: if shapes differ, ``candidates`` is not bool or ``num_samples`` is negative.
    """
    check(candidates, num_samples, losses=losses, boxes=boxes[..., 0])
    kept = torch.zeros_like(candidates)
    ranked = candidates.nonzero().squeeze(-1)
    ranked = ranked[losses[ranked].argsort(descending=True, stable=True)]
    # Whether a box survives depends on harder ones alone, so NMS looks at no more of the ranking
    # than it takes: its time and memory grow with the square.
    num_seen = 4 * num_samples
    while True:
        seen = ranked[:num_seen]
        survivors = seen[nms(boxes[seen].float(), losses[seen].float(), nms_thresh)]
        if len(survivors) >= num_samples or num_seen >= len(ranked):
            kept[survivors[:num_samples]] = True
            return kept
        num_seen *= 2
