"""detectron2's default trainer, on CPU processes too, with a choice of optimizer and evaluator."""

import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from libra_d2.config import get_key, set_key
from libra_d2.data.loader import (
    TestLoader,
    TrainLoader,
    build_test_loader,
    build_train_loader,
    test_loader_of,
)

from .average import WeightAverage
from .evaluators import choose_evaluator
from .following import BestModel, SampledRois
from .hooks import EpochLogger
from .resumable import ResumableTrainer
from .speed import amp_dtype, fuse, keep_memory, prepare_model
from .step import CheckedTrainer
from .stopping import Signals
from .validation import loss_mapper
from .weights import WeightsCheckpointer

__all__ = ["LibraTrainer"]

# What grows and shrinks with the number of processes, and ends nothing at 0.
_SCALED = ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
# Of what detectron2 has test-time augmentation.
_AUGMENTED = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.KEYPOINT_ON": False,
    "MODEL.LOAD_PROPOSALS": False,
}


class LibraTrainer(ResumableTrainer):
    """Trains and evaluates any detectron2 model from its config.

    Args:
        cfg: the config of the run.
    """

    def __init__(self, cfg: CfgNode):
        # The parent always hands DDP a GPU, and offers no place to say otherwise: this constructor
        # goes through its steps, with the wrapping of the model as a method.
        TrainerBase.__init__(self)
        if logging.getLogger("detectron2").getEffectiveLevel() > logging.INFO:
            setup_logger()
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SOLVER.KEEP_MEMORY:
            keep_memory()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        if cfg.SOLVER.FUSED:
            fuse(optimizer)
        loader = self.build_train_loader(cfg)
        self._trainer = CheckedTrainer(
            self.distribute_model(cfg, model),
            loader,
            optimizer,
            dtype=amp_dtype(cfg),
            max_skipped=cfg.SOLVER.MAX_SKIPPED,
            logs_grad_norm=cfg.SOLVER.LOG_GRAD_NORM,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.average = WeightAverage(model, ema.DECAY) if (ema := cfg.SOLVER.EMA).ENABLED else None
        self.checkpointer = WeightsCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            class_names=cfg.DATASETS.CLASS_NAMES,
            average=self.average,
            trainer=weakref.proxy(self),
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.signals = Signals()
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """The parent's, in which nothing that was above 0 becomes 0."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        is_frozen = scaled.is_frozen()
        scaled.defrost()
        for key in _SCALED:
            if get_key(cfg, key) > 0:
                set_key(scaled, key, max(1, get_key(scaled, key)))
        if is_frozen:
            scaled.freeze()
        return scaled

    @classmethod
    def check(cls, cfg: CfgNode, num_processes: int) -> None:
        """Refuses what this trainer can't do.

        Args:
            cfg: the config of a run.
            num_processes: over which the batch is divided.

        Raises:
            ValueError: naming the key, its value and what would be right.
        """
        batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        divisor = f"SOLVER.REFERENCE_WORLD_SIZE {reference}" if reference else ""
        if not reference or batch % reference == 0:
            batch = cls.auto_scale_workers(cfg, num_processes).SOLVER.IMS_PER_BATCH
            divisor = f"the {num_processes} processes" if batch % num_processes else ""
        if divisor:
            raise ValueError(f"SOLVER.IMS_PER_BATCH must be a multiple of {divisor}, got {batch}")
        pixels = min(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if batch // num_processes * pixels * 3 * 4 > memory:  # three channels of float32
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {batch} cannot be held in {memory >> 30} GiB of memory"
            )
        for key, needed in _AUGMENTED.items() if cfg.TEST.AUG.ENABLED else ():
            if get_key(cfg, key) != needed:
                got = get_key(cfg, key)
                raise ValueError(f"TEST.AUG.ENABLED True needs {key} {needed}, got {got}")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """detectron2's model of the config, prepared for speed as it says."""
        return prepare_model(super().build_model(cfg), cfg)

    @classmethod
    def distribute_model(cls, cfg: CfgNode, model: nn.Module, **options: Any) -> nn.Module:
        """Wraps the model for data-parallel training if there are several processes.

        Args:
            cfg: the config of the run.
            model: on its device.
            options: of torch's ``DistributedDataParallel``.
        """
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        device_ids = [comm.get_local_rank()] if on_gpu else None
        return create_ddp_model(
            model, **{"broadcast_buffers": False, "device_ids": device_ids, **options}
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """detectron2's SGD, or AdamW, as ``SOLVER.OPTIMIZER`` says."""
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """The parent's; tells if a warm-up is too long to reach the learning rate."""
        solver = cfg.SOLVER
        steps = solver.STEPS if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else ()
        end = min([solver.MAX_ITER, *steps])
        if solver.BASE_LR and solver.WARMUP_ITERS >= end:
            logging.getLogger(__name__).warning(
                "SOLVER.WARMUP_ITERS %d is not below %d, where the learning rate falls or training "
                "ends: SOLVER.BASE_LR is never reached",
                *(solver.WARMUP_ITERS, end),
            )
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """A loader of the training data that a resumed run takes up where it was."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        """A loader of a data set to evaluate on."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_loss_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        """A loader of a data set to measure losses on.

        Raises:
            ValueError: if it has no annotations.
        """
        mapper = loss_mapper(cfg)
        parts = build_detection_test_loader.from_config(cfg, dataset_name, mapper)
        if "annotations" not in parts["dataset"][0]:
            raise ValueError(f"'{dataset_name}' has no annotations, from which losses come")
        return test_loader_of(parts, cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator that the data set's metadata names: COCO, LVIS or Pascal VOC."""
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return choose_evaluator(dataset_name)(dataset_name, output_dir=output_folder)

    def build_writers(self) -> list[EventWriter]:
        """The parent's; with ``SOLVER.MAX_EPOCHS`` the log tells the epoch too."""
        ret = super().build_writers()
        if self.cfg.SOLVER.MAX_EPOCHS:
            for writer in ret:
                if isinstance(writer, CommonMetricPrinter):
                    writer.logger = EpochLogger(writer.logger, {"trainer": weakref.proxy(self)})
        return ret

    def build_hooks(self) -> list[HookBase]:
        """The parent's, and those that the config's keys of evaluation and pictures ask for."""
        ret, cfg = super().build_hooks(), self.cfg
        if self.average:
            ret.insert(0, hooks.CallbackHook(after_step=_update_average))
        if cfg.VIS_PERIOD and hasattr(self.checkpointer.model, "roi_heads"):
            _insert(ret, SampledRois(cfg.VIS_PERIOD))
        if cfg.TEST.AUG.ENABLED:
            _insert(ret, hooks.EvalHook(0, self._test_with_augmentation))
        if cfg.TEST.BEST_METRIC:
            best = (cfg.TEST.EVAL_PERIOD, self.checkpointer, cfg.TEST.BEST_METRIC)
            _insert(ret, BestModel(*best, cfg.TEST.PATIENCE))
        return ret

    def add_hooks(self, added: Sequence[HookBase]) -> None:
        """Registers hooks, before those that write what is logged.

        Args:
            added: in their order.
        """
        before, self._hooks = self._hooks, []
        for hook in added:
            _insert(before, hook)
        self.register_hooks(before)

    def _test_with_augmentation(self) -> dict:
        results = self.or_stop(lambda: self.test_with_augmentation(self.cfg, self.tested_model))
        if comm.is_main_process():
            # Those that TEST.EXPECTED_RESULTS is compared with.
            self._last_eval_results = {**self._last_eval_results, **results}
        return results

    @classmethod
    def test_with_augmentation(
        cls, cfg: CfgNode, model: nn.Module, output_folder: str | None = None
    ) -> dict:
        """Evaluates with test-time augmentation, ``TEST.AUG``; names of results end in ``_TTA``."""
        folder = f"{output_folder or os.path.join(cfg.OUTPUT_DIR, 'inference')}_TTA"
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": values for name, values in results.items()}


def _update_average(trainer: LibraTrainer) -> None:
    trainer.average.update()


def _insert(registered: list[HookBase], hook: HookBase) -> None:
    """Before the writers, which come last, so that its numbers are written too."""
    writers = [i for i, other in enumerate(registered) if isinstance(other, hooks.PeriodicWriter)]
    registered.insert(min(writers, default=len(registered)), hook)
