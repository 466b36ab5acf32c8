"""A mask head for each stage of a cascade, as mmdetection's Cascade Mask R-CNN has them."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    BaseMaskRCNNHead,
    MaskRCNNConvUpsampleHead,
)
from torch import Tensor, nn

__all__ = ["MultiStageMaskHead"]


@ROI_MASK_HEAD_REGISTRY.register()
class MultiStageMaskHead(BaseMaskRCNNHead):
    """Several mask heads whose predicted probabilities are averaged.

    As many as ``MODEL.ROI_BOX_CASCADE_HEAD.IOUS``. It serves to run weights from mmdetection;
    trained, all heads learn from the average.
    """

    @configurable
    def __init__(self, *, stages: list[MaskRCNNConvUpsampleHead], **kwargs):
        """
        Args:
            stages: the heads.
            kwargs: see :class:`BaseMaskRCNNHead`.
        """
        super().__init__(**kwargs)
        self.stages = nn.ModuleList(stages)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        num_stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
        stages = [MaskRCNNConvUpsampleHead(cfg, input_shape) for _ in range(num_stages)]
        return {**super().from_config(cfg, input_shape), "stages": stages}

    def layers(self, x: Tensor) -> Tensor:
        """Logits of the average probability, (N, K, 2 * H, 2 * W), from features (N, C, H, W)."""
        probs = torch.stack([stage.layers(x).float().sigmoid() for stage in self.stages]).mean(0)
        return probs.logit(eps=1e-7)
