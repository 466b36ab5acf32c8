"""Classification-aware regression loss (PISA, section 4.3)."""

import torch
from torch import Tensor

from libra_d2.ranking import check_importance

__all__ = ["carl_loss"]


def carl_loss(
    class_probs: Tensor,
    box_losses: Tensor,
    *,
    k: float = 1.0,
    bias: float = 0.2,
    normalizer: float | Tensor,
) -> Tensor:
    r"""CARL: box losses weighted by the predicted probability of the true class.

    .. math::
        L = \frac{1}{normalizer} \sum_i c_i L_i, \qquad
        c_i = P \frac{(bias + (1 - bias) p_i)^k}{\sum_j (bias + (1 - bias) p_j)^k}

    (equation 6). The gradient flows to the probabilities, through the sum too: classification
    learns to be sure where regression is good.

    Args:
        class_probs: p, of each positive's true class, (P,) in [0, 1].
        box_losses: unreduced, (P,) or (P, 4).
        k: greater than 0.
        bias: in [0, 1].
        normalizer: what the sum is divided by: the number of sampled ROIs in a two-stage detector,
            of positives in RetinaNet.

    Returns:
        A scalar; 0, with a gradient, if there are no positives.

    Raises:
        ValueError: if the shapes do not fit or an option is out of its range.
    """
    check_importance(k, bias)
    if class_probs.dim() != 1 or box_losses.shape[:1] != class_probs.shape:
        raise ValueError(
            "class_probs must be (P,) and box_losses (P,) or (P, 4), got "
            f"{tuple(class_probs.shape)} and {tuple(box_losses.shape)}"
        )
    box_losses = box_losses if box_losses.dim() == 1 else box_losses.flatten(1).sum(dim=1)
    if class_probs.dtype in (torch.float16, torch.bfloat16):
        class_probs = class_probs.float()
    # Without a bias, at 0, a root would have no finite gradient.
    weights = (bias + (1 - bias) * class_probs).clamp(min=1e-12) ** k
    weights = weights * (len(weights) / weights.sum().clamp(min=1e-12))
    return (weights * box_losses).sum() / normalizer
