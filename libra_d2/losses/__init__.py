"""Losses as pure functions of tensors, one a file."""

from .balanced_l1 import balanced_l1_loss
from .carl import carl_loss
from .focal import focal_loss

__all__ = ["balanced_l1_loss", "carl_loss", "focal_loss"]
