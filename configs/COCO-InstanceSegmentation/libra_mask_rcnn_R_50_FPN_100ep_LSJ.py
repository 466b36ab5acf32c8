"""detectron2's Mask R-CNN of 100 epochs with large-scale jitter, from scratch; balanced."""

from functools import partial

from detectron2.layers.batch_norm import NaiveSyncBatchNorm

from libra_d2.zoo import get_config

from ..common.models.libra_mask_rcnn import model

_baseline = get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
dataloader, lr_multiplier = _baseline.dataloader, _baseline.lr_multiplier
optimizer, train = _baseline.optimizer, _baseline.train
train.output_dir = "output/libra_mask_rcnn_R_50_FPN_100ep_LSJ"

model.backbone.pyramid = _baseline.model.backbone
model.proposal_generator.head = _baseline.model.proposal_generator.head
for name in ("box_head", "mask_head"):
    model.roi_heads[name] = _baseline.model.roi_heads[name]
    # The baseline's, as a function with a name, which a saved config can hold.
    model.roi_heads[name].conv_norm = partial(NaiveSyncBatchNorm, stats_mode="N")
