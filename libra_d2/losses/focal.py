"""Focal loss whose gradient is finite for any exponent (Lin et al., ICCV 2017)."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["focal_loss"]


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    r"""Focal loss of sigmoid scores, :math:`-\alpha_t (1 - p_t)^\gamma \ln p_t` (equation 5).

    What ``fvcore.nn.sigmoid_focal_loss`` computes, from logarithms: there 1 - p_t is 0 in float32
    for logits beyond 17, where the gradient of its power is infinite for gamma between 0 and 1.

    Args:
        logits: float, any shape. float16 and bfloat16 are computed in float32.
        targets: 0 and 1, the shape of ``logits``.
        alpha: weight of targets of 1, those of 0 having ``1 - alpha``; negative for no weights.
        gamma: how much easy examples are weighed down; 0 for not at all (cross entropy).
        reduction: "none" or "sum".

    Returns:
        The loss, of the shape of ``logits`` for "none", else a scalar.

    Raises:
        ValueError: if the shapes differ, gamma is negative or there is no such reduction.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            "logits and targets must have the same shape, got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if not gamma >= 0 or reduction not in ("none", "sum"):
        raise ValueError(
            'focal loss needs gamma >= 0 and reduction "none" or "sum", '
            f"got {gamma} and '{reduction}'"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    of_target = torch.where(targets > 0, logits, -logits)
    loss = -F.logsigmoid(of_target) * (gamma * F.logsigmoid(-of_target)).exp()
    if alpha >= 0:
        loss = loss * torch.where(targets > 0, alpha, 1 - alpha)
    return loss.sum() if reduction == "sum" else loss
