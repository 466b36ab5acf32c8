"""ROIAlign: detectron2's numbers, faster on CPUs and right in half precision."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn

__all__ = ["ParallelROIAlign", "spread_gradient", "use_parallel_roi_align"]


class ParallelROIAlign(ROIAlign):
    """The parent in all threads of a CPU, and with exact boxes.

    - On a CPU torchvision pools, and spreads gradients, in one thread; here all of torch's share
      the work. The outcome is the same to the bit.
    - The parent gives boxes the features' dtype. bfloat16 has eight significant bits: a box at
      1,000 pixels would move by up to four. Here boxes, and what is computed of them, are float32.
    """

    @classmethod
    def like(cls, pooler: ROIAlign) -> "ParallelROIAlign":
        """One of the same settings."""
        return cls(pooler.output_size, pooler.spatial_scale, pooler.sampling_ratio, pooler.aligned)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Pools features (N, C, H, W) of any float dtype; boxes (R, 5), float32: (R, C, h, w)."""
        dtype, layout = torch.promote_types(features.dtype, torch.float32), torch.contiguous_format
        # Of another layout torchvision would make a copy, for each of the threads.
        inputs = features.to(dtype, memory_format=layout), rois.to(dtype)
        in_one = torch.get_num_threads() == 1 or torch.jit.is_tracing()
        if features.device.type != "cpu" or in_one or torch.compiler.is_compiling():
            pooled = super().forward(*inputs)
        else:
            pooled = _ShareWork.apply(*inputs, self)
        return pooled.to(features.dtype)


def use_parallel_roi_align(model: nn.Module) -> None:
    """Replaces detectron2's own ROIAlign wherever a model has it; others stay."""
    poolers = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if type(child) is ROIAlign
    ]
    for owner, name, pooler in poolers:
        setattr(owner, name, ParallelROIAlign.like(pooler))


class _ShareWork(torch.autograd.Function):
    """Forward each thread has some boxes, backward some channels: neither adds anything up."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, pooler: ROIAlign) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.pooler = features.shape, pooler

        def pool(own: Tensor) -> Tensor:
            return super(ParallelROIAlign, pooler).forward(features, own)

        return torch.cat(_in_threads(pool, rois.chunk(torch.get_num_threads())))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return spread_gradient(gradient, *ctx.saved_tensors, ctx.shape, ctx.pooler), None, None


def spread_gradient(
    gradient: Tensor, rois: Tensor, shape: Sequence[int], pooler: ROIAlign
) -> Tensor:
    """The features' gradient (N, C, H, W), which is their shape, of that of what was pooled.

    Args:
        gradient: (R, C, h, w), float.
        rois: what they were pooled from, (R, 5), of its dtype.
        shape: of the features.
        pooler: what pooled them.
    """
    num_images, _, *size = shape

    def spread(own: Tensor) -> Tensor:
        return torch.ops.torchvision._roi_align_backward(
            *(own, rois, pooler.spatial_scale, *own.shape[2:], num_images, own.shape[1], *size),
            *(pooler.sampling_ratio, pooler.aligned),
        )

    num_parts = torch.get_num_threads() if gradient.device.type == "cpu" else 1
    if num_parts == 1:
        return spread(gradient)
    return torch.cat(_in_threads(spread, gradient.chunk(num_parts, dim=1)), dim=1)


def _in_threads(function: Any, parts: tuple[Tensor, ...]) -> list[Tensor]:
    with ThreadPoolExecutor(len(parts)) as threads:
        return list(threads.map(function, parts))
