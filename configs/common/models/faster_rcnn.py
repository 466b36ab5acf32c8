"""Faster R-CNN with FPN: detectron2's Mask R-CNN without masks. The baseline."""

from libra_d2.zoo import get_config

model = get_config("common/models/mask_rcnn_fpn.py").model
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]
