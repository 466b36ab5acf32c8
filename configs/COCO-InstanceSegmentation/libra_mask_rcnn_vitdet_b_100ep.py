"""ViTDet-B with Mask R-CNN, balanced: BFP refines its simple feature pyramid."""

from functools import partial

from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

from libra_d2.zoo import get_config

from ..common.lsj import dataloader
from ..common.models.libra_mask_rcnn import model
from ..common.schedule_100ep import lr_multiplier, optimizer, train

_vitdet = get_config("common/models/mask_rcnn_vitdet.py").model
model.update(
    pixel_mean=_vitdet.pixel_mean, pixel_std=_vitdet.pixel_std, input_format=_vitdet.input_format
)
model.backbone.pyramid = _vitdet.backbone
model.proposal_generator.head = _vitdet.proposal_generator.head
for name in ("box_head", "mask_head"):
    model.roi_heads[name] = _vitdet.roi_heads[name]

train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
train.output_dir = "output/libra_mask_rcnn_vitdet_b_100ep"
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
