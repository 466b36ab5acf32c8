"""ROIAlign: detectron2's numbers, faster on CPUs and right in half precision."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["ROI_ALIGNS", "ParallelROIAlign", "SparseROIAlign", "use_roi_align"]


class ParallelROIAlign(ROIAlign):
    """The parent in all threads of a CPU, and with exact boxes.

    - On a CPU torchvision pools, and spreads gradients, in one thread; here all of torch's share
      the work. The outcome is the same to the bit.
    - The parent gives boxes the features' dtype. bfloat16 has eight significant bits: a box at
      1,000 pixels would move by up to four. Here boxes, and what is computed of them, are float32.
    """

    # Of another torchvision would make a copy, in each thread.
    memory_format = torch.contiguous_format

    @classmethod
    def like(cls, pooler: ROIAlign) -> Self:
        """One of the same settings."""
        return cls(pooler.output_size, pooler.spatial_scale, pooler.sampling_ratio, pooler.aligned)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Pools features (N, C, H, W) of any float dtype; boxes (R, 5), float32: (R, C, h, w)."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        rois = rois.to(dtype)
        in_graph = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if features.device.type != "cpu" or in_graph or len(rois) == 0:
            pooled = super().forward(features.to(dtype), rois)
        else:
            own = features.to(dtype, memory_format=self.memory_format)
            pooled = _Pool.apply(own, rois, self)
        return pooled.to(features.dtype)

    def pool(self, features: Tensor, rois: Tensor) -> Tensor:
        """The forward on a CPU, of one dtype: each thread has some boxes."""
        pool = partial(super().forward, features)
        return torch.cat(_in_threads(pool, rois.chunk(torch.get_num_threads())))

    def spread(self, gradient: Tensor, rois: Tensor, shape: Sequence[int]) -> Tensor:
        """The features' gradient (N, C, H, W), which is their shape, of that of what was pooled.

        On a CPU each thread has some channels, so that none adds to what another does.

        Args:
            gradient: (R, C, h, w), float.
            rois: what they were pooled from, (R, 5), of its dtype.
            shape: of the features.
        """
        num_images, _, *size = shape

        def spread(own: Tensor) -> Tensor:
            return torch.ops.torchvision._roi_align_backward(
                *(own, rois, self.spatial_scale, *own.shape[2:], num_images, own.shape[1], *size),
                *(self.sampling_ratio, self.aligned),
            )

        num_parts = torch.get_num_threads() if gradient.device.type == "cpu" else 1
        if num_parts == 1:
            return spread(gradient)
        return torch.cat(_in_threads(spread, gradient.chunk(num_parts, dim=1)), dim=1)


class SparseROIAlign(ParallelROIAlign):
    """The same numbers up to rounding, on a CPU several times as fast.

    What is pooled is a product: of a sparse matrix, with a row for each bin of each box that holds
    the weights of bilinear interpolation, and the features, with a row for each position. The
    features' gradient is the transposed matrix times what was pooled's.
    """

    memory_format = torch.channels_last  # a row is in one piece

    def pool(self, features: Tensor, rois: Tensor) -> Tensor:
        """As the parent's."""
        num_channels = features.shape[1]
        rows = features.permute(0, 2, 3, 1).reshape(-1, num_channels)
        blocks = []
        for own in self._split(rois):
            matrix = self._matrix(own, features.shape)
            starts = matrix.sizes.cumsum(0, dtype=torch.int32) - matrix.sizes
            pooled = _multiply(matrix.positions, matrix.weights, starts, rows)
            pooled = pooled.view(-1, *self._size, num_channels)
            blocks.append(torch.empty_like(pooled).index_copy_(0, matrix.boxes, pooled))
        return torch.cat(blocks).permute(0, 3, 1, 2)

    def spread(self, gradient: Tensor, rois: Tensor, shape: Sequence[int]) -> Tensor:
        """As the parent's."""
        if gradient.device.type != "cpu" or len(rois) == 0:
            return super().spread(gradient, rois, shape)
        num_images, num_channels, *size = shape
        gradient = gradient.permute(0, 2, 3, 1)
        spread = None
        parts = self._split(rois)
        for own, of_own in zip(parts, gradient.split([len(x) for x in parts]), strict=True):
            matrix = self._matrix(own, shape)
            rows = of_own[matrix.boxes].reshape(-1, num_channels)
            positions, order = matrix.positions.sort(stable=True)
            bins = torch.repeat_interleave(matrix.sizes)[order].to(torch.int32)
            sizes = torch.bincount(positions, minlength=num_images * size[0] * size[1])
            starts = (sizes.cumsum(0) - sizes).to(torch.int32)
            product = _multiply(bins, matrix.weights[order], starts, rows)
            spread = product if spread is None else spread.add_(product)
        return spread.view(num_images, *size, num_channels).permute(0, 3, 1, 2)

    @property
    def _size(self) -> tuple[int, int]:
        size = self.output_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _place(self, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where boxes start, their bins' extents, and points in a bin; x and y of each, (R, 2)."""
        offset = 0.5 if self.aligned else 0.0
        starts, ends = (rois[:, 1:] * self.spatial_scale - offset).split(2, dim=1)
        extents = ends - starts if self.aligned else (ends - starts).clamp(min=1)
        bins = extents / extents.new_tensor(self._size[::-1])
        if self.sampling_ratio > 0:
            return starts, bins, torch.full_like(bins, self.sampling_ratio, dtype=torch.int64)
        return starts, bins, bins.ceil().clamp(min=0).long()

    def _split(self, rois: Tensor) -> list[Tensor]:
        """Boxes by parts of a matrix that is not too large: one has entries with its area."""
        num_entries = 4 * self._size[0] * self._size[1] * self._place(rois)[2].prod(dim=1)
        part = num_entries.cumsum(0) // _ENTRIES_AT_ONCE
        return list(rois.split(part.unique(return_counts=True)[1].tolist()))

    def _matrix(self, rois: Tensor, shape: Sequence[int]) -> "_Matrix":
        size = shape[2:]
        starts, bins, grids = self._place(rois)
        # Boxes of one grid make a block without gaps.
        kinds, kind = grids.unique(dim=0, return_inverse=True)
        boxes = kind.argsort(stable=True)
        blocks = boxes.split(kind.bincount(minlength=len(kinds)).tolist())
        positions, weights, sizes = [], [], []
        for own, grid in zip(blocks, kinds.tolist(), strict=True):
            (x, of_x), (y, of_y) = (
                _interpolate(starts[own, i], bins[own, i], self._size[1 - i], grid[i], size[1 - i])
                for i in (0, 1)
            )
            image = rois[own, 0].to(torch.int32)[:, None, None]
            y = (image * size[0] + y) * size[1]
            positions.append((y[:, :, None, :, None] + x[:, None, :, None, :]).flatten())
            of_both = of_y[:, :, None, :, None] * of_x[:, None, :, None, :]
            weights.append(of_both.flatten() / max(grid[0] * grid[1], 1))
            num_bins = len(own) * self._size[0] * self._size[1]
            sizes.append(torch.full((num_bins,), 4 * grid[0] * grid[1], dtype=torch.int32))
        return _Matrix(*map(torch.cat, (positions, weights, sizes)), boxes)


_ENTRIES_AT_ONCE = 2**22  # some 100 MB with what sorts them


class _Matrix(NamedTuple):
    """A sparse matrix: of its entries, bin by bin, the columns and values."""

    positions: Tensor  # among all images' features, int32
    weights: Tensor
    sizes: Tensor  # number of entries of each bin, int32
    boxes: Tensor  # whose bins these are: an order of all boxes, int64


def _interpolate(
    start: Tensor, bin_size: Tensor, num_bins: int, num_points: int, extent: int
) -> tuple[Tensor, Tensor]:
    """Neighbours of the points of each bin along one axis, and the weights of these.

    Args:
        start: where each box starts, (R,), in the features' pixels.
        bin_size: extent of its bins, (R,).
        num_bins: of a box.
        num_points: of a bin.
        extent: of the features.

    Returns:
        Both (R, num_bins, 2 num_points); int32, and of the boxes' dtype.
    """
    place = torch.arange(num_bins, dtype=start.dtype)[:, None]
    inside = torch.arange(num_points, dtype=start.dtype) + 0.5
    start, bin_size = start[:, None, None], bin_size[:, None, None]
    point = start + place * bin_size + inside * bin_size / num_points
    # What is more than a pixel outside is 0; nearer points are moved to the border.
    counts = (point >= -1) & (point <= extent)
    point = point.clamp(min=0, max=extent - 1)
    lower = point.floor()
    upper = (lower + 1).clamp(max=extent - 1)
    part = point - lower
    neighbours = torch.stack([lower, upper], dim=-1).flatten(2).to(torch.int32)
    return neighbours, torch.stack([(1 - part) * counts, part * counts], dim=-1).flatten(2)


def _multiply(columns: Tensor, values: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """The product of a sparse matrix, whose rows start there among its entries, with ``rows``."""
    return F.embedding_bag(columns, rows, starts, mode="sum", per_sample_weights=values)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, pooler: ParallelROIAlign) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.pooler = features.shape, pooler
        return pooler.pool(features.detach(), rois)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pooler.spread(gradient, *ctx.saved_tensors, ctx.shape), None, None


def _in_threads(function: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    if len(parts) == 1:
        return [function(parts[0])]
    with ThreadPoolExecutor(len(parts) - 1) as threads:
        others = [threads.submit(function, part) for part in parts[1:]]
        return [function(parts[0]), *(other.result() for other in others)]


ROI_ALIGNS = {"torchvision": ParallelROIAlign, "sparse": SparseROIAlign}  # by MODEL.ROI_ALIGN


def use_roi_align(model: nn.Module, kind: type[ParallelROIAlign] = ParallelROIAlign) -> None:
    """Replaces detectron2's own ROIAlign wherever a model has it; others stay."""
    poolers = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if type(child) in (ROIAlign, ParallelROIAlign)
    ]
    for owner, name, pooler in poolers:
        setattr(owner, name, kind.like(pooler))
