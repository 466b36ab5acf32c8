"""Swin-T, pretrained on ImageNet-22k, with Cascade Mask R-CNN, balanced; 36 epochs."""

from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from libra_d2.zoo import get_config

from ..common.lsj import dataloader
from ..common.models.libra_cascade_mask_rcnn import model
from ..common.schedule_100ep import lr_multiplier, optimizer, train

_constants = get_config("common/data/constants.py").constants
model.update(
    pixel_mean=_constants.imagenet_rgb256_mean,
    pixel_std=_constants.imagenet_rgb256_std,
    input_format="RGB",
)
model.backbone.pyramid.bottom_up = L(SwinTransformer)(
    embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], drop_path_rate=0.2
)
model.backbone.pyramid.in_features = ["p0", "p1", "p2", "p3"]
model.backbone.pyramid.square_pad = 1024

train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.8/"
    "swin_tiny_patch4_window7_224_22k.pth?matching_heuristics=True"
)
train.output_dir = "output/libra_cascade_mask_rcnn_swin_t_in21k"
train.max_iter = 66375  # 36 epochs
lr_multiplier.scheduler.update(milestones=[59000, 63917], num_updates=66375)
lr_multiplier.warmup_length = 250 / 66375
optimizer.lr = 1e-4
optimizer.weight_decay = 0.05
optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}
