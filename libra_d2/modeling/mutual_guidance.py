"""Mutual Guidance at the anchors of a one-stage detector.

Shape shorthand in this module:

    G: number of ground truths of an image
    R: number of anchors of an image
    K: number of classes
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from libra_d2.matching import check_mutual_guidance, classify_to_localize, localize_to_classify

from .overlaps import find_overlaps
from .switches import DoesNotFit, SwitchRegistry, from_keys

__all__ = ["MATCHERS", "MutualGuidanceMatcher", "PredictionMatcher"]

# Named by MODEL.RETINANET.MATCHER.
MATCHERS = SwitchRegistry("MATCHERS", ("MODEL.RETINANET.MATCHER",))
# None: the labels are left to detectron2's own matcher.
MATCHERS.register(type(None), name="max_iou")


@dataclass
class _Labels:
    """The labels of one image, and what is logged about them."""

    cls_labels: Tensor  # (R,) for classification: class in [0, K), K background, -1 ignored
    cls_boxes: Tensor  # (R, 4), the ground truths they answer to
    box_labels: Tensor  # (R,) for box regression: class in [0, K), K not trained
    box_boxes: Tensor  # (R, 4)
    num_agreed: Tensor  # () positive for both tasks, with the same ground truth
    num_positives: Tensor  # () for classification
    sum_ious: Tensor  # () IoU of the boxes that these predict with their ground truths


class PredictionMatcher(Protocol):
    """What a registered matcher is; :class:`MutualGuidanceMatcher` says what it gets and gives."""

    def __call__(
        self,
        anchors: Boxes,
        logits: Tensor,
        deltas: Tensor,
        gt_instances: list[Instances],
        transform: Box2BoxTransform,
    ) -> tuple[list[Tensor], list[Tensor], tuple[list[Tensor], list[Tensor]]]: ...


@MATCHERS.register(name="mutual_guidance")
@dataclass(frozen=True, kw_only=True)
class MutualGuidanceMatcher:
    """Labels anchors by what the model now predicts there (ACCV 2020).

    Args:
        sigma: greater than 1; the larger, the less the predicted scores matter.
        positive_iou: see :func:`libra_d2.matching.localize_to_classify`.
        negative_iou: the same.

    Raises:
        ValueError: if sigma is not greater than 1 or the thresholds are not ordered.
    """

    sigma: float = 2.0
    positive_iou: float = 0.5
    negative_iou: float = 0.4

    def __post_init__(self):
        check_mutual_guidance(self.positive_iou, self.negative_iou, self.sigma)

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "MutualGuidanceMatcher":
        options = cfg.MODEL[head]
        if list(options.IOU_LABELS) != [0, -1, 1] or len(options.IOU_THRESHOLDS) != 2:
            raise DoesNotFit(
                f"MODEL.{head}.IOU_THRESHOLDS must be two for MATCHER mutual_guidance, and "
                f"IOU_LABELS [0, -1, 1]; got {options.IOU_THRESHOLDS} and {options.IOU_LABELS}"
            )
        negative_iou, positive_iou = options.IOU_THRESHOLDS
        thresholds = {"negative_iou": negative_iou, "positive_iou": positive_iou}
        return from_keys(cls, cfg, f"MODEL.{head}.MUTUAL_GUIDANCE", **thresholds)

    @torch.no_grad()
    def __call__(
        self,
        anchors: Boxes,
        logits: Tensor,
        deltas: Tensor,
        gt_instances: list[Instances],
        transform: Box2BoxTransform,
    ) -> tuple[list[Tensor], list[Tensor], tuple[list[Tensor], list[Tensor]]]:
        """Labels a batch, and logs how far the tasks agree.

        - ``mutual_guidance/agreed_anchors``: anchors an image that are positive for both tasks,
          with the same ground truth.
        - ``mutual_guidance/regressed_iou``: mean IoU of the boxes predicted at the positives of
          classification with their ground truths.

        Args:
            anchors: R boxes, in pixels.
            logits: (N, R, K).
            deltas: (N, R, 4).
            gt_instances: ground truths of each of N images.
            transform: makes boxes of anchors and deltas.

        Returns:
            For each image the classes to learn, (R,) int64 in [-1, K] with -1 ignored and K
            background, and the ground truths these answer to, (R, 4); then the same for box
            regression, where K means that an anchor does not regress.
        """
        labels = [
            self._label(anchors, image_logits, transform.apply_deltas(d, anchors.tensor), gt)
            for image_logits, d, gt in zip(logits, deltas, gt_instances, strict=True)
        ]
        self._log(labels)
        return (
            [image.cls_labels for image in labels],
            [image.cls_boxes for image in labels],
            ([image.box_labels for image in labels], [image.box_boxes for image in labels]),
        )

    def _label(self, anchors: Boxes, logits: Tensor, pred_boxes: Tensor, gt: Instances) -> _Labels:
        num_anchors, background = logits.shape
        if len(gt) == 0:
            labels = torch.full((num_anchors,), background, device=logits.device)
            boxes = torch.zeros_like(anchors.tensor)
            zero = logits.new_zeros((), dtype=torch.float32)
            return _Labels(labels, boxes, labels, boxes, zero, zero, zero)
        anchor_ious = find_overlaps(gt.gt_boxes, anchors)
        regressed_ious = find_overlaps(gt.gt_boxes, Boxes(pred_boxes))
        gts, indices = anchor_ious.indices()
        scores = torch.sparse_coo_tensor(
            anchor_ious.indices(),
            logits[indices, gt.gt_classes[gts]].float().sigmoid(),
            anchor_ious.shape,
            is_coalesced=True,
            check_invariants=False,
        )
        thresholds = {"positive_iou": self.positive_iou, "negative_iou": self.negative_iou}
        cls_gt, cls_labels = localize_to_classify(anchor_ious, regressed_ious, **thresholds)
        box_gt, box_labels = classify_to_localize(
            anchor_ious, scores, sigma=self.sigma, **thresholds
        )

        is_positive = cls_labels == 1
        classes = torch.where(is_positive, gt.gt_classes[cls_gt], background)
        gts, indices = regressed_ious.indices()
        is_matched = is_positive[indices] & (cls_gt[indices] == gts)
        return _Labels(
            cls_labels=classes.masked_fill(cls_labels == -1, -1),
            cls_boxes=gt.gt_boxes.tensor[cls_gt],
            box_labels=torch.where(box_labels == 1, gt.gt_classes[box_gt], background),
            box_boxes=gt.gt_boxes.tensor[box_gt],
            num_agreed=(is_positive & (box_labels == 1) & (cls_gt == box_gt)).sum(),
            num_positives=is_positive.sum(),
            sum_ious=regressed_ious.values()[is_matched].sum(),
        )

    def _log(self, labels: list[_Labels]) -> None:
        rows = [torch.stack([i.num_agreed, i.num_positives, i.sum_ious]) for i in labels]
        num_agreed, num_positives, sum_ious = torch.stack(rows).sum(dim=0).tolist()
        storage = get_event_storage()
        storage.put_scalar("mutual_guidance/agreed_anchors", num_agreed / len(labels))
        if num_positives > 0:
            storage.put_scalar("mutual_guidance/regressed_iou", sum_ious / num_positives)
