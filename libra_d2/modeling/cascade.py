"""A cascade's ROI heads with the samplers and losses of the balanced family."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads
from detectron2.structures import pairwise_iou

from .roi_heads import BalancedSampling

__all__ = ["LibraCascadeROIHeads"]


@ROI_HEADS_REGISTRY.register()
class LibraCascadeROIHeads(BalancedSampling, CascadeROIHeads):
    """detectron2's cascade with balanced sampling in its first stage and balanced losses in all."""

    trains_as_it_looks = True

    @classmethod
    def from_config(cls, cfg, input_shape):
        _check_cascade(cfg)
        return super().from_config(cfg, input_shape)

    def _predictor(self):
        return self.box_predictor[0]

    def _predict(self, features, proposals):
        return self._run_stage([features[f] for f in self.box_in_features], proposals, 0)

    def _match_and_label_boxes(self, proposals, stage, targets):
        """Labels as the parent does, and for ISR-P adds the field ``gt_indices``."""
        if getattr(self.box_predictor[stage], "isr_positive", None) is not None:
            for image, gt in zip(proposals, targets, strict=True):
                ious = pairwise_iou(gt.gt_boxes, image.proposal_boxes)
                # Without ground truths there are no positives, whose index would be read.
                none = torch.zeros(len(image), dtype=torch.int64, device=ious.device)
                image.gt_indices = ious.max(dim=0).indices if len(gt) > 0 else none
        return super()._match_and_label_boxes(proposals, stage, targets)


def _check_cascade(cfg: CfgNode) -> None:
    """Refuses what detectron2 would refuse without naming a key, or take as it comes."""
    key, weights = "MODEL.ROI_BOX_CASCADE_HEAD", cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    ious, heads = list(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS), cfg.MODEL.ROI_HEADS
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(f"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG must be True with {heads.NAME}")
    if list(heads.IOU_THRESHOLDS) != ious[:1]:
        raise ValueError(
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS must be the first of {key}.IOUS, {ious[:1]}, "
            f"got {heads.IOU_THRESHOLDS}"
        )
    if len(weights) != len(ious) or not all(
        len(stage) == 4 and all(isinstance(w, (int, float)) and w > 0 for w in stage)
        for stage in weights
    ):
        raise ValueError(
            f"{key}.BBOX_REG_WEIGHTS must be four positive numbers for each of the {len(ious)} "
            f"stages, got {weights}"
        )
