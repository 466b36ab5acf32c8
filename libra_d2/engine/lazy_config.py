"""Reads a LazyConfig and overrides, with an error a user can act on.

A LazyConfig is a Python file: reading it runs it.
"""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from libra_d2 import zoo
from libra_d2.config import NUM_CLASSES, add_libra_config, get_key, set_key, suggest

from .arithmetic import ZooConfig
from .config_checks import check_config
from .config_file import ObjectsAside
from .launch import AUTO, settle_device
from .lazy_overrides import check_place, split

__all__ = [
    "RunConfig",
    "build_lazy_model",
    "in_places",
    "is_lazy_yaml",
    "load_lazy_config",
    "to_save",
]

# What a run looks at, under detectron2's key; and where a LazyConfig has it.
_PLACES = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "FLOAT32_PRECISION": "train.float32_precision",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "MODEL.CHANNELS_LAST": "train.channels_last",
    "MODEL.ROI_ALIGN": "train.roi_align",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.FAST": "train.fast",
    "SOLVER.FUSED": "train.fused",
    "SOLVER.KEEP_MEMORY": "train.keep_memory",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.MAX_TO_KEEP": "train.checkpointer.max_to_keep",
    "SOLVER.LOG_PERIOD": "train.log_period",
    "SOLVER.MAX_SKIPPED": "train.max_skipped",
    "SOLVER.EMA.ENABLED": "train.ema.enabled",
    "SOLVER.EMA.DECAY": "train.ema.decay",
    "SOLVER.LOG_GRAD_NORM": "train.log_grad_norm",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.BEST_METRIC": "train.best_metric",
    "TEST.PATIENCE": "train.patience",
    "TEST.LOSSES": "train.test_losses",
    "TEST.AP_PER_CLASS": "train.ap_per_class",
    "TEST.NUM_SHOWN": "train.num_shown",
    "VIS_PERIOD": "train.vis_period",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATASETS.CLASS_NAMES": "dataloader.class_names",
    "DATASETS.ON_BAD_BOXES": "dataloader.on_bad_boxes",
    "DATASETS.ALLOW_OUTSIDE": "dataloader.allow_outside",
    "DATALOADER.MAX_BAD_IMAGES": "dataloader.max_bad_images",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATALOADER.PIN_MEMORY": "dataloader.pin_memory",
    "DATALOADER.CACHE": "dataloader.cache",
    "INPUT.RESIZE": "dataloader.resize",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "dataloader.train.dataset.filter_empty",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.KEYPOINT_ON": "dataloader.train.mapper.use_keypoint",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
}
# One of these keys, alone: not in a path, nor the beginning of another.
_KEY = re.compile(rf"(?<![\w./])({'|'.join(map(re.escape, _PLACES))})(?![\w/]|\.\w)")
# Those a file need not have.
_DEFAULTS = {
    "train": {
        "seed": -1,
        "float32_precision": "",
        "channels_last": False,
        "roi_align": "torchvision",
        "fast": False,
        "fused": False,
        "keep_memory": False,
        "amp": {"enabled": False, "dtype": "auto"},
        "max_skipped": 0,
        "ema": {"enabled": False, "decay": 0.9998},
        "log_grad_norm": False,
        "best_metric": "",
        "patience": 0,
        "test_losses": False,
        "ap_per_class": True,
        "num_shown": 0,
        "vis_period": 0,
    },
    "dataloader": {
        "class_names": [],
        "on_bad_boxes": "refuse",
        "allow_outside": False,
        "max_bad_images": 0,
        "pin_memory": False,
        "cache": "",
        "resize": "pil",
    },
}
_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


class RunConfig(CfgNode):
    """What a run looks at of a LazyConfig, under detectron2's keys; ``lazy`` is the whole."""

    lazy: DictConfig | None = None  # none of the groups in it

    def __getstate__(self) -> dict:
        # Configs hold functions without a name, which other processes get by value.
        return {**self.__dict__, "lazy": cloudpickle.dumps(self.lazy)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, lazy=cloudpickle.loads(state["lazy"]))


def load_lazy_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    settle: Callable[[CfgNode], None] = lambda cfg: None,
) -> RunConfig:
    """Reads, checks and freezes a LazyConfig, which may have any model, optimizer and loader.

    Args:
        config_file: path of a Python file.
        opts: overrides: PLACE=VALUE ..., after KEY VALUE pairs of what ``train_net.py``'s own
            arguments say, in detectron2's keys.
        settle: see :func:`~libra_d2.engine.load_config`.

    Raises:
        ValueError: one sentence that names the file or place and what would be right.
    """
    arguments, overrides = split(opts, _PLACES)
    lazy = _read(config_file)
    is_given = dict.fromkeys(_PLACES, False)
    for override in overrides:
        place = override.partition("=")[0].lstrip("+")
        check_place(lazy, place)
        with _one_sentence(f"override '{override}'"):
            LazyConfig.apply_overrides(lazy, [override])
        is_given.update({key: True for key, own in _PLACES.items() if own == place})
    with _in_places():
        cfg = _look_at(lazy, config_file)
        # The files of detectron2's zoo name a GPU whether or not there is one.
        if not is_given["MODEL.DEVICE"] and cfg.MODEL.DEVICE == "cuda":
            cfg.MODEL.DEVICE = AUTO
        for key, value in zip(arguments[::2], arguments[1::2], strict=True):
            if key.startswith("DATASETS.") and OmegaConf.select(lazy, _PLACES[key]) is None:
                raise ValueError(
                    f"config file '{config_file}' has no {_PLACES[key]}, where data sets named on "
                    "the command line would go; its loader is its own"
                )
            if not is_given[key]:
                cfg.merge_from_list([key, value])
        former = {key: get_key(cfg, key) for key in NUM_CLASSES}
        for key in NUM_CLASSES:
            if not is_given[key]:
                set_key(cfg, key, None)
        settle(cfg)
        _keep_classes(cfg, lazy, former)
        settle_device(cfg)
        check_config(cfg)
        _write_back(cfg, lazy)
    run = RunConfig(cfg)
    run.__dict__["lazy"] = lazy
    run.freeze()
    return run


def build_lazy_model(cfg: RunConfig) -> nn.Module:
    """The model of a LazyConfig, on the run's device."""
    return instantiate(cfg.lazy.model).to(cfg.MODEL.DEVICE)


def is_lazy_yaml(file: Path) -> bool:
    """Whether a yaml file was saved from a LazyConfig; nothing of it is run."""
    try:
        return "dataloader" in yaml.load(file.read_text(), ObjectsAside)
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return False


def to_save(cfg: CfgNode) -> CfgNode | DictConfig:
    """The config of a run, as it is written to its folder: a LazyConfig if it came from one."""
    if not isinstance(cfg, RunConfig):
        return cfg
    lazy = cfg.lazy.copy()
    _write_back(cfg, lazy)
    return lazy


def _read(config_file: str) -> DictConfig:
    if not Path(config_file).is_file():
        others = [str(file) for file in Path(config_file).parent.glob("*.py")]
        raise ValueError(
            f"config file '{config_file}' does not exist{suggest(config_file, others)}"
        )
    with _one_sentence(f"config file '{config_file}'", config_file):
        lazy = LazyConfig.load(config_file)
    missing = [part for part in _PARTS if part not in lazy]
    if missing:
        raise ValueError(
            f"config file '{config_file}' defines no {' and no '.join(missing)}; a LazyConfig to "
            f"train with defines {', '.join(_PARTS)}"
        )
    defaults = OmegaConf.create(_DEFAULTS, flags={"allow_objects": True})
    defaults.train.merge_with(zoo.get_config("common/train.py").train)
    for name, values in defaults.items():
        for key, value in values.items():
            if OmegaConf.is_dict(value):
                value.merge_with(lazy[name].get(key, {}))
                lazy[name][key] = value
            elif key not in lazy[name]:
                lazy[name][key] = value
    return lazy


def _look_at(lazy: DictConfig, config_file: str) -> CfgNode:
    """The config of detectron2's keys."""
    cfg = get_cfg()
    add_libra_config(cfg)
    cfg = ZooConfig(cfg)
    for key, place in _PLACES.items():
        try:
            value = OmegaConf.select(lazy, place)
        except OmegaConfBaseException as error:
            what = " ".join(str(error).split())
            raise ValueError(f"config file '{config_file}': {place}: {what}") from error
        if value is None:
            continue
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        default = get_key(cfg, key)
        if isinstance(default, (tuple, list)) and isinstance(value, str):
            value = [value]
        if type(value) is not type(default) and not _is_like(value, default):
            raise ValueError(f"{key} must be such as {default!r}, got {value!r}")
        set_key(cfg, key, type(default)(value))
    model = lazy.model
    if "roi_heads" not in model:
        kind = "RetinaNet" if "num_classes" in model else "ProposalNetwork"
        cfg.MODEL.META_ARCHITECTURE = kind
    return CfgNode(cfg)


def _is_like(value: Any, default: Any) -> bool:
    numbers = (int, float)
    if isinstance(default, bool) or isinstance(value, bool):
        return False
    if isinstance(default, (tuple, list)):
        return isinstance(value, (tuple, list))
    return isinstance(default, float) and isinstance(value, numbers)


def _keep_classes(cfg: CfgNode, lazy: DictConfig, former: dict[str, int]) -> None:
    """Keeps numbers of classes that nothing has settled, and tells of those that have changed."""
    for key in NUM_CLASSES:
        if get_key(cfg, key) is None:
            set_key(cfg, key, former[key])
        elif get_key(cfg, key) != former[key] and OmegaConf.select(lazy, _PLACES[key]):
            change = f"{former[key]} -> {get_key(cfg, key)}"
            print(f"{_PLACES[key]} {change}, as many as the data have")


def _write_back(cfg: CfgNode, lazy: DictConfig) -> None:
    """Gives a LazyConfig what arguments and data have settled."""
    for key, place in _PLACES.items():
        value, is_there = get_key(cfg, key), OmegaConf.select(lazy, place) is not None
        if isinstance(value, (tuple, list)):
            value = list(value)
            if key in ("DATASETS.TRAIN", "DATASETS.TEST") and len(value) == 1:
                value = value[0]
        if is_there and OmegaConf.select(lazy, place) != value:
            OmegaConf.update(lazy, place, value, merge=False)


def in_places(message: str) -> str:
    """A message with a LazyConfig's places in place of detectron2's keys."""
    return _KEY.sub(lambda match: _PLACES[match[0]], message)


@contextlib.contextmanager
def _in_places() -> Iterator[None]:
    """Names a LazyConfig's places, not detectron2's keys, in what is said to be wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(in_places(str(error))) from error


@contextlib.contextmanager
def _one_sentence(source: str, file: str = "") -> Iterator[None]:
    """Turns whatever a config's code raises into a ``ValueError`` that names the line."""
    try:
        yield
    except Exception as error:
        error_type, text = type(error).__name__, " ".join(str(error).split())
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if file and Path(f.filename).resolve() == Path(file).resolve()]
        where = f" (line {own[-1].lineno})" if own else ""
        raise ValueError(f"{source}{where}: {error_type}: {text}") from error
