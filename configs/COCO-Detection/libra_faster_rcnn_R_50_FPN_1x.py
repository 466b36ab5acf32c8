"""Libra R-CNN of 12 epochs."""

from libra_d2.zoo import get_config

from ..common.models.libra_faster_rcnn import model

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = (800,)
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = get_config("common/optim.py").SGD
train = get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/libra_faster_rcnn_R_50_FPN_1x_lazy"
model.backbone.pyramid.bottom_up.freeze_at = 2
