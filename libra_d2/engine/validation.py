"""The losses on data that is not trained on."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .random_state import get_running_numbers, kept_random_state, set_running_numbers

__all__ = ["loss_mapper", "mean_losses"]

# What a training changes, or draws, in a layer.
_AS_IN_TESTS = (_BatchNorm, _DropoutNd)


def loss_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper of a config, which keeps annotations and resizes as tests do."""
    return DatasetMapper(
        **{
            **DatasetMapper.from_config(cfg, True),
            "augmentations": build_augmentation(cfg, False),
            "recompute_boxes": False,
        }
    )


def mean_losses(model: nn.Module, loader: Iterable[list[dict]]) -> dict[str, float]:
    """A model's losses, averaged over images, without anything of a training: no gradients, no
    dropout, no statistics of a batch, and the same samples are drawn whenever it is called.

    Args:
        model: any that gives losses in training mode.
        loader: this process's share of batches, with ``instances``.

    Returns:
        Each loss by name, and ``total_loss``; the same in all processes. Nothing, with a warning,
        where the model's boxes are not finite.
    """
    sums, number, problem = Counter(), 0, ""
    with kept_random_state(), _as_for_losses(model), torch.no_grad(), EventStorage():
        torch.manual_seed(0)
        try:
            for batch in loader:
                for name, loss in model(batch).items():
                    sums[name] += len(batch) * float(loss)
                number += len(batch)
        except FloatingPointError as error:  # an RPN's, of boxes
            problem = str(error)
    shares = comm.all_gather((sums, number, problem))
    if problems := [problem for *_, problem in shares if problem]:
        logging.getLogger(__name__).warning("losses cannot be measured: %s", problems[0])
        return {}
    number = sum(number for _, number, _ in shares)
    sums = {name: sum(share[name] for share, *_ in shares) for name in shares[0][0]}
    losses = {name: value / max(number, 1) for name, value in sums.items()}
    return {**losses, "total_loss": sum(losses.values())}


@contextlib.contextmanager
def _as_for_losses(model: nn.Module) -> Iterator[None]:
    """Lets a model give losses, and leaves it as it was."""
    modes = {module: module.training for module in model.modules()}
    periods = {m: m.vis_period for m in model.modules() if getattr(m, "vis_period", 0)}
    running = get_running_numbers(model)
    try:
        for module in modes:
            as_in_tests = isinstance(module, _AS_IN_TESTS) or type(module).__name__ == "DropPath"
            module.training = not as_in_tests
        for module in periods:
            module.vis_period = 0
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, period in periods.items():
            module.vis_period = period
        for name in get_running_numbers(model).keys() - running.keys():
            prefix, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(prefix), attribute)
        set_running_numbers(model, running)
