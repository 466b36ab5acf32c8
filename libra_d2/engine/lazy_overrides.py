"""Overrides of a LazyConfig, as they come from the command line."""

import inspect
from collections.abc import Container, Sequence
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from libra_d2.config import suggest

__all__ = ["check_place", "split"]


def split(opts: Sequence[str], keys: Container[str]) -> tuple[list[str], list[str]]:
    """KEY VALUE pairs in front, of these keys, and PLACE=VALUE.

    Raises:
        ValueError: if there is anything else.
    """
    first = next((i for i in range(0, len(opts), 2) if "=" in opts[i]), len(opts))
    arguments, overrides = list(opts[:first]), list(opts[first:])
    wrong = [o for o in overrides if "=" not in o] + [k for k in arguments[::2] if k not in keys]
    wrong += arguments[-1:] if len(arguments) % 2 else []
    if wrong:
        raise ValueError(
            f"overrides of a LazyConfig must be such as train.max_iter=1000, got '{wrong[0]}'"
        )
    return arguments, overrides


def check_place(lazy: DictConfig, place: str) -> None:
    """Checks that an override names what is there, or an argument of what will be called there.

    Raises:
        ValueError: if it does not; it names the nearest that does.
    """
    node, known = lazy, ""
    *groups, leaf = place.split(".")
    for group in groups:
        known += f"{group}."
        inner = _get(node, group)
        if not OmegaConf.is_config(inner):
            raise _no_place(known[:-1], node, group)
        node = inner
    arguments = _arguments(node)
    if leaf not in node and _get(node, leaf) is None and not {leaf, "**"} & set(arguments):
        raise _no_place(place, node, leaf)


def _no_place(place: str, node: Any, leaf: str) -> ValueError:
    names = [*map(str, node), *_arguments(node)] if isinstance(node, DictConfig) else []
    return ValueError(f"the config has no {place}{suggest(leaf, names)}")


def _get(node: Any, name: str) -> Any:
    try:
        return node[int(name)] if OmegaConf.is_list(node) else node.get(name)
    except (ValueError, IndexError, OmegaConfBaseException):
        return None


def _arguments(node: Any) -> list[str]:
    """The names of a call's arguments; "**" if it takes any."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target is None:
        return []
    try:
        target = locate(target) if isinstance(target, str) else target
        is_class = inspect.isclass(target)
        target = inspect.unwrap(target.__init__ if is_class else target)
        arguments = list(inspect.signature(target).parameters.values())[is_class:]
    except (ImportError, TypeError, ValueError):  # which is said when it is called
        return ["**"]
    names = [a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
    return names + ["**"] * any(a.kind == a.VAR_KEYWORD for a in arguments)
