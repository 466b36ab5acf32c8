"""Libra R-CNN."""

from .libra_mask_rcnn import model

for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]
