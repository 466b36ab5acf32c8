"""Libra RetinaNet of 12 epochs."""

from ..common.models.libra_retinanet import model
from .libra_faster_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train

optimizer.lr = 0.01
train.output_dir = "output/libra_retinanet_R_50_FPN_1x_lazy"
model.backbone.pyramid.bottom_up.freeze_at = 2
