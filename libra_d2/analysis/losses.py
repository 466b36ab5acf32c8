"""Curves of losses and their gradients (Libra R-CNN, figure 5; focal loss, figure 1)."""

from collections.abc import Callable
from pathlib import Path

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor

from libra_d2.losses import balanced_l1_loss, focal_loss

from .pictures import new_figure, save

__all__ = ["analyse_losses"]

_BOX = {
    "smooth L1": lambda x, zero: smooth_l1_loss(x, zero, beta=1.0),
    "balanced L1, alpha 0.2": lambda x, zero: balanced_l1_loss(x, zero, alpha=0.2),
    "balanced L1, alpha 0.3": lambda x, zero: balanced_l1_loss(x, zero, alpha=0.3),
    "balanced L1, alpha 0.5": lambda x, zero: balanced_l1_loss(x, zero, alpha=0.5),
    "balanced L1, alpha 1.0": lambda x, zero: balanced_l1_loss(x, zero, alpha=1.0),
}


def analyse_losses(output: Path) -> list[str]:
    """Draws box losses over the regression error and focal losses over the probability.

    Args:
        output: the picture.
    """
    errors = torch.linspace(0, 2, 201, dtype=torch.float64)
    probabilities = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    focal = {
        "cross entropy" if gamma == 0 else f"focal, gamma {gamma:g}": _focal(gamma)
        for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)
    }
    rows = []
    figure, ((box, box_gradient), (cls, cls_gradient)) = new_figure(2, 2, width=5.2)
    for name, loss in _BOX.items():
        values, gradients = _curve(lambda x, f=loss: f(x, torch.zeros_like(x)), errors)
        _plot(name, "regression error", errors, values, gradients, (box, box_gradient), rows)
    for name, loss in focal.items():
        values, gradients = _curve(loss, probabilities.logit())
        axes = (cls, cls_gradient)
        _plot(name, "probability", probabilities, values, gradients.abs(), axes, rows)
    for axes, x, y in (
        (box, "regression error", "loss"),
        (box_gradient, "regression error", "gradient"),
        (cls, "probability of the true class", "loss"),
        (cls_gradient, "probability of the true class", "size of the logit's gradient"),
    ):
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    cls.set_ylim(0, 5)
    save(figure, output, rows)
    return []


def _focal(gamma: float) -> Callable[[Tensor], Tensor]:
    return lambda logit: focal_loss(logit, torch.ones_like(logit), alpha=-1, gamma=gamma)


def _curve(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.clone().requires_grad_()
    values = loss(at)
    (gradients,) = torch.autograd.grad(values.sum(), at)
    return values.detach(), gradients


def _plot(name, what, at, values, gradients, axes, rows) -> None:
    axes[0].plot(at, values, label=name)
    axes[1].plot(at, gradients, label=name)
    rows.extend(
        {"curve": name, "over": what, "x": x, "loss": loss, "gradient": gradient}
        for x, loss, gradient in zip(at.tolist(), values.tolist(), gradients.tolist(), strict=True)
    )
