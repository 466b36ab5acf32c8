"""RetinaNet with the classification losses, box losses and matchers of the balanced family.

Shape shorthand in this module:

    N: number of images
    P: number of positives, combined over all images
    R: number of anchors of an image, over all levels
    K: number of classes
"""

from collections.abc import Collection
from dataclasses import asdict
from typing import ClassVar

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor

from libra_d2.config import settle
from libra_d2.losses import carl_loss
from libra_d2.ranking import reweight_positives

from .balanced_pyramid import BalancedPyramid
from .box_losses import BOX_LOSSES, DETECTRON2S, BoxLoss, detectron2s_box_loss
from .classification_losses import CLASSIFICATION_LOSSES, ClassificationLoss, FocalLoss
from .max_iou import match_anchors
from .mutual_guidance import MATCHERS, PredictionMatcher
from .pisa import Carl, IsrPositive, log_reweighting
from .pyramids import LastLevelP6P7WithoutReLU
from .switches import naming_keys, refuse_replaced
from .targets import take_boxes, take_classes

__all__ = ["LibraRetinaNet"]

# The parent's arguments that cls_loss and box_loss take the place of.
_FOCAL_LOSS = ("focal_loss_alpha", "focal_loss_gamma")
_BOX_LOSS = ("box_reg_loss_type", "smooth_l1_beta")


@META_ARCH_REGISTRY.register()
class LibraRetinaNet(RetinaNet):
    """detectron2's RetinaNet whose losses and matcher are switches.

    Switches: ``MODEL.RETINANET.CLS_LOSS_TYPE``, ``BBOX_REG_LOSS_TYPE``, ``MATCHER``,
    ``P7_ACTIVATION`` and ``CLIP_BOXES``, and ``MODEL.PISA``. With all of them at their defaults it
    computes what its parent does, bit for bit.
    """

    # The config keys it reads, and the values that ask for nothing that detectron2 has not.
    switches: ClassVar[dict[str, Collection]] = {
        "MODEL.RETINANET.MATCHER": ("max_iou",),
        "MODEL.RETINANET.CLS_LOSS_TYPE": ("focal",),
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": DETECTRON2S,
        "MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT": (1.0,),
        "MODEL.RETINANET.P7_ACTIVATION": ("auto", "relu"),
        "MODEL.RETINANET.CLIP_BOXES": ("auto", "after_nms"),
        "MODEL.PISA.ISR_POSITIVE.ENABLED": (False,),
        "MODEL.PISA.CARL.ENABLED": (False,),
    }

    @configurable
    def __init__(
        self,
        *,
        cls_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        box_reg_loss_weight: float = 1.0,
        prediction_matcher: PredictionMatcher | None = None,
        clip_before_nms: bool = False,
        isr_positive: IsrPositive | None = None,
        carl: Carl | None = None,
        **kwargs,
    ):
        """
        Args:
            cls_loss: of logits and labels, summed over anchors; None for focal loss with the
                parent's ``focal_loss_alpha`` and ``focal_loss_gamma``.
            box_loss: of each positive's deltas, anchor and ground truth; None for that of the
                parent's ``box_reg_loss_type`` and ``smooth_l1_beta``.
            box_reg_loss_weight: factor of the box loss.
            prediction_matcher: labels anchors by the current predictions; None for detectron2's
                ``anchor_matcher``, which sees the anchors alone.
            clip_before_nms: whether predicted boxes are clipped to the image, and those outside of
                it dropped, before NMS; detectron2 does so afterwards.
            isr_positive: reweights positives; None for off.
            carl: adds a loss; None for off.
            kwargs: see :class:`RetinaNet`.

        Raises:
            ValueError: if an argument is out of its range or they exclude each other.
        """
        if cls_loss is not None:
            refuse_replaced(kwargs, _FOCAL_LOSS, "cls_loss")
        if box_loss is not None:
            refuse_replaced(kwargs, _BOX_LOSS, "box_loss")
        super().__init__(**kwargs)
        self.cls_loss = cls_loss or FocalLoss(
            alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        self.box_loss = box_loss or detectron2s_box_loss(
            self.box_reg_loss_type, self.smooth_l1_beta
        )
        check_loss_weight(box_reg_loss_weight)
        self.box_reg_loss_weight = box_reg_loss_weight
        self.prediction_matcher = prediction_matcher
        self.clip_before_nms = clip_before_nms
        self.isr_positive = isr_positive
        self.carl = carl

    @classmethod
    def from_config(cls, cfg):
        options = cfg.MODEL.RETINANET
        with naming_keys(cfg, "MODEL.RETINANET"):
            check_loss_weight(options.BBOX_REG_LOSS_WEIGHT)
        try:
            ret = super().from_config(cfg)
        except KeyError as error:
            if error.args[0] not in options.IN_FEATURES:
                raise
            raise ValueError(
                f"MODEL.RETINANET.IN_FEATURES names '{error.args[0]}', a level that the pyramid of "
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} does not have"
            ) from None
        if settle("MODEL.RETINANET.P7_ACTIVATION", cfg, paper="relu", mmdet="none") == "none":
            _remove_relu(ret["backbone"])
        clip = settle("MODEL.RETINANET.CLIP_BOXES", cfg, paper="after_nms", mmdet="before_nms")
        replaced = (*_FOCAL_LOSS, *_BOX_LOSS)
        return {
            **{name: value for name, value in ret.items() if name not in replaced},
            "cls_loss": CLASSIFICATION_LOSSES.make("MODEL.RETINANET.CLS_LOSS_TYPE", cfg),
            "box_loss": BOX_LOSSES.make("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", cfg),
            "box_reg_loss_weight": options.BBOX_REG_LOSS_WEIGHT,
            "prediction_matcher": MATCHERS.make("MODEL.RETINANET.MATCHER", cfg),
            "clip_before_nms": clip == "before_nms",
            "isr_positive": IsrPositive.from_config(cfg),
            "carl": Carl.from_config(cfg),
        }

    def forward_training(self, images, features, predictions, gt_instances: list[Instances]):
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        if self.prediction_matcher is None:
            gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
            return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        gt_labels, gt_boxes, box_targets = self.prediction_matcher(
            Boxes.cat(anchors),
            cat(logits, dim=1),
            cat(deltas, dim=1),
            gt_instances,
            self.box2box_transform,
        )
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes, box_targets)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels and ground truths as the parent gives them, to the bit; see :func:`match_anchors`.

        Args:
            anchors: boxes of each level, in pixels.
            gt_instances: ground truths of each of N images.

        Returns:
            Classes to learn, (R,) int64 in [-1, K], -1 ignored and K background, and the ground
            truths that positives answer to, (R, 4), of each image.
        """
        if type(self.anchor_matcher) is not Matcher:
            return super().label_anchors(anchors, gt_instances)
        all_gts = [gt.gt_boxes for gt in gt_instances]
        matched = match_anchors(self.anchor_matcher, all_gts, Boxes.cat(anchors))
        gt_labels, gt_boxes = [], []
        for gt, matches in zip(gt_instances, matched, strict=True):
            chosen = matches.gt_indices
            gt_labels.append(take_classes(gt, chosen, matches.labels, self.num_classes))
            gt_boxes.append(take_boxes(gt, chosen))
        return gt_labels, gt_boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        box_targets: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of both tasks, each divided by the number of its positives.

        Args:
            anchors: boxes of each level.
            pred_logits: (N, anchors of the level, K) of each level.
            gt_labels: the classes to learn, (R,) of each image; -1 ignored, K background.
            pred_anchor_deltas: (N, anchors of the level, 4) of each level.
            gt_boxes: the ground truths that these answer to, (R, 4) of each image.
            box_targets: labels and ground truths of box regression, in the same form; None for
                those of classification.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, and with CARL ``loss_carl``, scalars.
        """
        anchors = Boxes.cat(anchors).tensor
        logits, deltas = cat(pred_logits, dim=1), cat(pred_anchor_deltas, dim=1)
        labels, gt_boxes = torch.stack(gt_labels), torch.stack(gt_boxes)
        positives = self._find_positives(labels)
        get_event_storage().put_scalar("num_pos_anchors", len(positives[0]) / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(len(positives[0]), 1), 100)
        loss_cls = self.classification_loss(anchors, logits, labels, deltas, gt_boxes)
        losses = {"loss_cls": loss_cls / normalizer}
        if box_targets is not None:
            labels, gt_boxes = map(torch.stack, box_targets)
            positives = self._find_positives(labels)
            normalizer = self._ema_update("box_loss_normalizer", max(len(positives[0]), 1), 100)
        box_losses = self.box_loss(
            *(self.box2box_transform, deltas[positives]),
            *(anchors[positives[1]], gt_boxes[positives]),
        )
        losses["loss_box_reg"] = box_losses.sum() / normalizer * self.box_reg_loss_weight
        if self.carl is not None:
            probs = logits[positives].float().sigmoid().gather(1, labels[positives].unsqueeze(1))
            loss_carl = carl_loss(
                probs.squeeze(1), box_losses, normalizer=normalizer, **asdict(self.carl)
            )
            losses["loss_carl"] = loss_carl * self.box_reg_loss_weight
        return losses

    def classification_loss(
        self, anchors: Tensor, logits: Tensor, labels: Tensor, deltas: Tensor, gt_boxes: Tensor
    ) -> Tensor:
        """Classification loss, summed over the anchors that are trained on.

        Args:
            anchors: (R, 4) in pixels.
            logits: (N, R, K).
            labels: (N, R) int64 in [-1, K]; -1 ignored, K background.
            deltas: (N, R, 4); read with ISR-P only, as are:
            gt_boxes: (N, R, 4) in pixels.
        """
        labels = self.cls_loss.choose(logits, labels, anchors)
        if self.isr_positive is None:
            return self.cls_loss(logits, labels)
        weights = self.classification_weights(anchors, logits, labels, deltas, gt_boxes)
        return self.cls_loss(logits, labels, weights)

    @torch.no_grad()
    def classification_weights(
        self, anchors: Tensor, logits: Tensor, labels: Tensor, deltas: Tensor, gt_boxes: Tensor
    ) -> Tensor:
        """ISR-P's weight of each anchor in the classification loss, (N, R); 1 for negatives."""
        positives = images, slots = self._find_positives(labels)
        classes, gt_boxes = labels[positives], gt_boxes[positives]
        boxes = self.box2box_transform.apply_deltas(deltas[positives], anchors[slots])
        # The same box in the same image is the same ground truth.
        rows = torch.cat([images.to(gt_boxes.dtype).unsqueeze(1), gt_boxes], dim=1)
        losses = self.cls_loss.of_anchors(logits[positives], classes)
        reweighted = reweight_positives(
            matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes)),
            rows.unique(dim=0, return_inverse=True)[1],
            classes,
            losses,
            **asdict(self.isr_positive),
        )
        log_reweighting(losses, torch.ones_like(reweighted), reweighted)
        weights = torch.ones(labels.shape, dtype=reweighted.dtype, device=labels.device)
        weights[positives] = reweighted
        return weights

    def _find_positives(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and anchors of the positives among labels, (P,) each."""
        return ((labels >= 0) & (labels != self.num_classes)).nonzero(as_tuple=True)

    def _decode_multi_level_predictions(self, *args) -> Instances:
        predictions = super()._decode_multi_level_predictions(*args)
        if self.clip_before_nms:
            predictions.pred_boxes.clip(predictions.image_size)
            predictions = predictions[predictions.pred_boxes.nonempty()]
        return predictions


def check_loss_weight(box_reg_loss_weight: float) -> None:
    """Raises ``ValueError`` unless this can be a factor of the box loss."""
    if not 0.0 <= box_reg_loss_weight < 1e6:
        raise ValueError(
            f"bbox_reg_loss_weight must not be negative, or huge, got {box_reg_loss_weight}"
        )


def _remove_relu(backbone: Backbone) -> None:
    """Makes P7 from P6 itself where the pyramid has them from detectron2's block."""
    pyramid = backbone.pyramid if isinstance(backbone, BalancedPyramid) else backbone
    top_block = getattr(pyramid, "top_block", None)
    if isinstance(top_block, LastLevelP6P7):
        pyramid.top_block = LastLevelP6P7WithoutReLU(top_block)
