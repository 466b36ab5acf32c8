"""Hard examples: the candidates with the largest losses (OHEM) or scores (PISA)."""

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from libra_d2.ranking import check_importance, hierarchical_local_rank, importance_weights

from .masks import check, count_so_far, sample_random, undo

__all__ = ["sample_hard", "sample_hard_nms", "sample_score_hlr_negatives"]


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
    survivors = _first_survivors(boxes[ranked], losses[ranked], num_samples, nms_thresh)
    kept[ranked[survivors[:num_samples]]] = True
    return kept


def _first_survivors(boxes: Tensor, scores: Tensor, number: int, nms_thresh: float) -> Tensor:
    """Of boxes by descending score, the first that survive NMS: ``number`` or more, or all."""
    boxes, scores = boxes.float(), scores.float()
    # Whether a box survives depends on those before it alone, so NMS looks at no more of them than
    # it takes: its time and memory grow with the square.
    num_seen = 4 * number
    while True:
        survivors = nms(boxes[:num_seen], scores[:num_seen], nms_thresh)
        if len(survivors) >= number or num_seen >= len(boxes):
            return survivors
        num_seen *= 2


def sample_score_hlr_negatives(
    scores: Tensor,
    boxes: Tensor,
    candidates: Tensor,
    num_samples: int | Tensor,
    *,
    score_thresh: float = 0.05,
    nms_thresh: float = 0.5,
    k: float = 0.5,
    bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Keeps the negatives of the highest score-based hierarchical local ranks (PISA's ISR-N).

    Negatives that score above the threshold are clustered by NMS, ranked inside their clusters and
    then over all (section 3.2); the first are kept, and random others fill up with the lowest
    weight.

    Args:
        scores: each candidate's largest foreground probability, float (N,).
        boxes: the box predicted for that class, (N, 4), x1, y1, x2, y2.
        candidates: bool mask of the negatives, (N,).
        num_samples: how many to keep; an int or an integer scalar tensor.
        score_thresh: only negatives that score more are ranked.
        nms_thresh: a box joins the cluster of the highest-scoring box that it overlaps by this IoU
            or more.
        k: of :func:`libra_d2.ranking.importance_weights`.
        bias: the same.
        generator: source of randomness on the device of ``candidates``.

    Returns:
        Bool mask, (N,), True ``min(num_samples, candidates)`` times; weights of those kept, before
        the scale that preserves their loss, float32 (N,), 0 for the others.

    Raises:
        ValueError: if shapes differ, ``candidates`` is not bool, ``num_samples`` is negative or k
            or bias is out of its range.
    """
    check_importance(k, bias)
    wanted = check(candidates, num_samples, scores=scores, boxes=boxes[..., 0])
    wanted = torch.as_tensor(wanted, device=candidates.device).reshape(())
    valid = candidates & (scores > score_thresh)
    num_valid, num_wanted = torch.stack([valid.sum(), wanted.long()]).tolist()  # one transfer
    # Ranks among the valid alone, often few of many: all others make up a class of their own.
    index = scores.masked_fill(~valid, -math.inf).argsort(descending=True, stable=True)[:num_valid]
    clusters = torch.zeros_like(scores, dtype=torch.int64)
    clusters[index] = _nms_clusters(boxes[index], scores[index], num_wanted, nms_thresh)
    ranks = hierarchical_local_rank(scores, clusters, (~valid).long())
    by_rank = valid & (ranks < num_wanted)
    num_random = max(num_wanted - num_valid, 0)
    at_random = sample_random(candidates & ~valid, num_random, generator=generator)

    # Those drawn at random weigh as much as the last that was ranked.
    last = max(min(num_valid, num_wanted) - 1, 0)
    num_ranked = candidates.sum().clamp(max=num_wanted).clamp(min=max(num_valid, 1))
    weights = importance_weights(torch.where(by_rank, ranks, last), num_ranked, k=k, bias=bias)
    kept = by_rank | at_random
    return kept, weights.masked_fill(~kept, 0.0)


def _nms_clusters(boxes: Tensor, scores: Tensor, num_wanted: int, nms_thresh: float) -> Tensor:
    """The cluster of each box, by descending score, as far as the first ``num_wanted`` ranks need.

    Returns:
        Where among the boxes that survive NMS the one is that it belongs to, (N,) int64.
    """
    # NMS suppresses what overlaps by more than its threshold; here, by as much too.
    just_below = torch.tensor(nms_thresh).nextafter(torch.tensor(-1.0)).item()
    leaders = _first_survivors(boxes, scores, num_wanted, just_below)
    clusters = torch.zeros_like(scores, dtype=torch.int64)
    # With enough leaders, who rank before all others, whoever else may follow any of them.
    if 0 < len(leaders) < num_wanted:
        boxes = boxes.float()
        clusters = (box_iou(boxes, boxes[leaders]) > just_below).long().argmax(dim=1)
    clusters[leaders] = torch.arange(len(leaders), device=clusters.device)
    return clusters
