"""The moving average of a run's weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["WeightAverage"]


class WeightAverage:
    """An exponential moving average of a model's weights and buffers, by torch's own means.

    After n steps it keeps the share min(decay, (1 + n) / (10 + n)) of what it is, so that a short
    run's average does not consist of its first weights.

    Args:
        model: whose weights; not wrapped for several processes.
        decay: the share of the average that a step keeps, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.reset()

    def reset(self) -> None:
        """Starts anew, from the model's weights of now."""
        self._averaged = AveragedModel(self.model, multi_avg_fn=self._add, use_buffers=True)
        self._averaged.module.eval()
        self.is_loaded = False

    @property
    def module(self) -> nn.Module:
        """The model with averaged weights, in evaluation mode."""
        return self._averaged.module

    def update(self) -> None:
        """Takes the weights of one more step in."""
        self._averaged.update_parameters(self.model)

    def state_dict(self) -> dict:
        """What a checkpoint has beside the average: the weights that are trained."""
        return {"steps": int(self._averaged.n_averaged), "trained": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a checkpoint, whose average the model has loaded as its weights."""
        self.reset()
        self._averaged.n_averaged.fill_(state["steps"])
        self.model.load_state_dict(state["trained"])
        self.is_loaded = True

    def _add(self, averaged: Sequence[Tensor], current: Sequence[Tensor], steps: Tensor) -> None:
        num_averaged = int(self._averaged.n_averaged)  # which is on the CPU, where steps may not be
        share = min(self.decay, (1 + num_averaged) / (10 + num_averaged))
        with torch.no_grad():
            get_ema_multi_avg_fn(share)(averaged, current, steps)
