"""detectron2 adapters. Importing this package registers them with detectron2."""

from . import mask_head  # noqa: F401  (imported to register)
from .backbones import (
    build_bfp_backbone,
    build_retinanet_small_resnet_fpn_backbone,
    build_small_resnet_fpn_backbone,
)
from .balanced_pyramid import BalancedPyramid
from .box_losses import BOX_LOSSES, BalancedL1, CIoU, DecodedLoss, DeltaLoss, DIoU, GIoU, SmoothL1
from .cascade import LibraCascadeROIHeads
from .classification_losses import (
    CLASSIFICATION_LOSSES,
    BalancedCrossEntropy,
    ClassificationLoss,
    FocalLoss,
    OhemLoss,
)
from .fast_rcnn import LibraFastRCNNOutputLayers
from .mutual_guidance import MATCHERS, MutualGuidanceMatcher
from .pisa import Carl, IsrPositive
from .pyramids import (
    PAFPN,
    build_resnet_pafpn_backbone,
    build_retinanet_resnet_pafpn_backbone,
)
from .retinanet import LibraRetinaNet
from .roi_heads import BalancedSampling, LibraRes5ROIHeads, LibraROIHeads
from .rpn import LibraRPN
from .samplers import (
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    InstanceBalancedSampler,
    IouBalancedSampler,
    Matches,
    OhemSampler,
    ScoreHlrSampler,
)
from .sampling_matcher import SamplingMatcher

__all__ = [
    "BOX_LOSSES",
    "CLASSIFICATION_LOSSES",
    "MATCHERS",
    "NEGATIVE_SAMPLERS",
    "PAFPN",
    "POSITIVE_SAMPLERS",
    "BalancedCrossEntropy",
    "BalancedL1",
    "BalancedPyramid",
    "BalancedSampling",
    "CIoU",
    "Carl",
    "ClassificationLoss",
    "DIoU",
    "DecodedLoss",
    "DeltaLoss",
    "FocalLoss",
    "GIoU",
    "InstanceBalancedSampler",
    "IouBalancedSampler",
    "IsrPositive",
    "LibraCascadeROIHeads",
    "LibraFastRCNNOutputLayers",
    "LibraROIHeads",
    "LibraRPN",
    "LibraRes5ROIHeads",
    "LibraRetinaNet",
    "Matches",
    "MutualGuidanceMatcher",
    "OhemLoss",
    "OhemSampler",
    "SamplingMatcher",
    "ScoreHlrSampler",
    "SmoothL1",
    "build_bfp_backbone",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
    "build_retinanet_small_resnet_fpn_backbone",
    "build_small_resnet_fpn_backbone",
]
