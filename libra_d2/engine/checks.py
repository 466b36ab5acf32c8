"""Checks before a run: whatever would make it fail later is one clear sentence now."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from torch import nn

from libra_d2.config import choose, get_key
from libra_d2.data.checks import check_dataset
from libra_d2.data.proposals import check_proposals

from .arithmetic import config_files
from .evaluators import choose_evaluator
from .following import check_best_metric
from .output_dir import check_output_dir
from .plain_errors import plain_errors
from .trainer import LibraTrainer
from .weights import check_classes_of, check_weights, find_checkpoint

__all__ = ["check_run", "check_weights_of_run"]

# The names they hold, and detectron2's for "none".
_REGISTRIES = (
    ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, None),
    ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY, None),
    ("MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY, "PrecomputedProposals"),
    ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, None),
    ("MODEL.ROI_BOX_HEAD.NAME", ROI_BOX_HEAD_REGISTRY, ""),
)


def check_run(
    cfg: CfgNode,
    *,
    config_file: str = "",
    eval_only: bool,
    resume: bool = False,
    overwrite: bool = False,
    num_processes: int = 1,
    builds_model: bool = True,
    trainer_class: type[LibraTrainer] = LibraTrainer,
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
        builds_model: whether to build the model, on the CPU, to check it and its weights; what is
            rehearsed in this process is built there.
        trainer_class: what trains or evaluates it.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    for key, registry, none in _REGISTRIES:
        if get_key(cfg, key) != none:
            choose(key, cfg, dict(registry))
    output = Path(cfg.OUTPUT_DIR)
    inputs = [*config_files(config_file), cfg.MODEL.WEIGHTS]
    inputs += [*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST]
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name in DatasetCatalog.list():
            metadata = MetadataCatalog.get(name)
            inputs += [metadata.get("json_file"), *metadata.get("files", ())]
    options = {"resume": resume, "overwrite": overwrite}
    check_output_dir(output, training=not eval_only, inputs=inputs, **options)
    trainer_class.check(cfg, 1 if eval_only else num_processes)
    if not eval_only:
        check_best_metric(cfg)
    _check_datasets(cfg, eval_only)
    for split in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        check_proposals(cfg, split)
    if builds_model:
        with plain_errors(cfg):
            model = trainer_class.build_model(_on_cpu(cfg))
        check_weights_of_run(cfg, model, eval_only=eval_only, resume=resume)


def check_weights_of_run(
    cfg: CfgNode, model: nn.Module, *, eval_only: bool = False, resume: bool = False
) -> None:
    """Checks the weights that a run starts with.

    Args:
        cfg: the run's config.
        model: what they are for.
        eval_only: whether it only evaluates.
        resume: whether it goes on from a checkpoint, if there is one.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    checkpoint = find_checkpoint(Path(cfg.OUTPUT_DIR)) if resume else ""
    if checkpoint:
        check_weights(checkpoint, model, "the last checkpoint", all_of_them=True)
        check_classes_of(checkpoint, cfg.DATASETS.CLASS_NAMES, "the last checkpoint")
    else:
        if eval_only and not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty; name a data set to evaluate on with --val")
        if eval_only and not cfg.MODEL.WEIGHTS:
            raise ValueError("MODEL.WEIGHTS is empty; name the checkpoint to evaluate")
        check_weights(cfg.MODEL.WEIGHTS, model, "MODEL.WEIGHTS")
        if eval_only:
            check_classes_of(cfg.MODEL.WEIGHTS, cfg.DATASETS.CLASS_NAMES, "MODEL.WEIGHTS")


def _on_cpu(cfg: CfgNode) -> CfgNode:
    """The config on the CPU: a model there costs the GPUs, of other processes too, nothing."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = "cpu", False
    return cfg


def _check_datasets(cfg: CfgNode, eval_only: bool) -> None:
    key = "RETINANET" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "ROI_HEADS"
    is_agnostic = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    classes = {
        "num_classes": None if is_agnostic else cfg.MODEL[key].NUM_CLASSES,
        "num_classes_key": f"MODEL.{key}.NUM_CLASSES",
    }
    options = {
        "allow_outside": cfg.DATASETS.ALLOW_OUTSIDE,
        "filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "drop_bad_boxes": cfg.DATASETS.ON_BAD_BOXES == "drop",
    }
    fields = ()
    if cfg.MODEL.MASK_ON:
        fields += ("polygons" if cfg.INPUT.MASK_FORMAT == "polygon" else "segmentation",)
    fields += ("keypoints",) * cfg.MODEL.KEYPOINT_ON
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a data set with --train")
    for name in () if eval_only else cfg.DATASETS.TRAIN:
        check_dataset(name, for_training=True, fields=fields, **classes, **options)
    for name in cfg.DATASETS.TEST:
        check_dataset(name, for_training=False, fields=fields, **classes, **options)
        choose_evaluator(name)
