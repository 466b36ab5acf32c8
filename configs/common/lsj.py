"""COCO with large-scale jitter to 1024x1024 pixels, RGB, as ViTDet is trained."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from libra_d2.zoo import get_config

SIZE = 1024

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.total_batch_size = 64
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True  # of masks, which crops cut
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=SIZE, target_width=SIZE),
    L(T.FixedSizeCrop)(crop_size=(SIZE, SIZE), pad=False),
]
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=SIZE, max_size=SIZE),
]
