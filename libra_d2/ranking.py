"""Hierarchical local rank and the weights made from it (PISA).

Cao et al., Prime Sample Attention in Object Detection, CVPR 2020, sections 3 and 4.

Shape shorthand in this module:

    N: number of samples
"""

import torch
from torch import Tensor

__all__ = [
    "check_importance",
    "hierarchical_local_rank",
    "importance_weights",
    "preserve_loss",
    "reweight_positives",
]


def check_importance(k: float, bias: float) -> None:
    """Raises ``ValueError`` unless k and bias, of whatever part of PISA, make sense."""
    if not 0.0 < k <= 100.0:
        raise ValueError(f"k must be greater than 0, and at most 100, got {k}")
    if not 0.0 <= bias <= 1.0:
        raise ValueError(f"bias must be in [0, 1], got {bias}")


def hierarchical_local_rank(
    values: Tensor, groups: Tensor, classes: Tensor | None = None
) -> Tensor:
    """Ranks samples: the best of every group first, then every group's second, and so on.

    Those of the same place in their groups are ranked by value (section 3.2); equal values by their
    order in ``values``.

    Args:
        values: what is ranked by, descending; float, (N,).
        groups: the group of each sample, a ground truth or a cluster of boxes; integers, (N,).
        classes: integers, (N,); if given, each class has a ranking, and groups, of its own.

    Returns:
        The position of each sample in the ranking (of its class), (N,) int64; 0 is the most
        important.

    Raises:
        ValueError: if the shapes are not (N,) or groups are no integers.
    """
    for name, other in (("groups", groups), ("classes", classes)):
        if other is None:
            continue
        if values.dim() != 1 or other.shape != values.shape:
            raise ValueError(
                f"values and {name} must have the same shape (N,), got {tuple(values.shape)} and "
                f"{tuple(other.shape)}"
            )
        if other.is_floating_point():
            raise ValueError(f"{name} must be integers, got {other.dtype}")
    classes = torch.zeros_like(groups) if classes is None else classes
    by_value = values.argsort(dim=0, descending=True, stable=True)
    by_group = _sort(classes, _sort(groups, by_value))
    place_in_group = _places((classes, groups), by_group)
    by_place = _sort(classes, _sort(place_in_group, by_value))
    return _places((classes,), by_place)


def _sort(key: Tensor, order: Tensor) -> Tensor:
    """Sorts samples, which are in an order already, stably by one more key."""
    return order[key[order].argsort(dim=0, stable=True)]


def _places(keys: tuple[Tensor, ...], order: Tensor) -> Tensor:
    """Where each sample stands among those with the same keys, which the order puts together."""
    sorted_keys = torch.stack([key[order] for key in keys])
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = (sorted_keys[:, 1:] != sorted_keys[:, :-1]).any(dim=0)
    position = torch.arange(len(order), device=order.device)
    start = torch.where(is_first, position, 0).cummax(dim=0).values
    return torch.empty_like(order).scatter_(0, order, position - start)


def importance_weights(ranks: Tensor, num_ranked: int | Tensor, *, k: float, bias: float) -> Tensor:
    r"""Weights that fall with the rank: :math:`(bias + (1 - bias) u)^k`, equations 2 and 3.

    u falls linearly, from 1 at rank 0 by 1 / ``num_ranked`` a rank.

    Args:
        ranks: integers, any shape.
        num_ranked: what the ranks are out of; an int or a scalar tensor.
        k: greater than 0; the larger, the steeper.
        bias: weight of the least important, before the power; in [0, 1].

    Returns:
        Weights, float32, the shape of ``ranks``.

    Raises:
        ValueError: if k or bias is out of its range.
    """
    check_importance(k, bias)
    u = ((num_ranked - ranks) / num_ranked).to(torch.float32)
    return (bias + (1 - bias) * u) ** k


def preserve_loss(weights: Tensor, losses: Tensor) -> Tensor:
    """Scales weights so that the weighted losses add up to what the losses do.

    Args:
        weights: float, (N,).
        losses: float, (N,); without gradient, as the weights shall have none.
    """
    total, weighted = losses.sum(), (weights * losses).sum()
    # Where nothing is lost there is nothing to preserve.
    return weights * torch.where(weighted > 0, total / weighted, 1.0)


@torch.no_grad()
def reweight_positives(
    ious: Tensor, groups: Tensor, classes: Tensor, losses: Tensor, *, k: float, bias: float
) -> Tensor:
    """Weights of positives by their importance (ISR-P, section 4.1).

    They are ranked in each class of the batch, and their total loss stays what it is.

    Args:
        ious: IoU of each positive's predicted box with its ground truth, (N,).
        groups: its ground truth, distinct across images; integers, (N,).
        classes: its class; integers, (N,).
        losses: its classification loss, (N,).
        k: of :func:`importance_weights`.
        bias: the same.

    Returns:
        Weights, float32 (N,), without gradient.

    Raises:
        ValueError: if shapes differ or k or bias is out of its range.
    """
    check_importance(k, bias)
    if len(ious) == 0:
        return torch.zeros_like(losses, dtype=torch.float32)
    ranks = hierarchical_local_rank(ious, groups, classes)
    # Ranks are out of the number of positives of the class that has most.
    weights = importance_weights(ranks, ranks.amax() + 1, k=k, bias=bias)
    return preserve_loss(weights, losses)
