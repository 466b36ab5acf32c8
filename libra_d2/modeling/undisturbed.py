"""A forward pass that is not noticed by what comes after it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["undisturbed"]


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """A forward pass in here leaves no trace in random state and batch-norm statistics."""
    owners = [m for m in module.modules() if any(b is not None for b in m._buffers.values())]
    buffers = [dict(m._buffers) for m in owners]
    devices = {p.device for p in module.parameters() if p.is_cuda}
    try:
        # The pass gets copies: to write the old values back would change what a forward pass that
        # still waits for its backward pass has saved.
        for owner, own in zip(owners, buffers, strict=True):
            owner._buffers.update({k: b if b is None else b.clone() for k, b in own.items()})
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for owner, own in zip(owners, buffers, strict=True):
            owner._buffers.update(own)
        # Under AMP older versions of torch would reuse weights cast in here, without gradient.
        torch.clear_autocast_cache()
