"""Faster R-CNN with PISA: ISR-N, ISR-P and CARL, with 2,000 proposals."""

from detectron2.config import LazyCall as L

from libra_d2.modeling import (
    Carl,
    IsrPositive,
    LibraFastRCNNOutputLayers,
    LibraROIHeads,
    ScoreHlrSampler,
)

from .faster_rcnn import model

model.proposal_generator.post_nms_topk = (2000, 1000)
model.roi_heads.update(_target_=LibraROIHeads, negative_sampler=L(ScoreHlrSampler)())
model.roi_heads.box_predictor.update(
    _target_=LibraFastRCNNOutputLayers, isr_positive=L(IsrPositive)(), carl=L(Carl)()
)
