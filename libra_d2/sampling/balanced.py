"""Libra R-CNN's balanced samplers: strata first, and what is missing from anywhere."""

import functools
import math
import operator

import torch
from torch import Tensor

from .masks import check, count_so_far, random_order, sample_random, undo

__all__ = ["sample_instance_balanced_positives", "sample_iou_balanced_negatives"]


def sample_iou_balanced_negatives(
    ious: Tensor,
    candidates: Tensor,
    num_samples: int | Tensor,
    *,
    num_bins: int = 3,
    iou_range: tuple[float | Tensor, float | Tensor] = (0.0, 0.5),
    floor_iou: float = 0.0,
    floor_fraction: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Keeps negatives spread evenly over their IoU (Libra R-CNN, section 3.1 and equation 2).

    The IoU range is split into K equal bins and each gives ``num_samples // K`` of its candidates
    at random, or all it has, so that a candidate of bin k is chosen with probability

    .. math:: p_k = \frac{N}{K} \cdot \frac{1}{M_k}.

    What the bins cannot supply is drawn uniformly from all candidates left, those outside the
    range among them.

    With ``floor_iou > 0`` the candidates below it form a set of their own: it gives
    ``floor_fraction`` of the samples at random, the K bins over ``[floor_iou, iou_range[1])`` the
    rest, and each side fills what the other lacks.

    Args:
        ious: each candidate's largest IoU with any ground truth, in [0, 1]; float, ``(..., N)``.
        candidates: bool mask of the negatives, shape ``(..., N)``.
        num_samples: how many to keep; an int, or an integer tensor that broadcasts to ``(...)``.
        num_bins: K; with 1 (and no floor) the sampling is uniform.
        iou_range: lower (inclusive) and upper (exclusive) edge of the bins. The paper's upper edge
            is the matcher's background threshold; mmdetection's is the largest IoU of the image.
            Tensors that broadcast to ``(...)`` are allowed.
        floor_iou: upper edge (exclusive) of the floor set; 0 for none.
        floor_fraction: share of the samples wanted from the floor set, in [0, 1].
        generator: source of randomness on the device of ``candidates``.

    Returns:
        Bool mask, shape ``(..., N)``, True ``min(num_samples, candidates)`` times.

    Raises:
        ValueError: if shapes differ, a mask is not bool or an option is out of its range.
    """
    wanted = check(candidates, num_samples, ious=ious)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    for name, value in (("floor_iou", floor_iou), ("floor_fraction", floor_fraction)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    low, high = (_per_row(edge) for edge in iou_range)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and not low < high:
        raise ValueError(f"iou_range must be (low, high) with low < high, got {iou_range}")
    if floor_iou == 0.0:
        bins = ((ious - low) * (num_bins / (high - low))).floor_()
        kept = _first_of_each_bin(bins, candidates, num_bins, wanted // num_bins, generator)
        return _top_up(kept, candidates, wanted, generator)

    if not isinstance(high, Tensor) and not floor_iou < high:
        raise ValueError(f"floor_iou must be below the upper edge {high}, got {floor_iou}")
    above = candidates & (ious >= floor_iou)
    wanted_above = wanted - _share(wanted, floor_fraction)
    bins = ((ious - floor_iou) * (num_bins / (high - floor_iou))).floor_()
    kept = _first_of_each_bin(bins, above, num_bins, wanted_above // num_bins, generator)
    kept = _top_up(kept, above, wanted_above, generator)
    kept = _top_up(kept, candidates & ~above, wanted, generator)
    return _top_up(kept, candidates, wanted, generator)


def sample_instance_balanced_positives(
    gt_indices: Tensor,
    candidates: Tensor,
    num_samples: int | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keeps positives spread evenly over the ground truths (Libra R-CNN, section 3.1).

    With G ground truths that have positives, each gives ``round(num_samples / G) + 1`` of its
    positives at random, or all it has. If these are too many a random ``num_samples`` of them stay;
    if too few, random other positives fill up.

    Args:
        gt_indices: the ground truth each candidate answers to, in [0, 2**20); integers,
            ``(..., N)``. Where ``candidates`` is False the value does not matter.
        candidates: bool mask of the positives, shape ``(..., N)``.
        num_samples: how many to keep; an int, or an integer tensor that broadcasts to ``(...)``.
        generator: source of randomness on the device of ``candidates``.

    Returns:
        Bool mask, shape ``(..., N)``, True ``min(num_samples, candidates)`` times.

    Raises:
        ValueError: if shapes differ, a mask is not bool or ``num_samples`` is negative.
    """
    wanted = check(candidates, num_samples, gt_indices=gt_indices)
    if gt_indices.is_floating_point():
        raise ValueError(f"gt_indices must be integers, got {gt_indices.dtype}")
    if candidates.shape[-1] == 0:
        return candidates.clone()
    # One sort by (ground truth, random number) lines up every ground truth's positives in random
    # order; candidates that are none go last. From here on, positions are those of this order.
    groups, order = _shuffle_groups(gt_indices, candidates, generator)
    positive = groups < _NO_GROUP
    is_last = torch.cat([groups[..., 1:] != groups[..., :-1], positive[..., -1:]], dim=-1)
    num_groups = (is_last & positive).sum(-1, keepdim=True)
    quota = (wanted / num_groups.clamp(min=1)).round().long() + 1
    # A positive is among the first `quota` of its group if the one `quota` places before it
    # belongs to another group.
    before = torch.arange(groups.shape[-1], device=groups.device) - quota
    first = before < 0
    first |= groups.gather(-1, before.clamp_(min=0)) != groups
    first &= positive
    # Too few: keep them and draw from the rest. Too many: draw from them.
    num_first = first.sum(-1, keepdim=True)
    too_few = num_first < wanted
    kept = sample_random(
        positive & (first ^ too_few),
        (wanted - num_first * too_few).squeeze(-1),
        generator=generator,
    )
    kept |= first & too_few
    return undo(order, kept)


# Below any true fraction of a count: what of 0.3 * 10 is more than 3 is not counted.
_EPSILON = 1e-6
_GROUP_SHIFT = 42
_NO_GROUP = 1 << 20


def _shuffle_groups(
    gt_indices: Tensor, candidates: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Sorts candidates by group and at random inside a group; returns sorted groups and the order.

    The key of the sort is an int64 whose high bits are the group and whose low 42 bits are random:
    integers sort faster than floats, and keep more random bits beside a large group index.
    """
    keys = torch.empty(candidates.shape, dtype=torch.int64, device=candidates.device)
    keys.random_(1 << _GROUP_SHIFT, generator=generator)
    keys += gt_indices.long() << _GROUP_SHIFT
    keys.masked_fill_(~candidates, _NO_GROUP << _GROUP_SHIFT)
    keys, order = keys.sort(dim=-1)
    return keys >> _GROUP_SHIFT, order


def _first_of_each_bin(
    bins: Tensor,
    candidates: Tensor,
    num_bins: int,
    quota: int | Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Keeps, at random, up to ``quota`` candidates of each bin 0 .. num_bins - 1."""
    order = random_order(candidates, generator)
    bins, candidates = bins.gather(-1, order), candidates.gather(-1, order)
    # The bins are few, so that counting each on its own is cheaper than a sort.
    members = [candidates & (bins == k) for k in range(num_bins)]
    kept = [member & (count_so_far(member) <= quota) for member in members]
    return undo(order, functools.reduce(operator.or_, kept))


def _top_up(
    kept: Tensor, candidates: Tensor, wanted: int | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Adds random candidates to ``kept`` until there are ``wanted``.

    The random numbers are fresh: those that decided ``kept`` would favour some of the rest.
    """
    missing = wanted - kept.sum(-1, keepdim=True, dtype=torch.int32)
    return kept | sample_random(candidates & ~kept, missing.squeeze(-1), generator=generator)


def _share(count: int | Tensor, fraction: float) -> int | Tensor:
    """``count * fraction``, rounded up; in float64, so that an int and a tensor give the same."""
    if isinstance(count, Tensor):
        return (count.double() * fraction).sub_(_EPSILON).ceil_().int()
    return math.ceil(count * fraction - _EPSILON)


def _per_row(value: float | Tensor) -> float | Tensor:
    """Lets a number per row, shape (...), broadcast against rows, shape (..., N)."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value
