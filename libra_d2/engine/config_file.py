"""Reads a config file and overrides, with an error a user can act on."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from libra_d2.config import NUM_CLASSES, add_libra_config, get_key, list_keys, set_key, suggest

from .arithmetic import ZooConfig
from .config_checks import check_config
from .launch import AUTO, settle_device

__all__ = ["ObjectsAside", "load_config", "tell_changes"]

_PLAIN = (bool, int, float, str, list, tuple)
# The first are where it lies, the others are not read again.
_NOT_READ_AGAIN = ("OUTPUT_DIR", "train.output_dir", "MODEL.WEIGHTS", "train.init_checkpoint")


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    settle: Callable[[CfgNode], None] = lambda cfg: None,
) -> CfgNode:
    """Reads, checks and freezes a config.

    ``MODEL.DEVICE`` is "cuda" where there is a GPU and "cpu" elsewhere, unless it is given.

    Args:
        config_file: path of a yaml file, which may name a ``_BASE_``.
        opts: overrides, KEY VALUE KEY VALUE ...
        settle: changes the config before it is checked, in which numbers of classes that are not
            given are None: :func:`~libra_d2.engine.own_data.take_from_data`.

    Raises:
        ValueError: one sentence that names the file or key and what would be right.
    """
    cfg = get_cfg()
    add_libra_config(cfg)
    cfg.MODEL.DEVICE = AUTO
    num_classes = {key: get_key(cfg, key) for key in NUM_CLASSES}
    cfg = ZooConfig(cfg)
    if not PathManager.isfile(config_file):
        path = Path(config_file)
        others = [str(file) for file in path.parent.glob("*.yaml")]
        raise ValueError(f"config file '{config_file}' does not exist{suggest(str(path), others)}")
    defaults = cfg.clone()
    for key in NUM_CLASSES:
        set_key(cfg, key, None)
    with _one_sentence(cfg, f"config file '{config_file}'"):
        # Unsafe yaml, which detectron2 would allow, runs any code that a file names.
        cfg.merge_from_file(config_file, allow_unsafe=False)
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(f"overrides must be pairs KEY VALUE, got {' '.join(opts)}")
    with _one_sentence(cfg, "override"):
        cfg.merge_from_list(opts)
    for key, default in list_keys(defaults):
        value = get_key(cfg, key)
        if default is not None and value is None and key not in NUM_CLASSES:
            raise ValueError(f"{key} must be {_article(default)}, got None")
        if key in NUM_CLASSES and not isinstance(value, (int, type(None))):
            raise ValueError(f"{key} must be {_article(default)}, got {value}")
    cfg = CfgNode(cfg)
    settle(cfg)
    for key in NUM_CLASSES:
        if get_key(cfg, key) is None:
            set_key(cfg, key, num_classes[key])
    check_config(cfg)
    settle_device(cfg)
    cfg.freeze()
    return cfg


@contextlib.contextmanager
def _one_sentence(cfg: CfgNode, source: str) -> Iterator[None]:
    """Turns what yaml, yacs and fvcore raise for bad input into a ``ValueError``."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{source}: its _BASE_ leads back to itself") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not a text file") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        tag = re.search("for the tag '([^']+)'", getattr(error, "problem", None) or "")
        if tag:
            what = f"has the tag {tag[1]}{line}, which is not read because it could run any code"
            raise ValueError(f"{source} {what}") from error
        raise ValueError(f"{source} is not valid yaml{line}") from error
    except (KeyError, AssertionError, ValueError, OSError, AttributeError, TypeError) as error:
        message = str(error.args[0]) if error.args else str(error)
        missing = re.search(r"Non-existent (?:config )?key: ([\w.]+)", message)
        mismatch = re.search(r"Type mismatch .* vs. (.*)\) for config key: (\S+)", message)
        if mismatch:
            value, key = mismatch.groups()
            message = f"{key} must be {_article(get_key(cfg, key))}, got {value}"
        elif missing:
            key = missing[1]
            message = f"there is no key {key}{suggest(key, (name for name, _ in list_keys(cfg)))}"
        elif isinstance(error, FileNotFoundError):
            message = f"its _BASE_ '{error.filename}' does not exist"
        elif isinstance(error, (AttributeError, TypeError)):
            message = "it is not a mapping of config keys to values"
        raise ValueError(f"{source}: {' '.join(message.split())}") from error


def _article(value: Any) -> str:
    """What kind of value this is, for a sentence."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} such as {value!r}"


def tell_changes(output: Path, cfg: CfgNode | DictConfig) -> None:
    """Tells of values that are not those of the run in a folder, which is resumed."""
    try:
        former = yaml.load((output / "config.yaml").read_text(), ObjectsAside)
        former = dict(list_keys(former))
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
        return
    cfg = cfg if isinstance(cfg, CfgNode) else OmegaConf.to_container(cfg)
    changes = [
        f"{key} {former[key]} -> {value}"
        for key, value in list_keys(cfg)
        if isinstance(former.get(key), _PLAIN)
        and isinstance(value, _PLAIN)
        and _plain(value) != _plain(former[key])
        and key not in _NOT_READ_AGAIN
    ]
    if changes:
        print(
            f"resuming with other values: {'; '.join(changes)}. Rates and decays of the optimizer "
            "stay those of the checkpoint."
        )


class ObjectsAside(yaml.SafeLoader):
    """Reads a saved LazyConfig too, whose objects become None."""


ObjectsAside.add_multi_constructor("tag:yaml.org,2002:python/", lambda *args: None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):  # of a call, whose target may be a name or the thing itself
        return {key: _plain(x) for key, x in value.items() if key != "_target_"}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value if isinstance(value, _PLAIN) else None
