"""Cascade Mask R-CNN with Libra R-CNN's parts: sampling in its first stage, the loss in all."""

from detectron2.config import LazyCall as L

from libra_d2.modeling import BalancedL1, LibraCascadeROIHeads, LibraFastRCNNOutputLayers
from libra_d2.zoo import get_config

from .libra_mask_rcnn import model as libra

model = get_config("common/models/cascade_rcnn.py").model
model.backbone = libra.backbone
model.proposal_generator = libra.proposal_generator
model.proposal_generator.post_nms_topk = (2000, 1000)
model.roi_heads.update(
    _target_=LibraCascadeROIHeads,
    positive_sampler=libra.roi_heads.positive_sampler,
    negative_sampler=libra.roi_heads.negative_sampler,
)
for predictor in model.roi_heads.box_predictors:
    predictor.update(_target_=LibraFastRCNNOutputLayers, box_loss=L(BalancedL1)())
