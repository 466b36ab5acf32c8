"""Cascade R-CNN with Libra R-CNN's parts."""

from .libra_cascade_mask_rcnn import model

for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]
