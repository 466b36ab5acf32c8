"""Numbers of PISA's reweighting, for metrics.json and TensorBoard."""

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

__all__ = ["log_reweighting"]


def log_reweighting(losses: Tensor, before: Tensor, after: Tensor) -> None:
    """Logs the positives' total classification loss without and with ISR-P, which shall be equal.

    As ``pisa/isr_p_before`` and ``pisa/isr_p_after``, with one transfer to the host.

    Args:
        losses: classification loss of each positive, (N,).
        before: its weight without ISR-P, (N,).
        after: its weight with it, (N,).
    """
    sums = torch.stack([(losses * before).sum(), (losses * after).sum()]).tolist()
    storage = get_event_storage()
    # Without "loss" in their names, with which detectron2 would print them as losses on the screen.
    for name, value in zip(("isr_p_before", "isr_p_after"), sums, strict=True):
        storage.put_scalar(f"pisa/{name}", value)
