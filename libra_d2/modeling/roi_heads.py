"""ROI heads with the samplers and losses of the balanced family."""

import contextlib
import itertools
from collections.abc import Collection
from typing import ClassVar

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Instances
from torch import Tensor, nn

from .fast_rcnn import LibraFastRCNNOutputLayers, check_predictor, replace_predictor
from .look import Look, LookPooler, can_look
from .samplers import (
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    Predictions,
    Sampler,
    background_iou,
)
from .sampling_log import log_sampled
from .sampling_matcher import SamplingMatcher, needs_predictions
from .undisturbed import undisturbed

__all__ = ["BalancedSampling", "LibraROIHeads", "LibraRes5ROIHeads"]


class BalancedSampling:
    """Mixed into ROI heads, before their class, it gives them balanced sampling and losses.

    .. code-block:: python

        @ROI_HEADS_REGISTRY.register()
        class MyBalancedROIHeads(BalancedSampling, MyROIHeads): ...

    Made from a config, output layers that are detectron2's own are replaced by
    :class:`LibraFastRCNNOutputLayers`, of the same weights and settings.

    Switches: ``MODEL.ROI_HEADS.POSITIVE_SAMPLER``, ``MODEL.ROI_HEADS.NEGATIVE_SAMPLER``,
    ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE`` and ``MODEL.PISA``. With all of them at their defaults
    the heads compute what they would without, bit for bit.
    """

    # The config keys it reads, and the values that ask for nothing that detectron2 has not.
    switches: ClassVar[dict[str, Collection]] = {
        "MODEL.ROI_HEADS.POSITIVE_SAMPLER": ("random",),
        "MODEL.ROI_HEADS.NEGATIVE_SAMPLER": ("random",),
        **LibraFastRCNNOutputLayers.switches,
    }

    # Whether, in a class and not in its subclasses, ``_forward_box`` begins with what ``_predict``
    # does, of the same features and boxes, so that it need not be computed twice.
    trains_as_it_looks: ClassVar[bool] = False
    # During a forward pass in training, what was computed of all proposals.
    _look: Look | None = None

    @configurable
    def __init__(
        self,
        *,
        positive_sampler: Sampler | None = None,
        negative_sampler: Sampler | None = None,
        num_iou_bins: int = 3,
        **kwargs,
    ):
        """
        Args:
            positive_sampler: chooses the positives to train on, such as
                :class:`~libra_d2.modeling.InstanceBalancedSampler`; None for the parent's choice.
            negative_sampler: the same for negatives.
            num_iou_bins: number of bins in which the sampled negatives' IoU is logged.
            kwargs: those of the ROI heads.

        Raises:
            ValueError: if a sampler looks at predictions and the output layers do not fit it.
        """
        super().__init__(**kwargs)
        self.num_iou_bins = num_iou_bins
        matcher = self.proposal_matcher
        self.background_iou = 0.5
        if isinstance(matcher, Matcher):  # which has put infinities around its thresholds
            self.background_iou = background_iou(matcher.thresholds[1:-1], matcher.labels)
        if positive_sampler is not None or negative_sampler is not None:
            self.proposal_matcher = SamplingMatcher(
                matcher,
                positive_sampler=positive_sampler,
                negative_sampler=negative_sampler,
                batch_size_per_image=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
            )
        for sampler in (positive_sampler, negative_sampler):
            if needs_predictions(sampler):
                check_predictor(self._predictor(), sampler)
        if self._takes_over() and needs_predictions(self.proposal_matcher):
            self.box_pooler = LookPooler.like(self.box_pooler)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        if "box_predictor" in ret:
            ret["box_predictor"] = replace_predictor(ret["box_predictor"], cfg)
        if "box_predictors" in ret:
            ret["box_predictors"] = [replace_predictor(p, cfg) for p in ret["box_predictors"]]
        return {
            **ret,
            "positive_sampler": POSITIVE_SAMPLERS.make("MODEL.ROI_HEADS.POSITIVE_SAMPLER", cfg),
            "negative_sampler": NEGATIVE_SAMPLERS.make("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", cfg),
            "num_iou_bins": cfg.MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS,
        }

    def _takes_over(self) -> bool:
        # A subclass may have overridden whatever lies between.
        return vars(type(self)).get("trains_as_it_looks", False)

    def _predictor(self) -> nn.Module:
        """The (first) output layers."""
        return self.box_predictor

    def _predict(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Its logits and deltas of the proposals; to be overridden where heads go another way."""
        pooled = self.box_pooler(
            [features[f] for f in self.box_in_features], [p.proposal_boxes for p in proposals]
        )
        return self.box_predictor(self.box_head(pooled))

    def forward(self, images, features, proposals, targets=None):
        if not self.training or not needs_predictions(self.proposal_matcher):
            return super().forward(images, features, proposals, targets)
        if self._takes_over() and can_look(self.box_pooler, self.box_head, self._predictor()):
            self._look = Look()
        try:
            proposals, targets = self._add_predictions(features, proposals, targets)
            return super().forward(images, features, proposals, targets)
        finally:
            self._look = None

    def _forward_box(self, *args, **kwargs):
        """The parent's, with the values of the look at all proposals, where there was one."""
        with self._look or contextlib.nullcontext():
            return super()._forward_box(*args, **kwargs)

    @torch.no_grad()
    def _add_predictions(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[list[Instances], list[Instances]]:
        """Copies that have what is predicted for them: ``candidate_logits``, ``candidate_boxes``.

        Ground truths have them too where they are appended to the proposals.
        """
        candidates = proposals
        if self.proposal_append_gt:
            candidates = add_ground_truth_to_proposals(targets, proposals)
        with undisturbed(self), self._look or contextlib.nullcontext():
            logits, deltas = self._predict(features, candidates)
        predictor = self._predictor()
        best = logits[:, :-1].argmax(dim=1)
        deltas = predictor.deltas_of(deltas, torch.arange(len(best), device=best.device), best)
        boxes = cat([p.proposal_boxes.tensor for p in candidates])
        boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
        sizes = [len(p) for p in candidates]
        with_predictions = []
        for image, gt, own_logits, own_boxes in zip(
            proposals, targets, logits.split(sizes), boxes.split(sizes), strict=True
        ):
            n = len(image)
            image = _with(image, candidate_logits=own_logits[:n], candidate_boxes=own_boxes[:n])
            if self.proposal_append_gt:
                gt = _with(gt, candidate_logits=own_logits[n:], candidate_boxes=own_boxes[n:])
            with_predictions.append((image, gt))
        return tuple(map(list, zip(*with_predictions, strict=True)))

    def _sample_proposals(
        self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Samples as the parent does, by the matcher's labels also where there is no ground truth.

        There the parent takes every proposal for background, those too that the matcher has
        labelled as ignored.
        """
        if len(gt_classes) > 0 or not isinstance(self.proposal_matcher, SamplingMatcher):
            return super()._sample_proposals(matched_idxs, matched_labels, gt_classes)
        classes = torch.where(matched_labels == 0, self.num_classes, -1)
        _, sampled = subsample_labels(
            classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
        )
        return sampled, classes[sampled]

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Samples as the parent does and logs what was sampled.

        Where an image has ground truths, its proposals have one more field: ``gt_indices``, the
        index in the image of the ground truth each answers to. If the sampler weighs proposals
        they have ``loss_weights`` too.

        Raises:
            ValueError: if a sampler looks at predictions and proposals and targets have none:
                :meth:`forward` adds them.
        """
        num_gts = [len(t) for t in targets]
        predictions = self._take_predictions(proposals, targets)
        # Numbers of all to choose from: the proposals, then the ground truths that are appended.
        numbered = [
            (
                _with(p, candidate=_range(0, p)),
                _with(t, candidate=_range(len(p), t), gt_indices=_range(0, t)),
            )
            for p, t in zip(proposals, targets, strict=True)
        ]
        numbered = map(list, zip(*numbered, strict=True))
        if isinstance(self.proposal_matcher, SamplingMatcher):
            with self.proposal_matcher.of(predictions) as weights:
                sampled = super().label_and_sample_proposals(*numbered)
        else:
            sampled = super().label_and_sample_proposals(*numbered)
            weights = [None] * len(sampled)
        if self._look is not None:
            starts = itertools.accumulate((len(p.boxes) for p in predictions[:-1]), initial=0)
            rows = [image.candidate + n for image, n in zip(sampled, starts, strict=True)]
            self._look.keep(torch.cat(rows))
        for image, image_weights in zip(sampled, weights, strict=True):
            if image_weights is not None:
                image.loss_weights = image_weights[image.candidate]
            for name in ("candidate", "candidate_logits", "candidate_boxes"):
                if image.has(name):
                    image.remove(name)
        log_sampled(
            sampled,
            num_gts=num_gts,
            background_label=self.num_classes,
            num_bins=self.num_iou_bins,
            max_iou=self.background_iou,
        )
        return sampled

    def _take_predictions(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Predictions]:
        """What is predicted for each image's candidates, from the fields that have it."""
        predictions = []
        for image, gt in zip(proposals, targets, strict=True):
            if image.has("candidate_logits"):
                parts = [image, gt] if self.proposal_append_gt else [image]
                logits = torch.cat([part.candidate_logits for part in parts])
                boxes = torch.cat([part.candidate_boxes for part in parts])
                predictions.append(Predictions(logits, boxes, gt.gt_classes))
        return predictions


@ROI_HEADS_REGISTRY.register()
class LibraROIHeads(BalancedSampling, StandardROIHeads):
    """detectron2's standard ROI heads with balanced sampling and losses."""

    trains_as_it_looks = True


@ROI_HEADS_REGISTRY.register()
class LibraRes5ROIHeads(BalancedSampling, Res5ROIHeads):
    """detectron2's C4 heads, whose features are made by res5, with balanced sampling and losses."""

    def _predict(self, features, proposals):
        boxes = [p.proposal_boxes for p in proposals]
        pooled = self._shared_roi_transform([features[f] for f in self.in_features], boxes)
        return self.box_predictor(pooled.mean(dim=[2, 3]))


def _range(start: int, instances: Instances) -> Tensor:
    box_field = "gt_boxes" if instances.has("gt_boxes") else "proposal_boxes"
    device = instances.get(box_field).device
    return torch.arange(start, start + len(instances), device=device)


def _with(instances: Instances, **fields: Tensor) -> Instances:
    """A copy of one image's instances that has more fields."""
    return Instances(instances.image_size, **instances.get_fields(), **fields)
