"""The balanced feature pyramid around any other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor

from libra_d2.layers import BalancedFeaturePyramid

__all__ = ["BalancedPyramid", "levels_to_balance"]


class BalancedPyramid(Backbone):
    """A feature pyramid whose levels are balanced (Libra R-CNN, section 3.2).

    In files of weights the pyramid's have the names they have without it, and those of ``bfp``
    stand beside them: what the plain model has saved loads here, with only ``bfp`` missing, and the
    reverse.

    Args:
        pyramid: any backbone with several levels.
        bfp: balances as many levels, of as many channels, as are chosen.
        in_features: names of the levels to balance, finest first; empty for all. Levels not named
            pass through.

    Raises:
        ValueError: if the pyramid is balanced already, or levels and ``bfp`` do not fit.
    """

    def __init__(
        self, pyramid: Backbone, bfp: BalancedFeaturePyramid, in_features: Sequence[str] = ()
    ):
        super().__init__()
        names = levels_to_balance(pyramid, in_features)
        channels = pyramid.output_shape()[names[0]].channels
        if (bfp.num_levels, bfp.in_channels) != (len(names), channels):
            raise ValueError(
                f"bfp must be for {len(names)} levels, {', '.join(names)}, of {channels} channels, "
                f"got one for {bfp.num_levels} of {bfp.in_channels}"
            )
        self.pyramid = pyramid
        self.bfp = bfp
        self.in_features = names
        self._prefix = ""  # where in the model it stands, once weights have been loaded
        self.register_load_state_dict_post_hook(_name_plainly)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Levels by name, as the pyramid gives them, from images (N, C, H, W)."""
        features = self.pyramid(x)
        balanced = self.bfp([features[name] for name in self.in_features])
        return {**features, **dict(zip(self.in_features, balanced, strict=True))}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.pyramid.output_shape()

    @property
    def size_divisibility(self) -> int:
        return self.pyramid.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.pyramid.padding_constraints

    def __getattr__(self, name: str) -> Any:
        """What the pyramid has, such as ``bottom_up``, is found here too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pyramid":  # not there yet, while it is made or copied
                raise
            return getattr(self.pyramid, name)

    # The names of weights. A checkpoint's reader sees those of state_dict.

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False) -> dict[str, Tensor]:
        options = {"prefix": prefix, "keep_vars": keep_vars}
        destination = self.pyramid.state_dict(destination=destination, **options)
        options["prefix"] += "bfp."
        return self.bfp.state_dict(destination=destination, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args) -> None:
        self._prefix = prefix
        for name in list(state_dict):
            if name.startswith(prefix) and not name.startswith(f"{prefix}bfp."):
                state_dict[f"{prefix}pyramid.{name[len(prefix) :]}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _name_plainly(balanced: BalancedPyramid, incompatible_keys: NamedTuple) -> None:
    """Calls missing and unexpected weights what files call them."""
    inner = f"{balanced._prefix}pyramid."
    for keys in incompatible_keys:
        keys[:] = [
            balanced._prefix + key.removeprefix(inner) if key.startswith(inner) else key
            for key in keys
        ]


def levels_to_balance(pyramid: Backbone, in_features: Sequence[str] = ()) -> list[str]:
    """The names of the levels of a pyramid that are to be balanced, finest first.

    Args:
        pyramid: not balanced yet.
        in_features: see :class:`BalancedPyramid`.

    Raises:
        ValueError: if the levels are not the pyramid's, or differ in channels.
    """
    if isinstance(pyramid, BalancedPyramid):
        raise ValueError("pyramid must be a plain one, got one that is balanced already")
    shapes = pyramid.output_shape()
    names = sorted(shapes, key=lambda name: shapes[name].stride)
    chosen = [name for name in names if name in in_features] if in_features else names
    if in_features and chosen != list(in_features):
        raise ValueError(
            f"in_features must be some of {', '.join(names)}, in this order; "
            f"got {', '.join(in_features)}"
        )
    channels = {name: shapes[name].channels for name in chosen}
    if len(set(channels.values())) != 1:
        raise ValueError(f"in_features must be levels of the same channels, got {channels}")
    return chosen
