"""Balanced L1 loss (Libra R-CNN, section 3.3)."""

import math

import torch
from torch import Tensor

REFERENCES = ("paper", "mmdet")
GAMMA_OVER_ALPHA = (1e-3, 80.0)  # the published settings are from 2 to 5
MOST_EXPONENT = 88.0  # of e in float32
REDUCTIONS = ("none", "mean", "sum")


def check_balanced_l1(alpha: float, gamma: float, beta: float, reference: str) -> None:
    """Raises ``ValueError`` unless the options of :func:`balanced_l1_loss` make sense."""
    for name, value in (("alpha", alpha), ("gamma", gamma), ("beta", beta)):
        if not 1e-30 < value < 1e30:  # what float32 can hold, and no NaN
            raise ValueError(f"{name} must be a positive number, got {value}")
    low, high = GAMMA_OVER_ALPHA
    if not low <= gamma / alpha <= high:
        raise ValueError(
            f"gamma must be between {low} and {high} times alpha, so that float32 holds the "
            f"exponential of their ratio; got {gamma} and alpha {alpha}"
        )
    if gamma / alpha - math.log(beta) > MOST_EXPONENT:
        raise ValueError(
            f"beta must be larger for gamma {gamma} and alpha {alpha}, so that float32 holds the "
            f"exponential of their ratio over it; got {beta}"
        )
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got '{reference}'")


def balanced_l1_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 1.0,
    reduction: str = "none",
    reference: str = "paper",
) -> Tensor:
    r"""Balanced L1: a smooth L1 that lets inliers (small errors) contribute more gradient.

    With :math:`d = |input - target|` and :math:`b = e^{\gamma/\alpha} - 1`, for beta = 1
    (Libra R-CNN, equation 9, whose constant makes the two branches meet):

    .. math::
        L(d) = \begin{cases}
            \frac{\alpha}{b}(b d + 1)\ln(b d + 1) - \alpha d & d < 1 \\
            \gamma d + \gamma / b - \alpha & \text{otherwise}
        \end{cases}

    with gradient :math:`\alpha\ln(b d + 1)` for d < 1 and :math:`\gamma` otherwise.

    For any other beta the two references differ:

    - ``"paper"``: :math:`\beta L(d/\beta)`, whose gradient is zero at 0 and continuous at beta.
    - ``"mmdet"``: d < beta: :math:`\frac{\alpha}{b}(b d + 1)\ln(b d/\beta + 1) - \alpha d`, else
      :math:`\gamma d + \gamma/b - \alpha\beta`. Its gradient is not zero at 0 and jumps at beta;
      mmdetection's Libra RetinaNet (beta 0.11) was trained with it.

    Args:
        input: predictions, any shape. float16 and bfloat16 are computed in float32.
        target: same shape as ``input``.
        alpha: how much inliers weigh; the smaller, the more.
        gamma: gradient of outliers.
        beta: where inliers end, in units of ``input``.
        reduction: "none", "mean" or "sum".
        reference: "paper" or "mmdet".

    Returns:
        The loss, of the shape of ``input`` for "none", else a scalar. The mean of an empty input
        is a differentiable 0.

    Raises:
        ValueError: if shapes differ or an option is out of its range.
    """
    check_balanced_l1(alpha, gamma, beta, reference)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got '{reduction}'")
    if input.shape != target.shape:
        raise ValueError(
            "input and target must have the same shape, got "
            f"{tuple(input.shape)} and {tuple(target.shape)}"
        )
    if input.dtype in (torch.float16, torch.bfloat16):
        input = input.float()
    diff = (input - target).abs()

    # Below beta the loss is `inlier`; past it, it grows with slope gamma. Clamping instead of
    # choosing between two branches keeps the gradient finite for any finite difference.
    b = math.expm1(gamma / alpha)
    inlier = diff.clamp(max=beta)
    log = torch.log1p(inlier * (b / beta))
    scale = beta if reference == "paper" else 1.0
    loss = alpha / b * (b * inlier + scale) * log - alpha * inlier + gamma * (diff - inlier)

    if reduction == "mean":
        return loss.mean() if loss.numel() > 0 else loss.sum()
    return loss.sum() if reduction == "sum" else loss
