"""RetinaNet with the classification losses, box losses and matchers of the balanced family.

Shape shorthand in this module:

    N: number of images
    R: number of anchors of an image, over all levels
    K: number of classes
"""

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from libra_d2.config import balanced_l1_options, choose

from .backbones import LastLevelP6P7WithoutReLU
from .box_losses import BOX_LOSSES, BoxLoss
from .classification_losses import CLASSIFICATION_LOSSES, ClassificationLoss
from .mutual_guidance import MATCHERS, MutualGuidanceMatcher

__all__ = ["LibraRetinaNet"]


@META_ARCH_REGISTRY.register()
class LibraRetinaNet(RetinaNet):
    """detectron2's RetinaNet whose losses and matcher are switches.

    Switches: ``MODEL.RETINANET.CLS_LOSS_TYPE``, ``MODEL.RETINANET.BBOX_REG_LOSS_TYPE``,
    ``MODEL.RETINANET.MATCHER`` and ``MODEL.LIBRA.REFERENCE``. With all of them at their defaults it
    computes what its parent does, bit for bit.
    """

    @configurable
    def __init__(
        self,
        *,
        cls_loss: ClassificationLoss,
        box_loss: BoxLoss,
        box_reg_loss_weight: float = 1.0,
        prediction_matcher: MutualGuidanceMatcher | None = None,
        clip_before_nms: bool = False,
        **kwargs,
    ):
        """
        Args:
            cls_loss: of logits, labels and anchors, summed over anchors.
            box_loss: of each positive's deltas, anchor and ground truth.
            box_reg_loss_weight: factor of the box loss.
            prediction_matcher: labels anchors by the current predictions; None for detectron2's
                ``anchor_matcher``, which sees the anchors alone.
            clip_before_nms: whether predicted boxes are clipped to the image, and those outside of
                it dropped, before NMS; detectron2 does so afterwards.
            kwargs: see :class:`RetinaNet`.
        """
        super().__init__(**kwargs)
        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self.box_reg_loss_weight = box_reg_loss_weight
        self.prediction_matcher = prediction_matcher
        self.clip_before_nms = clip_before_nms

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        options = cfg.MODEL.RETINANET
        use_mmdet = cfg.MODEL.LIBRA.REFERENCE == "mmdet"
        top_block = getattr(ret["backbone"], "top_block", None)
        if use_mmdet and isinstance(top_block, LastLevelP6P7):
            ret["backbone"].top_block = LastLevelP6P7WithoutReLU(top_block)
        make_cls_loss = choose("MODEL.RETINANET.CLS_LOSS_TYPE", cfg, CLASSIFICATION_LOSSES)
        make_box_loss = choose("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", cfg, BOX_LOSSES)
        make_matcher = choose("MODEL.RETINANET.MATCHER", cfg, MATCHERS)
        return {
            **ret,
            "cls_loss": make_cls_loss(cfg),
            "box_loss": make_box_loss(
                options.SMOOTH_L1_LOSS_BETA, balanced_l1_options(cfg, options)
            ),
            "box_reg_loss_weight": options.BBOX_REG_LOSS_WEIGHT,
            "prediction_matcher": make_matcher and make_matcher(cfg),
            "clip_before_nms": use_mmdet,
        }

    def forward_training(self, images, features, predictions, gt_instances: list[Instances]):
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        if self.prediction_matcher is None:
            gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
            return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        gt_labels, gt_boxes, box_labels = self.prediction_matcher(
            Boxes.cat(anchors),
            cat(logits, dim=1),
            cat(deltas, dim=1),
            gt_instances,
            self.box2box_transform,
        )
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes, box_labels)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        box_labels: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of both tasks, each divided by the number of its positives.

        Args:
            anchors: boxes of each level.
            pred_logits: (N, anchors of the level, K) of each level.
            gt_labels: the classes to learn, (R,) of each image; -1 ignored, K background.
            pred_anchor_deltas: (N, anchors of the level, 4) of each level.
            gt_boxes: the boxes to regress to, (R, 4) of each image.
            box_labels: the classes of the anchors that regress, (R,) of each image, where they
                are not those of ``gt_labels``.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, scalars.
        """
        anchors, labels = Boxes.cat(anchors).tensor, torch.stack(gt_labels)
        num_positives = self._is_positive(labels).sum().item()
        get_event_storage().put_scalar("num_pos_anchors", num_positives / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(num_positives, 1), 100)
        if box_labels is None:
            positives, box_normalizer = self._is_positive(labels), normalizer
        else:
            positives = self._is_positive(torch.stack(box_labels))
            num_positives = positives.sum().item()
            box_normalizer = self._ema_update("box_loss_normalizer", max(num_positives, 1), 100)
        loss_cls = self.classification_loss(cat(pred_logits, dim=1), labels, anchors)
        loss_box_reg = self.box_reg_loss(
            anchors, cat(pred_anchor_deltas, dim=1), torch.stack(gt_boxes), positives
        )
        return {
            "loss_cls": loss_cls / normalizer,
            "loss_box_reg": loss_box_reg / box_normalizer * self.box_reg_loss_weight,
        }

    def classification_loss(self, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        """Classification loss, summed over the anchors that are trained on.

        Args:
            logits: (N, R, K).
            labels: (N, R) int64 in [-1, K]; -1 ignored, K background.
            anchors: (R, 4) in pixels.
        """
        return self.cls_loss(logits, labels, anchors)

    def box_reg_loss(
        self, anchors: Tensor, deltas: Tensor, gt_boxes: Tensor, positives: Tensor
    ) -> Tensor:
        """Box regression loss, summed over the positives.

        Args:
            anchors: (R, 4) in pixels.
            deltas: (N, R, 4).
            gt_boxes: (N, R, 4) in pixels; read for positives only.
            positives: bool mask, (N, R).
        """
        sources = anchors.expand_as(gt_boxes)[positives]
        return self.box_loss(
            self.box2box_transform, deltas[positives], sources, gt_boxes[positives]
        ).sum()

    def _is_positive(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels != self.num_classes)

    def _decode_multi_level_predictions(self, *args) -> Instances:
        predictions = super()._decode_multi_level_predictions(*args)
        if self.clip_before_nms:
            predictions.pred_boxes.clip(predictions.image_size)
            predictions = predictions[predictions.pred_boxes.nonempty()]
        return predictions
