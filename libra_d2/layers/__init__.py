"""Layers: the non-local block and the balanced feature pyramid."""

from .balanced_feature_pyramid import REFINE_TYPES, BalancedFeaturePyramid
from .non_local import NonLocal2d

__all__ = ["REFINE_TYPES", "BalancedFeaturePyramid", "NonLocal2d"]
