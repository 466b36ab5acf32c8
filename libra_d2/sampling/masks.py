"""What all samplers share, and the plainest of them."""

import math

import torch
from torch import Tensor

__all__ = ["check", "count_so_far", "random_order", "sample_random", "undo"]


def sample_random(
    candidates: Tensor, num_samples: int | Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Keeps a uniformly random subset of the candidates.

    Args:
        candidates: bool mask, shape ``(..., N)``.
        num_samples: how many to keep along the last axis; an int, or an integer tensor that
            broadcasts to ``(...)``. Where there are fewer candidates all of them are kept.
        generator: source of randomness on the device of ``candidates``.

    Returns:
        Bool mask, shape ``(..., N)``, True ``min(num_samples, candidates)`` times.

    Raises:
        ValueError: if ``candidates`` is not a bool mask or ``num_samples`` is negative.
    """
    num_samples = check(candidates, num_samples)
    order = random_order(candidates, generator)
    kept = candidates.gather(-1, order)
    kept &= count_so_far(kept) <= num_samples
    return undo(order, kept)


def check(candidates: Tensor, num_samples: int | Tensor, **others: Tensor) -> int | Tensor:
    """Checks what can be checked without looking at values; returns ``num_samples`` per row."""
    if candidates.dtype != torch.bool or candidates.dim() == 0:
        raise ValueError(
            "candidates must be a bool mask of shape (..., N), got "
            f"{candidates.dtype} of shape {tuple(candidates.shape)}"
        )
    for name, value in others.items():
        if value.shape != candidates.shape:
            raise ValueError(
                f"{name} must have the shape of candidates, got {tuple(value.shape)} "
                f"and {tuple(candidates.shape)}"
            )
    if not isinstance(num_samples, Tensor):
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples}")
        return min(int(num_samples), candidates.shape[-1])
    if num_samples.is_floating_point():
        raise ValueError(f"num_samples must be integers, got {num_samples.dtype}")
    rows = candidates.shape[:-1]
    sizes = zip(reversed(num_samples.shape), reversed(rows), strict=False)
    if num_samples.dim() > len(rows) or any(size not in (1, row) for size, row in sizes):
        raise ValueError(
            f"num_samples must broadcast to the rows of candidates, {tuple(rows)}, got "
            f"{tuple(num_samples.shape)}"
        )
    return num_samples.unsqueeze(-1).clamp(max=candidates.shape[-1]).to(torch.int32)


def random_order(candidates: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random permutation of the last axis for each row; int64, the shape of ``candidates``."""
    if candidates.is_cuda:  # one kernel for all rows
        keys = torch.rand(candidates.shape, device=candidates.device, generator=generator)
        return keys.argsort(dim=-1)
    # On the CPU shuffling is nearly ten times faster than sorting.
    size = candidates.shape[-1]
    num_rows = math.prod(candidates.shape[:-1])
    rows = [
        torch.randperm(size, device=candidates.device, generator=generator) for _ in range(num_rows)
    ]
    return torch.stack(rows).view(candidates.shape) if rows else candidates.long()


def undo(order: Tensor, mask: Tensor) -> Tensor:
    """Puts a mask in the order ``order`` back into the original one."""
    return torch.empty_like(mask).scatter_(-1, order, mask)


def count_so_far(mask: Tensor) -> Tensor:
    return mask.cumsum(-1, dtype=torch.int32)
