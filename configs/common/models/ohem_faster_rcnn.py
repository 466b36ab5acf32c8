"""Faster R-CNN with OHEM: positives and negatives of the largest classification loss."""

from detectron2.config import LazyCall as L

from libra_d2.modeling import LibraFastRCNNOutputLayers, LibraROIHeads, OhemSampler

from .faster_rcnn import model

model.roi_heads.update(
    _target_=LibraROIHeads,
    positive_sampler=L(OhemSampler)(),
    negative_sampler=L(OhemSampler)(),
)
model.roi_heads.box_predictor._target_ = LibraFastRCNNOutputLayers
