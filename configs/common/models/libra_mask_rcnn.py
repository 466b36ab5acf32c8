"""Libra R-CNN with masks: each statement is a part of it, and may be left out."""

from detectron2.config import LazyCall as L

from libra_d2.layers import BalancedFeaturePyramid
from libra_d2.modeling import (
    BalancedL1,
    BalancedPyramid,
    InstanceBalancedSampler,
    IouBalancedSampler,
    LibraFastRCNNOutputLayers,
    LibraROIHeads,
    LibraRPN,
)
from libra_d2.zoo import get_config

model = get_config("common/models/mask_rcnn_fpn.py").model
model.backbone = L(BalancedPyramid)(
    pyramid=model.backbone, bfp=L(BalancedFeaturePyramid)(in_channels=256, num_levels=5)
)
model.proposal_generator.update(
    _target_=LibraRPN, negative_positive_ub=5, loss_normalizer="sampled"
)
model.roi_heads.update(
    _target_=LibraROIHeads,
    positive_sampler=L(InstanceBalancedSampler)(),
    negative_sampler=L(IouBalancedSampler)(num_bins=3),
)
model.roi_heads.box_predictor.update(
    _target_=LibraFastRCNNOutputLayers, box_loss=L(BalancedL1)(alpha=0.5, gamma=1.5)
)
