"""Samplers at the matcher's seam: a matcher that labels what was not chosen as ignored.

Shape shorthand in this module:

    G: number of ground truths in an image
    K: number of foreground classes
    P: number of proposals of an image, appended ground truths included
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling.matcher import Matcher
from torch import Tensor
from torch.nn import functional as F

from libra_d2.config import background_threshold, choose
from libra_d2.ranking import preserve_loss
from libra_d2.sampling import (
    sample_hard,
    sample_instance_balanced_positives,
    sample_iou_balanced_negatives,
    sample_score_hlr_negatives,
)

__all__ = ["NEGATIVE_SAMPLERS", "POSITIVE_SAMPLERS", "Matches", "Predictions", "SamplingMatcher"]


@dataclass
class Predictions:
    """What the box head predicts for one image's proposals, without gradient."""

    logits: Tensor  # (P, K + 1), background last
    boxes: Tensor  # (P, 4) in pixels, those of the highest-scoring foreground class
    gt_classes: Tensor  # (G,), of the image's ground truths


@dataclass
class Matches:
    """What a sampler may look at: the outcome of matching one image's proposals."""

    ious: Tensor  # (P,), each proposal's largest IoU with any ground truth; 0 without ground truths
    gt_indices: Tensor  # (P,) int64, the ground truth of that IoU
    labels: Tensor  # (P,) int8; 1 positive, 0 negative, -1 ignored
    predictions: Predictions | None = None  # for samplers that ask for them
    weights: Tensor | None = None  # (P,), of each in the classification loss, if a sampler sets it

    @functools.cached_property
    def classification_losses(self) -> Tensor:
        """Cross entropy of each proposal with its ground truth's class or background, (P,)."""
        logits, gt_classes = self.predictions.logits.float(), self.predictions.gt_classes
        target = torch.full_like(self.gt_indices, logits.shape[1] - 1)
        if len(gt_classes) > 0:
            target = torch.where(self.labels == 1, gt_classes[self.gt_indices], target)
        return F.cross_entropy(logits, target, reduction="none")


# (matches, candidates (P,) bool, num_samples) -> kept (P,) bool
Sampler = Callable[[Matches, Tensor, int | Tensor], Tensor]


@dataclass
class SamplerKind:
    """How a sampler is made from the config, and whether it looks at predictions."""

    make: Callable[[CfgNode], Sampler]
    needs_predictions: bool = False


def _instance_balanced(cfg: CfgNode) -> Sampler:
    return lambda matches, candidates, num_samples: sample_instance_balanced_positives(
        matches.gt_indices, candidates, num_samples
    )


def _iou_balanced(cfg: CfgNode) -> Sampler:
    options = cfg.MODEL.ROI_HEADS.IOU_BALANCED
    use_image_max = cfg.MODEL.LIBRA.REFERENCE == "mmdet"
    upper = background_threshold(cfg)
    num_bins, floor_iou, floor_fraction = (
        options.NUM_BINS,
        options.FLOOR_IOU,
        options.FLOOR_FRACTION,
    )

    def sample(matches: Matches, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
        return sample_iou_balanced_negatives(
            matches.ious,
            candidates,
            num_samples,
            num_bins=num_bins,
            iou_range=(0.0, matches.ious.amax() if use_image_max else upper),
            floor_iou=floor_iou,
            floor_fraction=floor_fraction,
        )

    return sample


def _ohem(cfg: CfgNode) -> Sampler:
    return lambda matches, candidates, num_samples: sample_hard(
        matches.classification_losses, candidates, num_samples
    )


def _score_hlr(cfg: CfgNode) -> Sampler:
    options = cfg.MODEL.ROI_HEADS.SCORE_HLR
    options = {
        "score_thresh": options.SCORE_THRESH,
        "nms_thresh": options.NMS_THRESH,
        "k": options.K,
        "bias": options.BIAS,
    }

    def sample(matches: Matches, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
        scores = matches.predictions.logits.float().softmax(dim=1)[:, :-1].amax(dim=1)
        kept, weights = sample_score_hlr_negatives(
            scores, matches.predictions.boxes, candidates, num_samples, **options
        )
        # Weights are 0 where nothing is kept, so that only the kept count in the sums.
        losses = matches.classification_losses * kept
        matches.weights = torch.where(kept, preserve_loss(weights, losses), 1.0)
        return kept

    return sample


# A sampler a line: its name in the config and its kind. None leaves the choice to detectron2's own
# random subsampling.
POSITIVE_SAMPLERS: dict[str, SamplerKind | None] = {
    "random": None,
    "instance_balanced": SamplerKind(_instance_balanced),
    "ohem": SamplerKind(_ohem, needs_predictions=True),
}
NEGATIVE_SAMPLERS: dict[str, SamplerKind | None] = {
    "random": None,
    "iou_balanced": SamplerKind(_iou_balanced),
    "ohem": SamplerKind(_ohem, needs_predictions=True),
    "score_hlr": SamplerKind(_score_hlr, needs_predictions=True),
}


class SamplingMatcher:
    """Matches, samples, and labels what was not chosen -1 (ignored).

    The matcher is the only place in detectron2's ROI heads that sees IoUs. After it has labelled
    all but a sample as ignored, the heads' own random subsampling has nothing left to drop.

    Args:
        matcher: detectron2's matcher.
        positive_sampler: chooses among the positives; None leaves them all to what comes after.
        negative_sampler: the same for negatives.
        batch_size_per_image: number of proposals to train on in an image.
        positive_fraction: largest share of positives among them, in [0, 1].
        needs_predictions: whether it has to be used inside of :meth:`looking_at`.
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        positive_sampler: Sampler | None,
        negative_sampler: Sampler | None,
        batch_size_per_image: int,
        positive_fraction: float,
        needs_predictions: bool = False,
    ):
        self.matcher = matcher
        self.positive_sampler = positive_sampler
        self.negative_sampler = negative_sampler
        self.batch_size_per_image = batch_size_per_image
        self.max_positives = int(batch_size_per_image * positive_fraction)
        self.needs_predictions = needs_predictions
        self.weights: list[Tensor | None] = []
        self._predictions: Iterator[Predictions] = iter(())

    @classmethod
    def from_config(cls, cfg: CfgNode, matcher: Matcher) -> "Matcher | SamplingMatcher":
        """The matcher the config asks for: ``matcher`` itself if both samplers are random."""
        options = cfg.MODEL.ROI_HEADS
        positive = choose("MODEL.ROI_HEADS.POSITIVE_SAMPLER", cfg, POSITIVE_SAMPLERS)
        negative = choose("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", cfg, NEGATIVE_SAMPLERS)
        if positive is None and negative is None:
            return matcher
        return cls(
            matcher,
            positive_sampler=positive and positive.make(cfg),
            negative_sampler=negative and negative.make(cfg),
            batch_size_per_image=options.BATCH_SIZE_PER_IMAGE,
            positive_fraction=options.POSITIVE_FRACTION,
            needs_predictions=any(kind and kind.needs_predictions for kind in (positive, negative)),
        )

    @contextlib.contextmanager
    def looking_at(self, predictions: list[Predictions]) -> Iterator[None]:
        """Inside, the images of a batch are matched in turn, with these predictions.

        ``weights`` gets, for each image that has been matched, its weights, (P,), or None.
        """
        self.weights, self._predictions = [], iter(predictions)
        try:
            yield
        finally:
            self.weights, self._predictions = [], iter(())

    @torch.no_grad()
    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Matches and samples one image's proposals.

        Args:
            match_quality_matrix: IoUs, shape (G, P).

        Returns:
            Each proposal's ground truth, (P,) int64, and label, (P,) int8: 1 and 0 for the chosen
            positives and negatives, -1 for the rest.
        """
        gt_indices, labels = self.matcher(match_quality_matrix)
        if match_quality_matrix.shape[0] > 0:
            ious = match_quality_matrix.amax(dim=0)
        else:
            ious = match_quality_matrix.new_zeros(match_quality_matrix.shape[1])
        predictions = None
        if self.needs_predictions:
            predictions = next(self._predictions, None)
            if predictions is None:
                raise RuntimeError("this sampler needs predictions: match inside of looking_at")
        matches = Matches(ious, gt_indices, labels, predictions)
        if len(labels) > 0:
            labels = self._sample(matches)
        if self.needs_predictions:
            self.weights.append(matches.weights)
        return gt_indices, labels

    def _sample(self, matches: Matches) -> Tensor:
        labels = matches.labels
        positives, negatives = labels == 1, labels == 0
        if self.positive_sampler is not None:
            kept = self.positive_sampler(matches, positives, self.max_positives)
            labels = labels.masked_fill(positives & ~kept, -1)
        if self.negative_sampler is not None:
            num_positives = positives.sum().clamp(max=self.max_positives)
            kept = self.negative_sampler(
                matches, negatives, self.batch_size_per_image - num_positives
            )
            labels = labels.masked_fill(negatives & ~kept, -1)
        return labels
