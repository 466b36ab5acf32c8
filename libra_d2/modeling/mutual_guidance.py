"""Mutual Guidance at the anchors of a one-stage detector.

Shape shorthand in this module:

    N: number of images
    R: number of anchors of an image
    K: number of classes
"""

from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from libra_d2.matching import check_mutual_guidance, guide_mutually

from .overlaps import find_overlaps, make_sparse, split_batch
from .switches import DoesNotFit, SwitchRegistry, from_keys
from .targets import take_boxes, take_classes

__all__ = ["MATCHERS", "MutualGuidanceMatcher", "PredictionMatcher"]

# Named by MODEL.RETINANET.MATCHER.
MATCHERS = SwitchRegistry("MATCHERS", ("MODEL.RETINANET.MATCHER",))
# None: the labels are left to detectron2's own matcher.
MATCHERS.register(type(None), name="max_iou")


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
        num_images = len(gt_instances)
        pred_boxes = torch.stack([transform.apply_deltas(d, anchors.tensor) for d in deltas])
        labelled = [
            self._label(anchors, logits[part], pred_boxes[part], gt_instances[part])
            for part in split_batch([gt.gt_boxes for gt in gt_instances], len(anchors))
        ]
        *targets, numbers = zip(*labelled, strict=True)
        self._log(torch.stack(numbers).sum(dim=0), num_images)
        cls_labels, cls_boxes, box_labels, box_boxes = (list(chain(*each)) for each in targets)
        return cls_labels, cls_boxes, (box_labels, box_boxes)

    def _label(
        self, anchors: Boxes, logits: Tensor, pred_boxes: Tensor, gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Labels and ground truths of both tasks, and what is logged of them, (3,)."""
        own_boxes = [gt.gt_boxes for gt in gt_instances]
        # One matrix for all images: each has rows and columns of its own.
        anchor_ious = find_overlaps(own_boxes, anchors.tensor.unsqueeze(0))
        regressed_ious = find_overlaps(own_boxes, pred_boxes)
        scores = _take_scores(logits, anchor_ious, gt_instances)
        (cls_gt, cls_labels), (box_gt, box_labels) = guide_mutually(
            *(anchor_ious, regressed_ious, scores), **asdict(self)
        )

        is_positive = cls_labels == 1
        num_agreed = (is_positive & (box_labels == 1) & (cls_gt == box_gt)).sum()
        gts, columns = regressed_ious.indices()
        matched_gt = cls_gt.masked_fill(~is_positive, -1)
        is_matched = matched_gt.index_select(0, columns) == gts
        sum_ious = regressed_ious.values().masked_fill(~is_matched, 0.0).sum()
        of_images = partial(_split, gt_instances=gt_instances, background=logits.shape[2])
        return (
            *of_images(cls_gt, cls_labels),
            *of_images(box_gt, box_labels),
            torch.stack([num_agreed, is_positive.sum(), sum_ious]),
        )

    def _log(self, numbers: Tensor, num_images: int) -> None:
        num_agreed, num_positives, sum_ious = numbers.tolist()
        storage = get_event_storage()
        storage.put_scalar("mutual_guidance/agreed_anchors", num_agreed / num_images)
        if num_positives > 0:
            storage.put_scalar("mutual_guidance/regressed_iou", sum_ious / num_positives)


def _take_scores(logits: Tensor, pairs: Tensor, gt_instances: list[Instances]) -> Tensor:
    """Scores at the anchors of a sparse matrix for its ground truths' classes, at its indices."""
    classes = torch.cat([gt.gt_classes for gt in gt_instances]).long()
    gts, anchors = pairs.indices()
    places = classes.index_select(0, gts).add_(anchors, alpha=logits.shape[2])
    scores = logits.flatten().index_select(0, places).float().sigmoid()
    return make_sparse(pairs.indices(), scores, pairs.shape)


def _split(
    matched_gt: Tensor, labels: Tensor, gt_instances: list[Instances], background: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Classes to learn, and ground truths they answer to, of each image.

    Args:
        matched_gt: (N * R,) int64, index into the ground truths of all images.
        labels: (N * R,) int8; 1 positive, 0 negative, -1 ignored.
        gt_instances: of each of N images.
        background: number of classes.
    """
    classes, boxes, first = [], [], 0
    num_images = len(gt_instances)
    for gt, index, label in zip(
        gt_instances, matched_gt.chunk(num_images), labels.chunk(num_images), strict=True
    ):
        index = (index - first).clamp(min=0)  # it is 0 where nothing is matched
        classes.append(take_classes(gt, index, label, background))
        boxes.append(take_boxes(gt, index))
        first += len(gt)
    return classes, boxes
