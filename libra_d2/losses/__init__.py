"""Losses as pure functions of tensors, one a file."""

from .balanced_l1 import balanced_l1_loss

__all__ = ["balanced_l1_loss"]
