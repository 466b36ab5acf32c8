"""Registries of switches: what a config may name, and how it is made from the config.

A switch is an object: a small class with keyword arguments, in a registry under the name that a
config gives it. The class method ``from_config(cfg, head)``, where it has one, makes it from a
config, ``head`` being the group that names it: "ROI_HEADS", "ROI_BOX_HEAD", "RPN" or "RETINANET" of
``cfg.MODEL``. A class without one is made without arguments.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

from detectron2.config import CfgNode
from fvcore.common.registry import Registry

from libra_d2.config import choose, get_key

__all__ = [
    "DoesNotFit",
    "SwitchRegistry",
    "check_bound",
    "from_keys",
    "naming_keys",
    "refuse_replaced",
]

T = TypeVar("T")


class DoesNotFit(ValueError):
    """What a switch raises if keys that are not its own forbid it: nobody minds if not chosen."""


class SwitchRegistry(Registry):
    """fvcore's registry, whose entries may have a name other than their class's.

    .. code-block:: python

        @NEGATIVE_SAMPLERS.register(name="mine")
        class MySampler: ...

    Args:
        name: what it is called when it is printed.
        keys: the config keys that name its entries.
    """

    def __init__(self, name: str, keys: Iterable[str]):
        super().__init__(name)
        self.config_keys = tuple(keys)

    def register(self, obj: Any = None, *, name: str | None = None) -> Any:
        """Registers a class, as a decorator or called; under ``name``, or else the class's own.

        Raises:
            AssertionError: if the name is taken.
        """
        if obj is None:
            return lambda registered: self.register(registered, name=name)
        self._do_register(name or obj.__name__, obj)
        return obj

    def names(self) -> list[str]:
        """What a config may say."""
        return [name for name, _ in self]

    def make(self, key: str, cfg: CfgNode) -> Any:
        """The switch that ``key``, such as "MODEL.RETINANET.MATCHER", names in the config.

        Raises:
            ValueError: naming the key, if there is no such switch or it refuses its options.
        """
        return _make(choose(key, cfg, dict(self)), key, cfg)

    def check(self, key: str, cfg: CfgNode) -> None:
        """Makes the switch that is chosen, and then ours, whose options may be wrong too.

        Raises:
            ValueError: see :meth:`make`.
        """
        self.make(key, cfg)
        for _, switch in self:
            # A user's own, if it is not chosen, may be made for another head or config.
            if switch.__module__.startswith("libra_d2."):
                with contextlib.suppress(DoesNotFit):
                    _make(switch, key, cfg)


def _make(switch: Callable, key: str, cfg: CfgNode) -> Any:
    return (
        switch.from_config(cfg, key.split(".")[1]) if hasattr(switch, "from_config") else switch()
    )


def from_keys(cls: type[T], cfg: CfgNode, group: str, *, prefix: str = "", **others: Any) -> T:
    """Makes a dataclass from the config keys that are named like its fields.

    Args:
        cls: the dataclass.
        cfg: the config.
        group: dotted name of the group that has the keys: of a field ``beta``, BETA.
        prefix: what the keys have before the fields' names.
        others: fields that do not come from keys of this group.

    Raises:
        ValueError: what the class raises, with the key's name for the field's.
    """
    options = get_key(cfg, group)
    names = [field.name for field in fields(cls) if field.name not in others]
    with naming_keys(cfg, group, prefix):
        return cls(**{name: options[prefix + name.upper()] for name in names}, **others)


@contextlib.contextmanager
def naming_keys(cfg: CfgNode, group: str, prefix: str = "") -> Iterator[None]:
    """Puts the config key into a ``ValueError`` that begins with the name of an argument."""
    try:
        yield
    except ValueError as error:
        argument, _, rest = str(error).partition(" ")
        key = prefix + argument.upper()
        named = f"{group}.{key} {rest}" if key in get_key(cfg, group) else f"{group}: {error}"
        raise ValueError(named) from None


def refuse_replaced(given: Iterable[str], replaced: Iterable[str], by: str) -> None:
    """Raises ``ValueError`` if an argument is given beside the one that takes its place."""
    for name in replaced:
        if name in given:
            raise ValueError(f"{name} has no effect beside {by}: give one of them")


def check_bound(negative_positive_ub: int) -> None:
    """Raises ``ValueError`` unless this is a bound on the negatives a positive."""
    is_whole = isinstance(negative_positive_ub, int)
    if not is_whole or (negative_positive_ub != -1 and not 1 <= negative_positive_ub <= 10**9):
        raise ValueError(
            "negative_positive_ub must be -1 (no bound) or a whole number of at least 1, got "
            f"{negative_positive_ub}"
        )
