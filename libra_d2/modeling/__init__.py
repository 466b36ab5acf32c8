"""detectron2 adapters. Importing this package registers them with detectron2."""

from . import backbones, roi_heads, rpn  # noqa: F401  (imported to register)
from .backbones import build_bfp_backbone, build_small_resnet_fpn_backbone
from .fast_rcnn import LibraFastRCNNOutputLayers
from .roi_heads import LibraROIHeads
from .rpn import LibraRPN
from .samplers import NEGATIVE_SAMPLERS, POSITIVE_SAMPLERS, SamplingMatcher

__all__ = [
    "NEGATIVE_SAMPLERS",
    "POSITIVE_SAMPLERS",
    "LibraFastRCNNOutputLayers",
    "LibraROIHeads",
    "LibraRPN",
    "SamplingMatcher",
    "build_bfp_backbone",
    "build_small_resnet_fpn_backbone",
]
