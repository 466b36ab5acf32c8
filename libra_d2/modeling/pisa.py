"""PISA's switches of output layers and RetinaNet, and the numbers of its reweighting."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage
from torch import Tensor

from libra_d2.config import get_key
from libra_d2.ranking import check_importance

from .switches import from_keys

__all__ = ["Carl", "IsrPositive", "log_reweighting"]


@dataclass(frozen=True, kw_only=True)
class _Importance:
    """How much a sample weighs: ``(bias + (1 - bias) u) ** k``.

    Raises:
        ValueError: if k or bias is out of its range.
    """

    group: ClassVar[str]  # of its config keys
    k: float
    bias: float

    def __post_init__(self):
        check_importance(self.k, self.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Self | None:
        """What the keys of its group ask for; None if it is off."""
        part = from_keys(cls, cfg, cls.group)
        return part if get_key(cfg, cls.group).ENABLED else None


@dataclass(frozen=True, kw_only=True)
class IsrPositive(_Importance):
    """Importance-based reweighting of positives (ISR-P, section 4.1); u is by rank.

    Its arguments are those of :func:`libra_d2.ranking.reweight_positives`.
    """

    group: ClassVar[str] = "MODEL.PISA.ISR_POSITIVE"
    k: float = 2.0
    bias: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Carl(_Importance):
    """Classification-aware regression loss (CARL, section 4.3); u is the true class's probability.

    Its arguments are those of :func:`libra_d2.losses.carl_loss`.
    """

    group: ClassVar[str] = "MODEL.PISA.CARL"
    k: float = 1.0
    bias: float = 0.2


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
