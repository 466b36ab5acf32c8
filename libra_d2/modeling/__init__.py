"""detectron2 adapters. Importing this package registers them with detectron2."""

from . import backbones, mask_head, pyramids, retinanet, roi_heads, rpn  # noqa: F401  (imported to register)
from .backbones import (
    build_bfp_backbone,
    build_retinanet_small_resnet_fpn_backbone,
    build_small_resnet_fpn_backbone,
)
from .box_losses import BOX_LOSSES
from .classification_losses import CLASSIFICATION_LOSSES
from .fast_rcnn import LibraFastRCNNOutputLayers
from .mutual_guidance import MATCHERS, MutualGuidanceMatcher
from .pyramids import (
    PAFPN,
    build_resnet_pafpn_backbone,
    build_retinanet_resnet_pafpn_backbone,
)
from .retinanet import LibraRetinaNet
from .roi_heads import LibraCascadeROIHeads, LibraROIHeads
from .rpn import LibraRPN
from .samplers import NEGATIVE_SAMPLERS, POSITIVE_SAMPLERS, SamplingMatcher

__all__ = [
    "BOX_LOSSES",
    "CLASSIFICATION_LOSSES",
    "MATCHERS",
    "NEGATIVE_SAMPLERS",
    "PAFPN",
    "POSITIVE_SAMPLERS",
    "LibraCascadeROIHeads",
    "LibraFastRCNNOutputLayers",
    "LibraROIHeads",
    "LibraRPN",
    "LibraRetinaNet",
    "MutualGuidanceMatcher",
    "SamplingMatcher",
    "build_bfp_backbone",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
    "build_retinanet_small_resnet_fpn_backbone",
    "build_small_resnet_fpn_backbone",
]
