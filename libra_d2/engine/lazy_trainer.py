"""Trains what a LazyConfig describes."""

import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from libra_d2.data.loader import (
    TRAIN_PARTS,
    TestLoader,
    TrainLoader,
    test_loader_of,
    train_loader_of,
)

from .lazy_config import build_lazy_model
from .speed import prepare_model
from .trainer import LibraTrainer

__all__ = ["LazyTrainer"]


class LazyTrainer(LibraTrainer):
    """The trainer whose parts are those of a LazyConfig.

    Args:
        cfg: a :class:`~libra_d2.engine.lazy_config.RunConfig`.
    """

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """``model``, on the run's device."""
        model = build_lazy_model(cfg)
        logging.getLogger("detectron2").info("Model:\n%s", model)
        return prepare_model(model, cfg)

    @classmethod
    def distribute_model(cls, cfg: CfgNode, model: nn.Module) -> nn.Module:
        """The parent's, with ``train.ddp``."""
        return super().distribute_model(cfg, model, **cfg.lazy.train.ddp)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """``optimizer``, of the model's parameters."""
        optimizer = cfg.lazy.optimizer.copy()
        optimizer.params.model = model
        return instantiate(optimizer)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """``lr_multiplier``."""
        return LRMultiplier(optimizer, instantiate(cfg.lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """``dataloader.train``; if it is detectron2's loader, a resumed run takes it up again."""
        loader = cfg.lazy.dataloader.train
        if _target(loader) is not build_detection_train_loader:
            return instantiate(loader)
        parts = _arguments(loader)
        if not isinstance(parts["dataset"], list) or set(parts) - TRAIN_PARTS:
            return instantiate(loader)
        return train_loader_of(parts, cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        """``dataloader.test``."""
        loader = _of_data_set(cfg, dataset_name).dataloader.test
        if _target(loader) is not build_detection_test_loader:
            return instantiate(loader)
        return test_loader_of(_arguments(loader), cfg)

    @classmethod
    def build_loss_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        """``dataloader.test``, with the annotations that ``dataloader.train`` has.

        Raises:
            ValueError: if they are not detectron2's.
        """
        loader = _of_data_set(cfg, dataset_name).dataloader.test
        mapper = loader.get("mapper")
        is_known = _target(loader) is build_detection_test_loader and mapper is not None
        if not is_known or _target(mapper) is not DatasetMapper:
            raise ValueError(
                "TEST.LOSSES needs detectron2's build_detection_test_loader and DatasetMapper in "
                "dataloader.test"
            )
        mapper.is_train = True
        trained = cfg.lazy.dataloader.train.get("mapper") or {}
        for name in ("use_instance_mask", "use_keypoint", "instance_mask_format"):
            if name in trained:
                mapper[name] = trained[name]
        return test_loader_of(_arguments(loader), cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """``dataloader.evaluator``, or that which the data set's metadata names."""
        evaluator = cfg.lazy.dataloader.get("evaluator")
        if evaluator is None:
            return super().build_evaluator(cfg, dataset_name, output_folder)
        evaluator = _of_data_set(cfg, dataset_name).dataloader.evaluator
        arguments = inspect.signature(_target(evaluator)).parameters
        if "dataset_name" in arguments:
            evaluator.dataset_name = dataset_name
        if "output_dir" in arguments:
            folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
            evaluator.output_dir = evaluator.get("output_dir") or folder
        return instantiate(evaluator)


def _of_data_set(cfg: CfgNode, dataset_name: str) -> DictConfig:
    """The LazyConfig, whose test data are this set alone."""
    lazy = cfg.lazy.copy()
    if OmegaConf.select(lazy, "dataloader.test.dataset.names") is not None:
        lazy.dataloader.test.dataset.names = dataset_name
    return lazy


def _target(call: DictConfig) -> Callable:
    return locate(call._target_) if isinstance(call._target_, str) else call._target_


def _arguments(call: DictConfig) -> dict[str, Any]:
    """What a call gets, itself made."""
    return {
        name: instantiate(call[name]) if OmegaConf.is_config(call[name]) else call[name]
        for name in call
        if name != "_target_"
    }
