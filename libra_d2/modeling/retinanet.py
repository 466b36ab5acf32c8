"""RetinaNet with the classification losses, box losses and matchers of the balanced family.

Shape shorthand in this module:

    N: number of images
    P: number of positives, combined over all images
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
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor

from libra_d2.config import balanced_l1_options, choose, pisa_options
from libra_d2.losses import carl_loss
from libra_d2.ranking import reweight_positives

from .box_losses import BOX_LOSSES, BoxLoss
from .classification_losses import CLASSIFICATION_LOSSES, ClassificationLoss
from .mutual_guidance import MATCHERS, MutualGuidanceMatcher
from .pisa_log import log_reweighting
from .pyramids import LastLevelP6P7WithoutReLU

__all__ = ["LibraRetinaNet"]


@META_ARCH_REGISTRY.register()
class LibraRetinaNet(RetinaNet):
    """detectron2's RetinaNet whose losses and matcher are switches.

    Switches: ``MODEL.RETINANET.CLS_LOSS_TYPE``, ``MODEL.RETINANET.BBOX_REG_LOSS_TYPE``,
    ``MODEL.RETINANET.MATCHER``, ``MODEL.PISA`` and ``MODEL.LIBRA.REFERENCE``. With all of them at
    their defaults it computes what its parent does, bit for bit.
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
        isr_positive: dict | None = None,
        carl: dict | None = None,
        **kwargs,
    ):
        """
        Args:
            cls_loss: of logits and labels, summed over anchors.
            box_loss: of each positive's deltas, anchor and ground truth.
            box_reg_loss_weight: factor of the box loss.
            prediction_matcher: labels anchors by the current predictions; None for detectron2's
                ``anchor_matcher``, which sees the anchors alone.
            clip_before_nms: whether predicted boxes are clipped to the image, and those outside of
                it dropped, before NMS; detectron2 does so afterwards.
            isr_positive: ``k`` and ``bias`` of ISR-P; None for off.
            carl: ``k`` and ``bias`` of CARL; None for off.
            kwargs: see :class:`RetinaNet`.
        """
        super().__init__(**kwargs)
        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self.box_reg_loss_weight = box_reg_loss_weight
        self.prediction_matcher = prediction_matcher
        self.clip_before_nms = clip_before_nms
        self.isr_positive = isr_positive
        self.carl = carl

    @classmethod
    def from_config(cls, cfg):
        options = cfg.MODEL.RETINANET
        try:
            ret = super().from_config(cfg)
        except KeyError as error:
            if error.args[0] not in options.IN_FEATURES:
                raise
            raise ValueError(
                f"MODEL.RETINANET.IN_FEATURES names '{error.args[0]}', a level that the pyramid of "
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} does not have"
            ) from None
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
            "isr_positive": pisa_options(cfg, "ISR_POSITIVE"),
            "carl": pisa_options(cfg, "CARL"),
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
        num_positives = self._is_positive(labels).sum().item()
        get_event_storage().put_scalar("num_pos_anchors", num_positives / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(num_positives, 1), 100)
        loss_cls = self.classification_loss(anchors, logits, labels, deltas, gt_boxes)
        losses = {"loss_cls": loss_cls / normalizer}
        if box_targets is not None:
            labels, gt_boxes = (torch.stack(images) for images in box_targets)
            num_positives = self._is_positive(labels).sum().item()
            normalizer = self._ema_update("box_loss_normalizer", max(num_positives, 1), 100)
        box_losses = self.box_reg_losses(anchors, labels, deltas, gt_boxes)
        losses["loss_box_reg"] = box_losses.sum() / normalizer * self.box_reg_loss_weight
        if self.carl is not None:
            positives = self._is_positive(labels)
            probs = logits[positives].float().sigmoid().gather(1, labels[positives].unsqueeze(1))
            loss_carl = carl_loss(probs.squeeze(1), box_losses, normalizer=normalizer, **self.carl)
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
        positives = self._is_positive(labels)
        images, slots = positives.nonzero(as_tuple=True)
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
            **self.isr_positive,
        )
        log_reweighting(losses, torch.ones_like(reweighted), reweighted)
        weights = torch.ones(labels.shape, dtype=reweighted.dtype, device=labels.device)
        weights[positives] = reweighted
        return weights

    def box_reg_losses(
        self, anchors: Tensor, labels: Tensor, deltas: Tensor, gt_boxes: Tensor
    ) -> Tensor:
        """Box regression loss of each positive, (P, 4) or (P,).

        Args:
            anchors: (R, 4) in pixels.
            labels: (N, R) int64 in [-1, K]; positives are in [0, K).
            deltas: (N, R, 4).
            gt_boxes: (N, R, 4) in pixels; read for positives only.
        """
        positives = self._is_positive(labels)
        sources = anchors.expand_as(gt_boxes)[positives]
        return self.box_loss(
            self.box2box_transform, deltas[positives], sources, gt_boxes[positives]
        )

    def _is_positive(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels != self.num_classes)

    def _decode_multi_level_predictions(self, *args) -> Instances:
        predictions = super()._decode_multi_level_predictions(*args)
        if self.clip_before_nms:
            predictions.pred_boxes.clip(predictions.image_size)
            predictions = predictions[predictions.pred_boxes.nonempty()]
        return predictions
