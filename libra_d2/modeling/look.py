"""What a box head computes of all proposals, without gradient, is not computed again to train.

OHEM and ISR-N look at the predictions of all proposals and train on some of them. Pooling, linear
layers and convolutions are what that costs, and their gradients are made of inputs and weights
alone: of the proposals chosen, their values are taken from the look.

Shape shorthand in this module:

    M: number of boxes looked at, of all images
    R: number of those that are trained on
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from .roi_align import ParallelROIAlign, use_roi_align

__all__ = ["Look", "LookPooler", "can_look"]


class Look(TorchFunctionMode):
    """Remembers a pass over all rows; a later one over some of them takes its values from there.

    .. code-block:: python

        with look, torch.no_grad():
            scores = head(pooler(features, boxes))
        look.keep(rows)
        with look:  # the same values, with gradient
            scores = head(pooler(features, boxes[rows]))

    What is not remembered is computed: other functions, and other layers than those of the first
    pass in its order. The second has to be that first one, of the same features, for some of its
    boxes; the pooler a :class:`LookPooler`; each row's outcome its own (:func:`can_look`).
    """

    def __init__(self):
        super().__init__()
        self.values: list[_Value] = []
        self.is_kept = False

    def keep(self, rows: Tensor) -> None:
        """Ends the first pass, of which only these rows, (R,) int64, are kept, in this order."""
        self.is_kept = True
        # One by one, so that two copies of the largest are all there ever is.
        for value in self.values:
            value.rows = value.rows[rows]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        again, num_args = _AGAIN.get(func, (None, 0))
        if again is None or kwargs or len(args) != num_args:
            return func(*args, **(kwargs or {}))
        owner = args[1]  # weights, or a pooler
        if not self.is_kept:
            outcome = func(*args)
            self.values.append(_Value(owner, outcome))
            return outcome
        if self.values and self.values[0].owner is owner:
            return again(self.values.pop(0).rows, *args)
        return func(*args)


@dataclass
class _Value:
    """What one function has computed, (M, ...), later (R, ...)."""

    owner: Tensor | nn.Module
    rows: Tensor


class LookPooler(ROIPooler):
    """The parent, whose outcome a :class:`Look` remembers."""

    @classmethod
    def like(cls, pooler: ROIPooler) -> ROIPooler:
        """One of its settings and parts, or another kind of pooler as it is."""
        if type(pooler) is not ROIPooler:
            return pooler
        use_roi_align(pooler)
        if not all(isinstance(level, ParallelROIAlign) for level in pooler.level_poolers):
            return pooler
        taken = cls.__new__(cls)
        taken.__dict__.update(pooler.__dict__)
        return taken

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        if has_torch_function(tuple(x)):
            return handle_torch_function(_pool, tuple(x), x, self, box_lists)
        return super().forward(x, box_lists)


def can_look(pooler: nn.Module, head: nn.Module, predictor: nn.Module) -> bool:
    """Whether these are known to compute the same of a row beside whatever others, each time.

    Where torch is to be deterministic they cannot on a GPU: what torchvision has for it is another
    function than the gradient that is used here.
    """
    modules = [*head.modules(), *predictor.modules()]
    return (
        isinstance(pooler, LookPooler)
        and all(map(_treats_rows_alike, modules))
        and not torch.are_deterministic_algorithms_enabled()
    )


_KNOWN = (
    *(nn.ModuleList, nn.Linear, Conv2d, nn.ReLU, nn.Flatten, nn.GroupNorm, FrozenBatchNorm2d),
    FastRCNNConvFCHead,
)


def _treats_rows_alike(module: nn.Module) -> bool:
    is_output = type(module).forward is FastRCNNOutputLayers.forward
    is_changed = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    return (
        (type(module) in _KNOWN or is_output)
        and not is_changed
        and not getattr(module, "inplace", False)
    )


def _pool(features: list[Tensor], pooler: LookPooler, boxes: list[Boxes]) -> Tensor:
    """The pooler's forward as a function, which a mode of torch can take the place of."""
    return pooler(features, boxes)


def _pool_again(
    rows: Tensor, features: list[Tensor], pooler: LookPooler, boxes: list[Boxes]
) -> Tensor:
    levels = assign_boxes_to_levels(
        *(boxes, pooler.min_level, pooler.max_level),
        *(pooler.canonical_box_size, pooler.canonical_level),
    )
    rois = convert_boxes_to_pooler_format(boxes)
    return _Pool.apply(rows, rois, levels, pooler.level_poolers, *features)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, rois: Tensor, levels: Tensor, poolers: nn.ModuleList, *features
    ) -> Tensor:
        ctx.save_for_backward(rois, levels)
        ctx.poolers, ctx.shapes = poolers, [level.shape for level in features]
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rois, levels = ctx.saved_tensors
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        spread = []
        all_levels = torch.arange(len(ctx.poolers), device=levels.device)
        counts = (levels == all_levels.unsqueeze(1)).sum(dim=1).tolist()  # one transfer
        rows = levels.argsort(stable=True).split(counts)
        for own, pooler, shape in zip(rows, ctx.poolers, ctx.shapes, strict=True):
            spread.append(pooler.spread(gradient[own].to(dtype), rois[own].to(dtype), shape))
        return None, None, None, None, *spread


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(input.to(rows.dtype), weight.to(rows.dtype))
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[1:4]
        return (
            None,
            gradient @ weight if of_input else None,
            gradient.t() @ input if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *options
    ) -> Tensor:
        ctx.save_for_backward(input.to(rows.dtype), weight.to(rows.dtype))
        ctx.options = options
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, dilation, groups = ctx.options
        gradients = torch.ops.aten.convolution_backward(
            *(gradient, *ctx.saved_tensors, [gradient.shape[1]], stride, padding, dilation),
            *(False, [0, 0], groups, ctx.needs_input_grad[1:4]),
        )
        return None, *gradients, None, None, None, None


# What takes values over in place of a function, and the number of arguments it has to have.
_AGAIN: dict[Callable, tuple[Callable, int]] = {
    F.linear: (_Linear.apply, 3),
    F.conv2d: (_Conv2d.apply, 7),
    _pool: (_pool_again, 3),
}
