"""The balanced feature pyramid around any other."""

from collections.abc import Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

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
        # Torch's former way to call it.
        destination, prefix, keep_vars = (*args, *(destination, prefix, keep_vars)[len(args) :])
        options = {"prefix": prefix, "keep_vars": keep_vars}
        destination = self.pyramid.state_dict(destination=destination, **options)
        options["prefix"] += "bfp."
        return self.bfp.state_dict(destination=destination, **options)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args
    ) -> None:
        plain = [
            n for n in state_dict if n.startswith(prefix) and not n.startswith(f"{prefix}bfp.")
        ]
        plain = {name: state_dict.pop(name) for name in plain}
        _load(self.pyramid, plain, prefix, local_metadata, *args)
        # Torch goes on to the pyramid by the name it has here, and shall find what is there.
        state_dict.update(self.pyramid.state_dict(prefix=f"{prefix}pyramid."))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args
) -> None:
    """Loads a module and all in it, as torch does; ``metadata`` is that of what holds it."""
    own = dict(metadata)
    if "version" in own:  # torch wrote the file, whose versions are then those of today's modules
        own["version"] = module._version
    module._load_from_state_dict(state_dict, prefix, own, *args)
    for name, child in module.named_children():
        inner = f"{prefix}{name}."
        theirs = {key: value for key, value in state_dict.items() if key.startswith(inner)}
        _load(child, theirs, inner, metadata, *args)


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
