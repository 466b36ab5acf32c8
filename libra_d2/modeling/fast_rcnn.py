"""Fast R-CNN output layers with the losses of the Libra R-CNN family.

Shape shorthand in this module:

    R: number of ROIs, combined over all images
    F: number of foreground ROIs among them
    K: number of foreground classes
"""

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor

from libra_d2.config import balanced_l1_options
from libra_d2.losses import balanced_l1_loss
from libra_d2.losses.balanced_l1 import check_balanced_l1

__all__ = ["LibraFastRCNNOutputLayers"]


class LibraFastRCNNOutputLayers(FastRCNNOutputLayers):
    """detectron2's output layers, with balanced L1 as one more ``box_reg_loss_type``."""

    @configurable
    def __init__(self, input_shape, *, balanced_l1: dict, **kwargs):
        """
        Args:
            input_shape: shape of the input feature.
            balanced_l1: ``alpha``, ``gamma``, ``beta`` and ``reference`` of
                :func:`libra_d2.losses.balanced_l1_loss`.
            kwargs: see :class:`FastRCNNOutputLayers`.
        """
        super().__init__(input_shape, **kwargs)
        check_balanced_l1(**balanced_l1)
        self.balanced_l1 = balanced_l1

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["balanced_l1"] = balanced_l1_options(cfg, cfg.MODEL.ROI_BOX_HEAD)
        return ret

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """Box regression loss, summed over coordinates and divided by the number of all ROIs.

        Args:
            proposal_boxes: (R, 4) in pixels.
            gt_boxes: (R, 4) in pixels; read for foreground ROIs only.
            pred_deltas: (R, 4) class-agnostic or (R, 4 * K).
            gt_classes: (R,) in [0, K], K being background.
        """
        if self.box_reg_loss_type != "balanced_l1":
            return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        foreground = ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero().squeeze(1)
        target = self.box2box_transform.get_deltas(proposal_boxes[foreground], gt_boxes[foreground])
        # One set of deltas a ROI if class-agnostic, else one a class: take the true class's.
        deltas = pred_deltas[foreground].unflatten(1, (-1, target.shape[1]))  # (F, 1 or K, 4)
        classes = gt_classes[foreground] if deltas.shape[1] > 1 else 0
        deltas = deltas[torch.arange(len(foreground), device=deltas.device), classes]
        loss = balanced_l1_loss(deltas, target, reduction="sum", **self.balanced_l1)
        return loss / max(gt_classes.numel(), 1)
