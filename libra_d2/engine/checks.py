"""Checks before a run: whatever would make it fail later is one clear sentence now."""

import math
from pathlib import Path
from urllib.parse import urlparse

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from detectron2.utils.file_io import PathManager
from torch import nn

from libra_d2.checkpoint import read_weights
from libra_d2.config import choose, get_key
from libra_d2.data.checks import check_dataset
from libra_d2.data.proposals import check_proposals

from .config_file import config_files
from .evaluators import choose_evaluator
from .trainer import LibraTrainer

__all__ = ["check_run", "remove_run"]

# The names they hold, and detectron2's for "none".
_REGISTRIES = (
    ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, None),
    ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY, None),
    ("MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY, "PrecomputedProposals"),
    ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, None),
    ("MODEL.ROI_BOX_HEAD.NAME", ROI_BOX_HEAD_REGISTRY, ""),
)
# What a training run leaves in its output folder.
_RUN_FILES = (
    "config.yaml",
    "events.out.tfevents.*",
    "last_checkpoint",
    "log.txt*",
    "metrics.json",
    "model_*.pth",
    "inference/*",
)
# By which of them a run is known.
_RUN_MARKS = ("last_checkpoint", "metrics.json", "model_*.pth")


def check_run(
    cfg: CfgNode,
    *,
    config_file: str = "",
    eval_only: bool,
    resume: bool = False,
    overwrite: bool = False,
    num_processes: int = 1,
) -> None:
    """Checks names, data sets, weights, the output folder, and that the model can be built.

    Embedded data sets that the run needs are drawn. Nothing else is written.

    Args:
        cfg: the run's config.
        config_file: where it was read from.
        eval_only: whether it only evaluates, so that the training data does not matter.
        resume: whether it may go on with what is in the output folder.
        overwrite: whether it may replace that.
        num_processes: over which the batch is divided.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    for key, registry, none in _REGISTRIES:
        if get_key(cfg, key) != none:
            choose(key, cfg, dict(registry))
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    output = Path(cfg.OUTPUT_DIR)
    _check_folder(output)
    if not eval_only:
        _check_training(cfg, num_processes)
        inputs = [*config_files(config_file), cfg.MODEL.WEIGHTS]
        if cfg.MODEL.LOAD_PROPOSALS:
            inputs += [*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST]
        _check_run_in(output, resume, overwrite, inputs)
    _check_augmentation(cfg)
    _check_datasets(cfg, eval_only)
    _check_proposals(cfg, eval_only)
    try:
        model = build_model(_on_cpu(cfg))
    except ValueError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"no model can be built from this config: {what}") from error
    last = output / "last_checkpoint"
    if resume and last.exists():
        _check_weights(str(output / last.read_text().strip()), model, "the last checkpoint")
    else:
        if eval_only and not cfg.MODEL.WEIGHTS:
            raise ValueError("MODEL.WEIGHTS is empty; name the checkpoint to evaluate")
        _check_weights(cfg.MODEL.WEIGHTS, model, "MODEL.WEIGHTS")


def _on_cpu(cfg: CfgNode) -> CfgNode:
    """The config on the CPU: a model there costs the GPUs, of other processes too, nothing."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _check_augmentation(cfg: CfgNode) -> None:
    """Checks that detectron2 has test-time augmentation for this model."""
    allowed = {
        "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
        "MODEL.KEYPOINT_ON": (False,),
        "MODEL.LOAD_PROPOSALS": (False,),
    }
    for key, values in allowed.items() if cfg.TEST.AUG.ENABLED else ():
        if get_key(cfg, key) not in values:
            raise ValueError(
                f"TEST.AUG.ENABLED True needs {key} {values[0]}, got {get_key(cfg, key)}"
            )


def remove_run(output: Path) -> None:
    """Removes the files of a training run from its output folder, and nothing else."""
    for file in _run_files(output):
        file.unlink()


def _run_files(output: Path) -> list[Path]:
    return [file for pattern in _RUN_FILES for file in output.glob(pattern) if file.is_file()]


def _check_folder(output: Path) -> None:
    existing = output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or str(output) in ("", "."):
        raise ValueError(f"OUTPUT_DIR must be a folder of its own, got '{output}'")


def _check_training(cfg: CfgNode, num_processes: int) -> None:
    try:
        batch = LibraTrainer.auto_scale_workers(cfg, num_processes).SOLVER.IMS_PER_BATCH
    except AssertionError:
        raise ValueError(
            "SOLVER.IMS_PER_BATCH must be a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE}, got {cfg.SOLVER.IMS_PER_BATCH}"
        ) from None
    if batch % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the {num_processes} processes, got {batch}"
        )
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a registered data set")


def _check_run_in(output: Path, resume: bool, overwrite: bool, inputs: list[str]) -> None:
    """Checks that no run in the output folder is lost unasked, nor what the new one reads."""
    files = _run_files(output)
    if any(file.match(mark) for mark in _RUN_MARKS for file in files) and not overwrite:
        if not resume:
            raise ValueError(
                f"OUTPUT_DIR '{output}' holds a training run; give --resume to go on with it, "
                "--overwrite to replace it, or another OUTPUT_DIR"
            )
        if not (output / "last_checkpoint").exists():
            raise ValueError(
                f"OUTPUT_DIR '{output}' holds a training run but no last_checkpoint to resume "
                "from; give --overwrite to replace it, or another OUTPUT_DIR"
            )
    if overwrite:
        lost = {file.resolve() for file in files}
        for path in inputs:
            if path and Path(str(path)).resolve() in lost:
                raise ValueError(
                    f"--overwrite would remove '{path}', which this run reads; copy it elsewhere "
                    "or give another OUTPUT_DIR"
                )


def _check_datasets(cfg: CfgNode, eval_only: bool) -> None:
    key = "RETINANET" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "ROI_HEADS"
    is_agnostic = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    classes = {
        "num_classes": math.inf if is_agnostic else cfg.MODEL[key].NUM_CLASSES,
        "num_classes_key": f"MODEL.{key}.NUM_CLASSES",
    }
    fields = ("segmentation",) * cfg.MODEL.MASK_ON + ("keypoints",) * cfg.MODEL.KEYPOINT_ON
    for name in () if eval_only else cfg.DATASETS.TRAIN:
        check_dataset(name, for_training=True, fields=fields, **classes)
    for name in cfg.DATASETS.TEST:
        check_dataset(name, for_training=False, **classes)
        choose_evaluator(name)


def _check_proposals(cfg: CfgNode, eval_only: bool) -> None:
    if cfg.MODEL.LOAD_PROPOSALS and cfg.MODEL.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        raise ValueError(
            "MODEL.LOAD_PROPOSALS True needs MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals, "
            f"got {cfg.MODEL.PROPOSAL_GENERATOR.NAME}"
        )
    if not cfg.MODEL.LOAD_PROPOSALS:
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
            raise ValueError(
                "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals needs MODEL.LOAD_PROPOSALS True"
            )
        return
    for split in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        datasets, key = cfg.DATASETS[split], f"DATASETS.PROPOSAL_FILES_{split}"
        files = get_key(cfg, key)
        if len(files) != len(datasets):
            raise ValueError(
                f"{key} must name a file for each of the {len(datasets)} data sets of "
                f"DATASETS.{split}, got {len(files)}"
            )
        for dataset, file in zip(datasets, files, strict=True):
            check_proposals(dataset, file, key)


def _check_weights(weights: str, model: nn.Module, name: str) -> None:
    """Checks that a file of weights is there, can be read, and has something for the model."""
    url = urlparse(weights)
    if not weights or url.scheme:
        return
    if not PathManager.isfile(url.path):
        raise ValueError(f"{name} '{weights}' does not exist or is not a file")
    if url.path.endswith(".pkl") or "matching_heuristics" in url.query:
        return  # detectron2 matches its names
    try:
        checkpoint = read_weights(url.path)
        state = checkpoint.get("model", checkpoint)
        shapes = {key: value.shape for key, value in state.items() if hasattr(value, "shape")}
    except Exception as error:
        raise ValueError(f"{name} '{weights}' is not a checkpoint of a torch model") from error
    if checkpoint.get("matching_heuristics"):
        return
    own = model.state_dict()
    if not any(shapes.get(key) == value.shape for key, value in own.items()):
        raise ValueError(f"{name} '{weights}' has no weights for this model: no name and shape fit")
