"""Precision: a detector whose networks compute in half of it, and a GPU's TF32."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compute_in", "tf32"]

# Of two-stage and of one-stage detectors, as far as they have them. What decides on boxes, and
# compares scores, stays in float32.
_NETWORKS = ("backbone", "head", "roi_heads.box_head")


def compute_in(dtype: torch.dtype, model: nn.Module, *, for_graph: bool = False) -> nn.Module:
    """A copy of a detector whose backbone and heads compute in another dtype.

    Args:
        dtype: float16 or bfloat16.
        model: detectron2's, in evaluation mode.
        for_graph: whether it will be traced: the cast of a weight that is used again would be a
            constant there, beside the weight.
    """
    model = copy.deepcopy(model)
    for name in _NETWORKS:
        *owners, own = name.split(".")
        owner = model
        for part in owners:
            owner = getattr(owner, part, None)
        network = getattr(owner, own, None)
        if isinstance(network, nn.ModuleList):
            setattr(owner, own, nn.ModuleList(_In(dtype, one, not for_graph) for one in network))
        elif isinstance(network, nn.Module):
            setattr(owner, own, _In(dtype, network, not for_graph))
    return model


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, a GPU's products and convolutions of float32 may, or may not, be in TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class _In(nn.Module):
    """A network in another dtype, with outputs of float32."""

    def __init__(self, dtype: torch.dtype, network: nn.Module, keeps_casts: bool):
        super().__init__()
        self.dtype, self.network, self.keeps_casts = dtype, network, keeps_casts

    def forward(self, *args: Any) -> Any:
        device = next(self.network.parameters()).device.type
        with torch.autocast(device, self.dtype, cache_enabled=self.keeps_casts):
            return _to_float(self.network(*args))

    def __getattr__(self, name: str) -> Any:
        """What the network has, such as ``size_divisibility``, is found here too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":  # not there yet, while it is copied
                raise
            return getattr(self.network, name)


def _to_float(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return {name: _to_float(value) for name, value in outputs.items()}
    return type(outputs)(map(_to_float, outputs))
