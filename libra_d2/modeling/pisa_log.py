"""Numbers of PISA's reweighting, for metrics.json and TensorBoard."""

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

__all__ = ["log_reweighting"]


def log_reweighting(losses: Tensor, before: Tensor, after: Tensor) -> None:
    """Logs the positives' total classification loss without and with ISR-P, which shall be equal.

    As ``pisa/positive_loss`` and ``pisa/positive_loss_reweighted``, with one transfer to the host.

    Args:
        losses: classification loss of each positive, (N,).
        before: its weight without ISR-P, (N,).
        after: its weight with it, (N,).
    """
    sums = torch.stack([(losses * before).sum(), (losses * after).sum()]).tolist()
    storage = get_event_storage()
    for name, value in zip(("positive_loss", "positive_loss_reweighted"), sums, strict=True):
        storage.put_scalar(f"pisa/{name}", value)
