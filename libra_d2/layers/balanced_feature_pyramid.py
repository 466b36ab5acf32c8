"""Balanced feature pyramid (Libra R-CNN, section 3.2)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .non_local import NonLocal2d

Norm = str | Callable[[int], nn.Module]

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


def _non_local(channels: int, norm: Norm) -> nn.Module:
    return NonLocal2d(channels)


def _conv(channels: int, norm: Norm) -> nn.Module:
    if isinstance(norm, str) and norm and norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)} or empty; got '{norm}'")
    make_norm = _NORMS.get(norm) if isinstance(norm, str) else norm
    conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=make_norm is None)
    nn.init.xavier_uniform_(conv.weight)
    block = OrderedDict(conv=conv)
    if make_norm is None:
        nn.init.zeros_(conv.bias)
    else:
        block["norm"] = make_norm(channels)
    block["relu"] = nn.ReLU()
    return nn.Sequential(block)


_REFINEMENTS = {
    "non_local": _non_local,
    "conv": _conv,
    "none": lambda channels, norm: nn.Identity(),
}
REFINE_TYPES = tuple(_REFINEMENTS)


class BalancedFeaturePyramid(nn.Module):
    r"""Strengthens all levels of a feature pyramid with the same integrated features.

    All levels are resized to one level's size and averaged,
    :math:`C = \frac{1}{L}\sum_l C_l`; the average is refined, resized back and added to each level
    (equation 4 and figure 4). Towards a smaller size levels are max pooled, towards a larger one
    interpolated to the nearest; sizes need not be multiples of each other.

    Args:
        in_channels: C, channels of every level.
        num_levels: L, number of levels.
        refine_level: index, from the finest, of the level at whose size the average is refined.
        refine_type: "non_local" (a non-local block, a new one being the identity), "conv" (one 3x3
            convolution and a ReLU) or "none" (no parameters).
        norm: normalization after the convolution of "conv"; "" for none, "BN", "SyncBN", "GN", or
            a function from the number of channels to a module.

    Shape:
        A list of L tensors ``(N, C, Hi, Wi)``, finest first, to a list of the same shapes.

    Raises:
        ValueError: if an option is out of its range or the levels do not fit it.
    """

    def __init__(
        self,
        in_channels: int,
        num_levels: int,
        refine_level: int = 2,
        refine_type: str = "non_local",
        norm: Norm = "",
    ):
        super().__init__()
        if not 0 <= refine_level < num_levels:
            raise ValueError(
                f"refine_level must be in [0, {num_levels - 1}] for {num_levels} levels, "
                f"got {refine_level}"
            )
        if refine_type not in REFINE_TYPES:
            raise ValueError(
                f"refine_type must be one of {', '.join(REFINE_TYPES)}; got '{refine_type}'"
            )
        self.in_channels = in_channels
        self.num_levels = num_levels
        self.refine_level = refine_level
        self.refine = _REFINEMENTS[refine_type](in_channels, norm)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        if len(levels) != self.num_levels:
            raise ValueError(f"expected {self.num_levels} levels, got {len(levels)}")
        is_eager = not (torch.jit.is_tracing() or torch.compiler.is_compiling())
        for i, level in enumerate(levels) if is_eager else ():
            if level.dim() != 4 or level.shape[1] != self.in_channels:
                raise ValueError(
                    f"level {i} must have shape (N, {self.in_channels}, H, W), "
                    f"got {tuple(level.shape)}"
                )
        pool, upsample = (_pool, _upsample) if is_eager else (_gather_maxima, _gather_nearest)
        # Levels above the refined one are finer, those below coarser, whatever their sizes.
        num_finer, num_coarser = self.refine_level, self.num_levels - 1 - self.refine_level
        toward = [pool] * num_finer + [None] + [upsample] * num_coarser
        back = [upsample] * num_finer + [None] + [pool] * num_coarser

        size = levels[self.refine_level].shape[-2:]
        integrated = sum(
            resize(level, size) if resize else level
            for resize, level in zip(toward, levels, strict=True)
        )
        refined = self.refine(integrated / self.num_levels)
        return [
            _add(level, resize(refined, level.shape[-2:]) if resize else refined, refined)
            for resize, level in zip(back, levels, strict=True)
        ]


def _add(level: Tensor, resized: Tensor, refined: Tensor) -> Tensor:
    # What gathers maxima needs them for its gradient.
    is_shared = resized is refined or torch.jit.is_tracing() or torch.compiler.is_compiling()
    if is_shared or resized.dtype != level.dtype:
        return level + resized
    # In place: the finest level is by far the largest, and nobody needs a second copy of it.
    return resized.add_(level)


def _pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Adaptive max pooling; where sizes nest by plain pooling, as exact and faster."""
    (height, width), (out_height, out_width) = x.shape[-2:], size
    if height == out_height and width == out_width:
        return x
    if height % out_height == 0 and width % out_width == 0:
        return F.max_pool2d(x, kernel_size=(height // out_height, width // out_width))
    return F.adaptive_max_pool2d(x, (out_height, out_width))


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=tuple(size), mode="nearest")


# The same two for a graph that has to hold at other sizes than those it was recorded at: no
# decision depends on a size, all of them are arithmetic on indices. A maximum over a rectangle is
# taken along its rows and then its columns.


def _gather_maxima(x: Tensor, size: Sequence[int]) -> Tensor:
    """What adaptive max pooling computes, at any size."""
    rows, columns = (_windows(n, m, x.device) for n, m in zip(x.shape[-2:], size, strict=True))
    return x[:, :, rows].amax(dim=3)[..., columns].amax(dim=4)


def _windows(in_size: int, out_size: int, device: torch.device) -> Tensor:
    """The inputs that each output of adaptive pooling sees, (out_size, most); the last repeats."""
    i = torch.arange(out_size, device=device).unsqueeze(1)
    offset = torch.arange(in_size // out_size + 2, device=device)
    # From floor(i in / out) up to, and without, ceil((i + 1) in / out).
    return torch.minimum(i * in_size // out_size + offset, ((i + 1) * in_size - 1) // out_size)


def _gather_nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """What nearest interpolation computes, at any size."""
    for dim, out_size in zip((-2, -1), size, strict=True):
        # In float32, as torch computes it: exact arithmetic differs at some sizes (50 to 198).
        i = torch.arange(out_size, device=x.device, dtype=torch.float32)
        x = x.index_select(dim, (i * (x.shape[dim] / out_size)).to(torch.int64))
    return x
