"""Libra RPN alone: BFP, IoU-balanced negatives and balanced L1 (Libra R-CNN, table 3)."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ProposalNetwork

from libra_d2.modeling import BalancedL1, IouBalancedSampler, LibraRPN

from .libra_mask_rcnn import model

del model.roi_heads, model.input_format
model._target_ = ProposalNetwork
model.proposal_generator.update(
    _target_=LibraRPN,
    negative_positive_ub=-1,
    loss_normalizer="batch_size",
    negative_sampler=L(IouBalancedSampler)(upper_iou=0.3),
    box_loss=L(BalancedL1)(),
    post_nms_topk=(2000, 1000),
)
