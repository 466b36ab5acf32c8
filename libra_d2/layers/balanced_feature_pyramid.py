"""Balanced feature pyramid (Libra R-CNN, section 3.2)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

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
        for i, level in enumerate(levels):
            if level.dim() != 4 or level.shape[1] != self.in_channels:
                raise ValueError(
                    f"level {i} must have shape (N, {self.in_channels}, H, W), "
                    f"got {tuple(level.shape)}"
                )
        size = levels[self.refine_level].shape[-2:]
        # Levels above the refined one are finer, those below coarser, whatever their sizes.
        integrated = sum(
            _pool(level, size) if i < self.refine_level else _upsample(level, size)
            for i, level in enumerate(levels)
        )
        refined = self.refine(integrated / self.num_levels)
        return [
            _add_resized(level, refined, _upsample if i < self.refine_level else _pool)
            for i, level in enumerate(levels)
        ]


def _add_resized(
    level: Tensor, refined: Tensor, resize: Callable[[Tensor, Sequence[int]], Tensor]
) -> Tensor:
    resized = resize(refined, level.shape[-2:])
    if resized is refined or resized.dtype != level.dtype:
        return level + resized
    # In place: the finest level is by far the largest, and nobody needs a second copy of it.
    return resized.add_(level)


def _pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Max pools to ``size``; where sizes nest by plain pooling: as exact, faster, exportable."""
    (height, width), (out_height, out_width) = x.shape[-2:], size
    if height == out_height and width == out_width:
        return x
    if height % out_height == 0 and width % out_width == 0:
        return F.max_pool2d(x, kernel_size=(height // out_height, width // out_width))
    return F.adaptive_max_pool2d(x, (out_height, out_width))


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=tuple(size), mode="nearest")
