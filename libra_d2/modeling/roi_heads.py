"""ROI heads with the samplers and losses of the balanced family."""

import contextlib
from collections.abc import Iterator

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads, StandardROIHeads
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor, nn

from libra_d2.config import background_threshold

from .fast_rcnn import LibraFastRCNNOutputLayers
from .samplers import Predictions, SamplingMatcher
from .sampling_log import log_sampled

__all__ = ["LibraCascadeROIHeads", "LibraROIHeads"]


class _BalancedSampling:
    """Samples with a :class:`SamplingMatcher`, for any ROI heads it is mixed into."""

    @configurable
    def __init__(self, *, num_iou_bins: int = 3, background_iou: float = 0.5, **kwargs):
        """
        Args:
            num_iou_bins: number of bins in which the sampled negatives' IoU is logged.
            background_iou: upper edge of the last of them, in (0, 1].
            kwargs: those of the ROI heads.
        """
        super().__init__(**kwargs)
        self.num_iou_bins = num_iou_bins
        self.background_iou = background_iou

    def _predict(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[LibraFastRCNNOutputLayers, tuple[Tensor, Tensor]]:
        """The (first) predictor, and its logits and deltas of the proposals."""
        raise NotImplementedError

    def forward(self, images, features, proposals, targets=None):
        if not (self.training and getattr(self.proposal_matcher, "needs_predictions", False)):
            return super().forward(images, features, proposals, targets)
        predictions = self._predict_candidates(features, proposals, targets)
        with self.proposal_matcher.looking_at(predictions):
            return super().forward(images, features, proposals, targets)

    @torch.no_grad()
    def _predict_candidates(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> list[Predictions]:
        """Predictions for all that :meth:`label_and_sample_proposals` will choose from."""
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        with _undisturbed(self.box_head, self.box_predictor):
            predictor, (logits, deltas) = self._predict(features, proposals)
        best = logits[:, :-1].argmax(dim=1)
        deltas = predictor.deltas_of(deltas, torch.arange(len(best), device=best.device), best)
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
        sizes = [len(p) for p in proposals]
        return [
            Predictions(*image, gt.gt_classes)
            for *image, gt in zip(logits.split(sizes), boxes.split(sizes), targets, strict=True)
        ]

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
        """
        num_gts = [len(t) for t in targets]
        # Numbers of all to choose from: the proposals, then the ground truths that are appended.
        numbered = [
            (
                _with(p, candidate=_range(0, p)),
                _with(t, candidate=_range(len(p), t), gt_indices=_range(0, t)),
            )
            for p, t in zip(proposals, targets, strict=True)
        ]
        sampled = super().label_and_sample_proposals(*map(list, zip(*numbered, strict=True)))
        weights = getattr(self.proposal_matcher, "weights", None) or [None] * len(sampled)
        for image, image_weights in zip(sampled, weights, strict=True):
            if image_weights is not None:
                image.loss_weights = image_weights[image.candidate]
            image.remove("candidate")
        log_sampled(
            sampled,
            num_gts=num_gts,
            background_label=self.num_classes,
            num_bins=self.num_iou_bins,
            max_iou=self.background_iou,
        )
        return sampled


@ROI_HEADS_REGISTRY.register()
class LibraROIHeads(_BalancedSampling, StandardROIHeads):
    """detectron2's standard ROI heads with balanced sampling and losses.

    Switches: ``MODEL.ROI_HEADS.POSITIVE_SAMPLER``, ``MODEL.ROI_HEADS.NEGATIVE_SAMPLER``,
    ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE`` and ``MODEL.PISA``. With all of them at their defaults
    it computes what its parent does, bit for bit.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        matcher = SamplingMatcher.from_config(cfg, ret["proposal_matcher"])
        return {**ret, **_log_options(cfg), "proposal_matcher": matcher}

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        shape = ret["box_head"].output_shape
        ret["box_predictor"] = _replace_predictor(cfg, shape, ret["box_predictor"])
        return ret

    def _predict(self, features, proposals):
        pooled = self.box_pooler(
            [features[f] for f in self.box_in_features], [p.proposal_boxes for p in proposals]
        )
        return self.box_predictor, self.box_predictor(self.box_head(pooled))


@ROI_HEADS_REGISTRY.register()
class LibraCascadeROIHeads(_BalancedSampling, CascadeROIHeads):
    """detectron2's cascade with balanced sampling in its first stage and balanced losses in all.

    Switches as in :class:`LibraROIHeads`. With all of them at their defaults it computes what its
    parent does, bit for bit.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), **_log_options(cfg)}

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        first, *others = ret["proposal_matchers"]
        ret["proposal_matchers"] = [SamplingMatcher.from_config(cfg, first), *others]
        ret["box_predictors"] = [
            _replace_predictor(cfg, head.output_shape, predictor)
            for head, predictor in zip(ret["box_heads"], ret["box_predictors"], strict=True)
        ]
        return ret

    def _predict(self, features, proposals):
        features = [features[f] for f in self.box_in_features]
        return self.box_predictor[0], self._run_stage(features, proposals, 0)

    def _match_and_label_boxes(self, proposals, stage, targets):
        """Labels as the parent does, and for ISR-P adds the field ``gt_indices``."""
        for image, gt in zip(proposals, targets, strict=True):
            if len(gt) > 0 and self.box_predictor[stage].isr_positive is not None:
                ious = pairwise_iou(gt.gt_boxes, image.proposal_boxes)
                image.gt_indices = ious.max(dim=0).indices
        return super()._match_and_label_boxes(proposals, stage, targets)


def _log_options(cfg) -> dict:
    return {
        "num_iou_bins": cfg.MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS,
        "background_iou": background_threshold(cfg),
    }


def _replace_predictor(cfg, input_shape, predictor: nn.Module) -> LibraFastRCNNOutputLayers:
    """The same predictor with this project's losses.

    The weights that detectron2 has drawn are taken over and no other random numbers are drawn, so
    that the same seed gives the same model.
    """
    transform = Box2BoxTransform(weights=predictor.box2box_transform.weights)
    with torch.random.fork_rng(devices=[]):
        replaced = LibraFastRCNNOutputLayers(cfg, input_shape, box2box_transform=transform)
    replaced.load_state_dict(predictor.state_dict())
    return replaced


@contextlib.contextmanager
def _undisturbed(*modules: nn.Module) -> Iterator[None]:
    """A forward pass in here leaves no trace in random state and batch-norm statistics."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    devices = {p.device for module in modules for p in module.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        # Under AMP older versions of torch would reuse weights cast in here, without gradient.
        torch.clear_autocast_cache()


def _range(start: int, instances: Instances) -> Tensor:
    box_field = "gt_boxes" if instances.has("gt_boxes") else "proposal_boxes"
    device = instances.get(box_field).device
    return torch.arange(start, start + len(instances), device=device)


def _with(instances: Instances, **fields: Tensor) -> Instances:
    """A copy of one image's instances that has more fields."""
    return Instances(instances.image_size, **instances.get_fields(), **fields)
