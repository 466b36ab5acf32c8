"""detectron2's default trainer, on CPU processes too, with a choice of optimizer and evaluator."""

import contextlib
import importlib.util
import io
import os
import weakref
from collections.abc import Callable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from libra_d2.checkpoint import read_weights

__all__ = ["LibraTrainer", "WeightsCheckpointer"]


class WeightsCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which reads ``.safetensors`` too."""

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".safetensors"):
            return {"model": read_weights(filename)["model"]}
        return super()._load_file(filename)


_EVALUATORS = {
    "coco": COCOEvaluator,
    "lvis": LVISEvaluator,
    "pascal_voc": lambda name, output_dir: PascalVOCDetectionEvaluator(name),
}


class LibraTrainer(DefaultTrainer):
    """Trains and evaluates any detectron2 model from its config.

    Args:
        cfg: the config of the run.
    """

    def __init__(self, cfg: CfgNode):
        # The parent always hands DDP a GPU, and offers no place to say otherwise: this constructor
        # goes through its steps, with the wrapping of the model as a method.
        TrainerBase.__init__(self)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        make_trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = make_trainer(self.distribute_model(cfg, model), loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = WeightsCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def distribute_model(cls, cfg: CfgNode, model: nn.Module) -> nn.Module:
        """Wraps the model for data-parallel training if there are several processes."""
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        device_ids = [comm.get_local_rank()] if on_gpu else None
        return create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)

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
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator that the data set's metadata names: COCO, LVIS or Pascal VOC."""
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return choose_evaluator(dataset_name)(dataset_name, output_dir=output_folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        # pycocotools prints tables of its own; detectron2 logs the same numbers. What is logged is
        # not caught: its handlers hold the real stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            return super().test(cfg, model, evaluators)


def choose_evaluator(dataset_name: str) -> Callable[..., DatasetEvaluator]:
    """The class of evaluator that a data set's metadata names.

    Raises:
        ValueError: if it names none, or one whose package is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _EVALUATORS:
        raise ValueError(
            f"data set '{dataset_name}' has evaluator_type '{kind}' in its metadata; "
            f"there is {', '.join(_EVALUATORS)}"
        )
    if kind == "lvis" and importlib.util.find_spec("lvis") is None:
        raise ValueError(f"data set '{dataset_name}' needs the package lvis: pip install lvis")
    return _EVALUATORS[kind]
