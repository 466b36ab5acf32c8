"""Fast R-CNN output layers with the losses of the balanced family.

Shape shorthand in this module:

    R: number of ROIs, combined over all images
    F: number of foreground ROIs among them
    K: number of foreground classes
"""

from collections.abc import Collection
from dataclasses import asdict
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat, cross_entropy
from detectron2.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    _log_classification_stats,
)
from detectron2.structures import Instances
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F

from libra_d2.config import get_key
from libra_d2.losses import carl_loss
from libra_d2.ranking import reweight_positives

from .box_losses import BOX_LOSSES, DETECTRON2S, BoxLoss, detectron2s_box_loss
from .pisa import Carl, IsrPositive, log_reweighting
from .samplers import Sampler
from .switches import refuse_replaced

__all__ = ["LibraFastRCNNOutputLayers", "check_predictor", "replace_predictor"]

_NEEDS_SOFTMAX = (
    "needs the softmax over classes: use_sigmoid_ce (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE) False"
)


class LibraFastRCNNOutputLayers(FastRCNNOutputLayers):
    """detectron2's output layers, with any box loss, and PISA."""

    # The config keys it reads, and the values that ask for nothing that detectron2 has not.
    switches: ClassVar[dict[str, Collection]] = {
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": DETECTRON2S,
        "MODEL.PISA.ISR_POSITIVE.ENABLED": (False,),
        "MODEL.PISA.CARL.ENABLED": (False,),
    }

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        box_loss: BoxLoss | None = None,
        isr_positive: IsrPositive | None = None,
        carl: Carl | None = None,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the input feature.
            box_loss: of each foreground ROI's deltas, proposal and ground truth, such as
                :class:`~libra_d2.modeling.BalancedL1`; None for that of the parent's
                ``box_reg_loss_type`` and ``smooth_l1_beta``.
            isr_positive: reweights positives; needs the proposals of
                :class:`~libra_d2.modeling.BalancedSampling`. None for off.
            carl: adds a loss; None for off.
            kwargs: see :class:`FastRCNNOutputLayers`.

        Raises:
            ValueError: if arguments exclude each other.
        """
        if box_loss is not None:
            refuse_replaced(kwargs, ("box_reg_loss_type", "smooth_l1_beta"), "box_loss")
        super().__init__(input_shape, **kwargs)
        self._set_switches(box_loss, isr_positive, carl)

    def _set_switches(
        self, box_loss: BoxLoss | None, isr_positive: IsrPositive | None, carl: Carl | None
    ) -> None:
        for switch in (isr_positive, carl):
            if switch is not None and self.use_sigmoid_ce:
                raise ValueError(f"{switch} {_NEEDS_SOFTMAX}")
        self.box_loss = box_loss or detectron2s_box_loss(
            self.box_reg_loss_type, self.smooth_l1_beta
        )
        self.isr_positive = isr_positive
        self.carl = carl

    @classmethod
    def take_over(
        cls, predictor: FastRCNNOutputLayers, cfg: CfgNode
    ) -> "LibraFastRCNNOutputLayers":
        """detectron2's output layers, their weights and settings, with the losses of a config.

        Args:
            predictor: detectron2's own; its parameters are shared.
            cfg: names the losses; with one of detectron2's box losses the predictor's stays.
        """
        taken = cls.__new__(cls)
        taken.__dict__.update(predictor.__dict__)
        key = "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"
        keeps = get_key(cfg, key) in DETECTRON2S
        box_loss = None if keeps else BOX_LOSSES.make(key, cfg)
        taken._set_switches(box_loss, IsrPositive.from_config(cfg), Carl.from_config(cfg))
        return taken

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret = {k: v for k, v in ret.items() if k not in ("box_reg_loss_type", "smooth_l1_beta")}
        return {
            **ret,
            "box_loss": BOX_LOSSES.make("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", cfg),
            "isr_positive": IsrPositive.from_config(cfg),
            "carl": Carl.from_config(cfg),
        }

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """The parent's losses; where proposals weigh differently, classification is by weight.

        Args:
            predictions: logits (R, K + 1) and deltas (R, 4) or (R, 4 * K).
            proposals: of each image, as they come from :class:`LibraROIHeads`: with
                ``gt_indices`` where there are ground truths, and ``loss_weights`` if the sampler
                weighs them.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, and with CARL ``loss_carl``.
        """
        is_weighted = self.isr_positive is not None or any(p.has("loss_weights") for p in proposals)
        if not is_weighted and self.carl is None:
            return super().losses(predictions, proposals)
        logits, deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        _log_classification_stats(logits, gt_classes)
        num_rois = max(len(gt_classes), 1)
        if is_weighted:
            if self.use_sigmoid_ce:
                raise ValueError(f"a sampler that weighs proposals {_NEEDS_SOFTMAX}")
            each = F.cross_entropy(logits, gt_classes, reduction="none")
            weights = self.classification_weights(predictions, proposals, each.detach())
            loss_cls = (each * weights).sum() / num_rois
        else:
            loss_cls = cross_entropy(logits, gt_classes, reduction="mean")
        boxes = *_boxes(proposals), deltas, gt_classes
        foreground = self._foreground(gt_classes)
        box_losses = self._box_losses(*boxes, foreground)
        if type(self).box_reg_loss is LibraFastRCNNOutputLayers.box_reg_loss:
            loss_box_reg = box_losses.sum() / num_rois
        else:
            loss_box_reg = self.box_reg_loss(*boxes)
        losses = {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
        factors = dict(self.loss_weight)
        if self.carl is not None:
            probs = logits[foreground].softmax(dim=1)
            probs = probs.gather(1, gt_classes[foreground].unsqueeze(1)).squeeze(1)
            loss_carl = carl_loss(probs, box_losses, normalizer=num_rois, **asdict(self.carl))
            losses["loss_carl"] = loss_carl
            factors["loss_carl"] = factors.get("loss_box_reg", 1.0)
        return {name: loss * factors.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def classification_weights(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances], losses: Tensor
    ) -> Tensor:
        """The weight of each ROI in the classification loss, (R,): the sampler's and ISR-P's.

        Args:
            predictions: see :meth:`losses`.
            proposals: the same.
            losses: classification loss of each ROI, (R,).

        Raises:
            ValueError: if ISR-P is on and positives do not tell which ground truth is theirs.
        """
        gt_classes = cat([p.gt_classes for p in proposals])
        weights = torch.cat(
            [
                p.loss_weights if p.has("loss_weights") else losses.new_ones(len(p))
                for p in proposals
            ]
        )
        foreground = self._foreground(gt_classes)
        if self.isr_positive is None or len(foreground) == 0:
            return weights
        proposal_boxes, gt_boxes = _boxes(proposals)
        deltas = self.deltas_of(predictions[1], foreground, gt_classes[foreground])
        boxes = self.box2box_transform.apply_deltas(deltas, proposal_boxes[foreground])
        own = weights[foreground]
        reweighted = own * reweight_positives(
            matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes[foreground])),
            _ground_truths(proposals)[foreground],
            gt_classes[foreground],
            losses[foreground] * own,
            **asdict(self.isr_positive),
        )
        log_reweighting(losses[foreground], own, reweighted)
        return weights.index_copy(0, foreground, reweighted.to(weights.dtype))

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
        foreground = self._foreground(gt_classes)
        losses = self._box_losses(proposal_boxes, gt_boxes, pred_deltas, gt_classes, foreground)
        return losses.sum() / max(gt_classes.numel(), 1)

    def deltas_of(self, deltas: Tensor, rois: Tensor, classes: Tensor) -> Tensor:
        """The deltas of some ROIs' classes.

        Args:
            deltas: of all ROIs, (R, 4) class-agnostic or (R, 4 * K).
            rois: indices into them, (F,).
            classes: of these, (F,) in [0, K).

        Returns:
            (F, 4).
        """
        deltas = deltas.unflatten(1, (-1, len(self.box2box_transform.weights)))
        return deltas[rois, classes if deltas.shape[1] > 1 else 0]

    def _box_losses(
        self,
        proposal_boxes: Tensor,
        gt_boxes: Tensor,
        deltas: Tensor,
        gt_classes: Tensor,
        foreground: Tensor,
    ) -> Tensor:
        """Box loss of each foreground ROI, (F, 4) or (F,)."""
        return self.box_loss(
            self.box2box_transform,
            self.deltas_of(deltas, foreground, gt_classes[foreground]),
            proposal_boxes[foreground],
            gt_boxes[foreground],
        )

    def _foreground(self, gt_classes: Tensor) -> Tensor:
        """Indices of the foreground ROIs, (F,) int64."""
        return ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero().squeeze(1)


def replace_predictor(predictor: nn.Module, cfg: CfgNode) -> nn.Module:
    """detectron2's own output layers with this project's losses; any other stay as they are.

    Raises:
        ValueError: if others are asked for a loss that they don't have.
    """
    if type(predictor) is FastRCNNOutputLayers:
        return LibraFastRCNNOutputLayers.take_over(predictor, cfg)
    if not isinstance(predictor, LibraFastRCNNOutputLayers):
        for key, nothing_new in LibraFastRCNNOutputLayers.switches.items():
            if get_key(cfg, key) not in nothing_new:
                raise ValueError(
                    f"{key} {get_key(cfg, key)} needs output layers that are "
                    f"LibraFastRCNNOutputLayers, got {type(predictor).__name__}"
                )
    return predictor


def check_predictor(predictor: nn.Module, sampler: Sampler) -> None:
    """Refuses output layers that cannot give a sampler the predictions it looks at."""
    if not isinstance(predictor, LibraFastRCNNOutputLayers):
        raise ValueError(
            f"{sampler} needs LibraFastRCNNOutputLayers as box_predictor, "
            f"got {type(predictor).__name__}"
        )
    if predictor.use_sigmoid_ce:
        raise ValueError(f"{sampler} {_NEEDS_SOFTMAX}")


def _boxes(proposals: list[Instances]) -> tuple[Tensor, Tensor]:
    """Proposals and their ground truths, (R, 4) each; where there are none, proposals twice."""
    boxes = [p.proposal_boxes.tensor for p in proposals]
    gt_boxes = [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    return cat(boxes), cat(gt_boxes)


def _ground_truths(proposals: list[Instances]) -> Tensor:
    """A number for each ROI's ground truth, distinct across images, (R,) int64."""
    numbers, start = [], 0
    for image in proposals:
        if image.has("gt_indices"):
            numbers.append(image.gt_indices + start)
        elif image.has("gt_boxes"):
            raise ValueError(
                "ISR-P needs proposals with gt_indices: ROI heads with BalancedSampling, such as "
                "LibraROIHeads, give them, and in a cascade LibraCascadeROIHeads"
            )
        else:  # an image without ground truths has no foreground either
            numbers.append(torch.zeros_like(image.gt_classes))
        # More than any image has ground truths: a proposal answers to no other's.
        start += _MOST_GROUND_TRUTHS
    return cat(numbers)


_MOST_GROUND_TRUTHS = 1 << 20
