"""What a config takes from its data: the classes, and how long an epoch is."""

import json
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.file_io import PathManager

from libra_d2.config import NUM_CLASSES, get_key, set_key
from libra_d2.data.coco_json import read_coco
from libra_d2.data.digits import SPLITS
from libra_d2.data.sources import Source, check_classes, is_source, open_source, register_source

from .weights import class_names_of

__all__ = ["register_data", "take_from_data"]

# Keys in epochs, and those in iterations that they settle.
_EPOCHS = {
    "SOLVER.MAX_EPOCHS": "SOLVER.MAX_ITER",
    "SOLVER.STEP_EPOCHS": "SOLVER.STEPS",
    "SOLVER.WARMUP_EPOCHS": "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_EPOCHS": "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_EPOCHS": "TEST.EVAL_PERIOD",
}

_MOST_EPOCHS = 1_000_000


def take_from_data(cfg: CfgNode, *, eval_only: bool = False, opts: Sequence[str] = ()) -> None:
    """Fills in what the data settle, in place, and registers the data sets named in place.

    ``DATASETS.CLASS_NAMES`` and the numbers of classes, where they are not given, are those of the
    training data; keys in epochs become iterations.

    Args:
        cfg: a config whose numbers of classes are None if they are not given.
        eval_only: whether training data do not matter.
        opts: overrides that the config has taken, KEY VALUE KEY VALUE ...

    Raises:
        ValueError: naming a data set or key, if data cannot be read or do not fit each other.
    """
    used = (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)
    sources = {name: open_source(name) for name in dict.fromkeys(used) if is_source(name)}
    names = list(cfg.DATASETS.CLASS_NAMES)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"DATASETS.CLASS_NAMES must be names, each once, got {names}")
    if not names:
        first = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if not eval_only else cfg.DATASETS.TEST
        names = _classes(first[0], sources) if first else []
        trained = class_names_of(cfg.MODEL.WEIGHTS)
        # Weights know the order of their classes.
        if trained and (eval_only or set(trained) == set(names)):
            names = trained
        cfg.DATASETS.CLASS_NAMES = names
    for name in used if names else ():
        own = _classes(name, sources)
        check_classes(name, own, names)
        if name in sources:
            register_source(sources[name], names, cfg.DATASETS.ON_BAD_BOXES == "drop")
        elif own and own != names:
            raise ValueError(
                f"data set '{name}' counts its classes another way than those trained on: "
                f"{', '.join(own)}, not {', '.join(names)}; named in place, as coco:..., they "
                "are matched by name"
            )
    for key in NUM_CLASSES:
        _fill_num_classes(cfg, key, len(names))
    if not eval_only and any(get_key(cfg, key) for key in _EPOCHS):
        for key, iterations in _EPOCHS.items():
            if get_key(cfg, key) and iterations in opts[::2]:
                raise ValueError(
                    f"{iterations} has no effect beside {key} {get_key(cfg, key)}, which is in "
                    f"epochs; give {key} 0, or that alone"
                )
        _fill_iterations(cfg)


def register_data(cfg: CfgNode, eval_only: bool = False) -> None:
    """Registers the data sets named in place, in a process that has not yet."""
    for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        if is_source(name) and name not in DatasetCatalog.list():
            drop = cfg.DATASETS.ON_BAD_BOXES == "drop"
            register_source(open_source(name), cfg.DATASETS.CLASS_NAMES, drop)


def _classes(name: str, sources: dict[str, Source]) -> list[str]:
    """The names of a data set's classes; none if it does not tell.

    What is wrong with a registered one is said by the checks of data sets.
    """
    if name in sources:
        return sources[name].classes
    if name not in DatasetCatalog.list():
        return []
    metadata = MetadataCatalog.get(name)
    classes, file = metadata.get("thing_classes"), metadata.get("json_file")
    if name in SPLITS:  # which may not have been drawn yet
        return list(classes)
    try:
        if not all(map(PathManager.exists, filter(None, (file, metadata.get("dirname"))))):
            return []
        return list(classes or (read_coco(file).class_names() if file else ()))
    except (OSError, ValueError):
        return []


def _fill_num_classes(cfg: CfgNode, key: str, number: int) -> None:
    given = get_key(cfg, key)
    if given is None:
        set_key(cfg, key, number or None)
    is_read = ("RetinaNet" in cfg.MODEL.META_ARCHITECTURE) == ("RETINANET" in key)
    if given is not None and number and is_read and given != number:
        raise ValueError(
            f"{key} is {given} but the data have {number} classes; leave it out and it is what "
            "the data have"
        )


def _fill_iterations(cfg: CfgNode) -> None:
    minimum = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    for key in _EPOCHS:
        for epochs in _as_list(get_key(cfg, key)):
            if not isinstance(epochs, (int, float)) or not 0 <= epochs <= _MOST_EPOCHS:
                raise ValueError(
                    f"{key} must be in [0, {_MOST_EPOCHS}] epochs, got {get_key(cfg, key)}"
                )
    if cfg.SOLVER.IMS_PER_BATCH < 1:
        return  # which is said by the checks of the config
    if 0 < cfg.SOLVER.MAX_EPOCHS <= cfg.SOLVER.WARMUP_EPOCHS:
        raise ValueError(
            f"SOLVER.WARMUP_EPOCHS must be below SOLVER.MAX_EPOCHS {cfg.SOLVER.MAX_EPOCHS:g}, got "
            f"{cfg.SOLVER.WARMUP_EPOCHS:g}"
        )
    try:
        filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        images = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty, minimum)
    except (AssertionError, KeyError, OSError, json.JSONDecodeError, UnicodeDecodeError):
        return  # which is said, better, by the checks of data sets
    length = len(images) / cfg.SOLVER.IMS_PER_BATCH
    for key, iterations in _EPOCHS.items():
        numbers = [max(1, round(epochs * length)) for epochs in _as_list(get_key(cfg, key))]
        if get_key(cfg, key):
            set_key(cfg, iterations, tuple(numbers) if key == "SOLVER.STEP_EPOCHS" else numbers[0])


def _as_list(epochs: float | Sequence[float]) -> Sequence[float]:
    return epochs if isinstance(epochs, (list, tuple)) else [epochs]
