"""Samplers at the matcher's seam: a matcher that labels what was not chosen as ignored.

Shape shorthand in this module:

    G: number of ground truths in an image
    K: number of foreground classes
    P: number of candidates of an image: proposals, appended ground truths included, or anchors
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.modeling.matcher import Matcher
from torch import Tensor
from torch.nn import functional as F

from libra_d2.config import settle
from libra_d2.ranking import check_importance, preserve_loss
from libra_d2.sampling import (
    sample_hard,
    sample_instance_balanced_positives,
    sample_iou_balanced_negatives,
    sample_score_hlr_negatives,
)

from .switches import SwitchRegistry, from_keys, naming_keys

__all__ = [
    "NEGATIVE_SAMPLERS",
    "POSITIVE_SAMPLERS",
    "InstanceBalancedSampler",
    "IouBalancedSampler",
    "Matches",
    "OhemSampler",
    "Predictions",
    "Sampler",
    "SamplingMatcher",
    "ScoreHlrSampler",
    "background_iou",
]

MAX_IOU_BINS = 100

POSITIVE_SAMPLERS, NEGATIVE_SAMPLERS = (
    SwitchRegistry(f"{sign}_SAMPLERS", [f"MODEL.{h}.{sign}_SAMPLER" for h in ("ROI_HEADS", "RPN")])
    for sign in ("POSITIVE", "NEGATIVE")
)
# None: the choice is left to detectron2's own random subsampling, which comes after.
for registry in (POSITIVE_SAMPLERS, NEGATIVE_SAMPLERS):
    registry.register(type(None), name="random")


@dataclass
class Predictions:
    """What the box head predicts for one image's proposals, without gradient."""

    logits: Tensor  # (P, K + 1), background last
    boxes: Tensor  # (P, 4) in pixels, those of the highest-scoring foreground class
    gt_classes: Tensor  # (G,), of the image's ground truths


@dataclass
class Matches:
    """What a sampler may look at: the outcome of matching one image's candidates."""

    ious: (
        Tensor  # (P,), each candidate's largest IoU with any ground truth; 0 without ground truths
    )
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


class Sampler(Protocol):
    """What a registered sampler is. If it needs predictions it says so in ``needs_predictions``."""

    def __call__(self, matches: Matches, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
        """Which candidates are trained on: a mask, (P,) bool, of a mask, (P,) bool."""


@POSITIVE_SAMPLERS.register(name="instance_balanced")
@dataclass(frozen=True)
class InstanceBalancedSampler:
    """As many positives from each ground truth (Libra R-CNN, section 3.1)."""

    def __call__(self, matches: Matches, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
        return sample_instance_balanced_positives(matches.gt_indices, candidates, num_samples)


@NEGATIVE_SAMPLERS.register(name="iou_balanced")
@dataclass(frozen=True, kw_only=True)
class IouBalancedSampler:
    """As many negatives from each bin of IoU (Libra R-CNN, section 3.1).

    Args:
        num_bins: number of bins, in [1, 100].
        floor_iou: upper edge of the floor set; 0 for none.
        floor_fraction: share of the samples wanted from the floor set, in [0, 1].
        upper_iou: where the bins end, in (0, 1], the matcher's background threshold in the paper;
            None for the largest IoU of each image, as mmdetection has it.

    Raises:
        ValueError: if one is out of its range.
    """

    num_bins: int = 3
    floor_iou: float = 0.0
    floor_fraction: float = 0.0
    upper_iou: float | None = 0.5

    def __post_init__(self):
        if not 1 <= self.num_bins <= MAX_IOU_BINS:
            raise ValueError(f"num_bins must be in [1, {MAX_IOU_BINS}], got {self.num_bins}")
        if not 0.0 <= self.floor_fraction <= 1.0:
            raise ValueError(f"floor_fraction must be in [0, 1], got {self.floor_fraction}")
        if self.upper_iou is not None and not 0.0 < self.upper_iou <= 1.0:
            raise ValueError(f"upper_iou must be in (0, 1], got {self.upper_iou}")
        if not 0.0 <= self.floor_iou < (self.upper_iou or 1.0):
            raise ValueError(
                f"floor_iou must be below where the bins end, {self.upper_iou or 1.0}, and not "
                f"negative, got {self.floor_iou}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "IouBalancedSampler":
        group, options = f"MODEL.{head}.IOU_BALANCED", cfg.MODEL[head]
        background = background_iou(options.IOU_THRESHOLDS, options.IOU_LABELS)
        end = settle(f"{group}.UPPER_IOU", cfg, paper="background", mmdet="image_max")
        upper_iou = background if end == "background" else None
        return from_keys(cls, cfg, group, upper_iou=upper_iou)

    def __call__(self, matches: Matches, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
        return sample_iou_balanced_negatives(
            matches.ious,
            candidates,
            num_samples,
            num_bins=self.num_bins,
            iou_range=(0.0, matches.ious.amax() if self.upper_iou is None else self.upper_iou),
            floor_iou=self.floor_iou,
            floor_fraction=self.floor_fraction,
        )


@POSITIVE_SAMPLERS.register(name="ohem")
@NEGATIVE_SAMPLERS.register(name="ohem")
@dataclass(frozen=True)
class OhemSampler:
    """Those with the largest classification losses (OHEM, CVPR 2016)."""

    needs_predictions: ClassVar[bool] = True

    def __call__(self, matches: Matches, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
        return sample_hard(matches.classification_losses, candidates, num_samples)


@NEGATIVE_SAMPLERS.register(name="score_hlr")
@dataclass(frozen=True, kw_only=True)
class ScoreHlrSampler:
    """The prime negatives, which then weigh by rank (PISA's ISR-N, section 4.2).

    Its arguments are those of :func:`libra_d2.sampling.sample_score_hlr_negatives`.

    Raises:
        ValueError: if one is out of its range.
    """

    needs_predictions: ClassVar[bool] = True

    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    k: float = 0.5
    bias: float = 0.0

    def __post_init__(self):
        check_importance(self.k, self.bias)
        for name in ("score_thresh", "nms_thresh"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @classmethod
    def from_config(cls, cfg: CfgNode, head: str) -> "ScoreHlrSampler":
        former = {k.lower(): v for k, v in cfg.MODEL.ROI_HEADS.SCORE_HLR.items() if v is not None}
        group, new = "MODEL.ROI_HEADS.SCORE_HLR", cfg.MODEL.PISA.ISR_NEGATIVE
        for name, value in former.items():
            if not isinstance(value, (int, float)):
                raise ValueError(f"{group}.{name.upper()} must be a number, got {value}")
            if new[name.upper()] not in (getattr(cls, name), value):
                raise ValueError(
                    f"{group}.{name.upper()} {value} is the former name of MODEL.PISA.ISR_NEGATIVE."
                    f"{name.upper()}, which is {new[name.upper()]}; give one of them"
                )
        with naming_keys(cfg, group):
            cls(**former)  # what is wrong there is refused by that name
        return from_keys(cls, cfg, "MODEL.PISA.ISR_NEGATIVE", **former)

    def __call__(self, matches: Matches, candidates: Tensor, num_samples: int | Tensor) -> Tensor:
        scores = matches.predictions.logits.float().softmax(dim=1)[:, :-1].amax(dim=1)
        kept, weights = sample_score_hlr_negatives(
            scores, matches.predictions.boxes, candidates, num_samples, **asdict(self)
        )
        # Weights are 0 where nothing is kept, so that only the kept count in the sums.
        losses = matches.classification_losses * kept
        matches.weights = torch.where(kept, preserve_loss(weights, losses), 1.0)
        return kept


def background_iou(thresholds: Sequence[float], labels: Sequence[int]) -> float:
    """The IoU below which a matcher of these thresholds and labels calls a candidate negative."""
    edges = [upper for upper, label in zip([*thresholds, 1.0], labels, strict=False) if label == 0]
    return min(max(edges, default=thresholds[0]), 1.0)


class SamplingMatcher:
    """Matches, samples, and labels what was not chosen -1 (ignored).

    The matcher is the only place in detectron2's ROI heads and RPN that sees IoUs. After it has
    labelled all but a sample as ignored, their own random subsampling has nothing left to drop.

    Args:
        matcher: detectron2's matcher.
        positive_sampler: chooses among the positives; None leaves them all to what comes after.
        negative_sampler: the same for negatives.
        batch_size_per_image: number of candidates to train on in an image.
        positive_fraction: largest share of positives among them, in [0, 1].
        negative_positive_ub: the largest number of negatives a positive, which an image without
            positives may have too; -1 for no bound.
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        positive_sampler: Sampler | None = None,
        negative_sampler: Sampler | None = None,
        batch_size_per_image: int,
        positive_fraction: float,
        negative_positive_ub: int = -1,
    ):
        self.matcher = matcher
        self.positive_sampler = positive_sampler
        self.negative_sampler = negative_sampler
        self.batch_size_per_image = batch_size_per_image
        self.max_positives = int(batch_size_per_image * positive_fraction)
        self.negative_positive_ub = negative_positive_ub
        self._batch: _Batch | None = None

    @property
    def needs_predictions(self) -> bool:
        """Whether a sampler looks at predictions, so that it has to be used inside :meth:`of`."""
        return needs_predictions(self.positive_sampler) or needs_predictions(self.negative_sampler)

    @contextlib.contextmanager
    def of(self, predictions: Sequence[Predictions]) -> Iterator[list[Tensor | None]]:
        """Inside, the n-th call matches the n-th image of a batch, of which these are predicted.

        Yields:
            A list that gets each image's weights, (P,) or None, once it has been matched.
        """
        self._batch = _Batch(predictions)
        try:
            yield self._batch.weights
        finally:
            self._batch = None

    @torch.no_grad()
    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Matches and samples one image's candidates.

        Args:
            match_quality_matrix: IoUs, shape (G, P).

        Returns:
            Each candidate's ground truth, (P,) int64, and label, (P,) int8: 1 and 0 for the chosen
            positives and negatives, -1 for the rest.

        Raises:
            ValueError: if a sampler looks at predictions and there are none for this image.
        """
        gt_indices, labels = self.matcher(match_quality_matrix)
        if match_quality_matrix.shape[0] > 0:
            ious = match_quality_matrix.amax(dim=0)
        else:
            ious = match_quality_matrix.new_zeros(match_quality_matrix.shape[1])
        matches = Matches(ious, gt_indices, labels)
        if self.needs_predictions:
            matches.predictions = self._next_predictions(tuple(match_quality_matrix.shape))
        if len(labels) > 0:
            labels = self._sample(matches)
        if self._batch is not None:
            self._batch.weights.append(matches.weights)
        return gt_indices, labels

    def _next_predictions(self, shape: tuple[int, int]) -> Predictions:
        batch = self._batch or _Batch(())
        if len(batch.weights) == len(batch.predictions):
            raise ValueError(
                f"{self.positive_sampler} and {self.negative_sampler} look at what the box head "
                "predicts for each image, and nothing is predicted for this one"
            )
        predictions = batch.predictions[len(batch.weights)]
        predicted = len(predictions.gt_classes), len(predictions.logits)
        if predicted != shape:
            raise ValueError(
                f"image {len(batch.weights)} of the batch has {shape[0]} ground truths and "
                f"{shape[1]} candidates, and predictions for {predicted[0]} and {predicted[1]}"
            )
        return predictions

    def _sample(self, matches: Matches) -> Tensor:
        labels = matches.labels
        positives, negatives = labels == 1, labels == 0
        if self.positive_sampler is not None:
            kept = self.positive_sampler(matches, positives, self.max_positives)
            labels = labels.masked_fill(positives & ~kept, -1)
        if self.negative_sampler is not None:
            num_positives = positives.sum().clamp(max=self.max_positives)
            num_negatives = self.batch_size_per_image - num_positives
            if self.negative_positive_ub >= 0:
                bound = self.negative_positive_ub * num_positives.clamp(min=1)
                num_negatives = torch.minimum(num_negatives, bound)
            kept = self.negative_sampler(matches, negatives, num_negatives)
            labels = labels.masked_fill(negatives & ~kept, -1)
        return labels


@dataclass
class _Batch:
    """The images that a matcher is called for in turn; those that have weights are done."""

    predictions: Sequence[Predictions]
    weights: list[Tensor | None] = field(default_factory=list)


def needs_predictions(sampler: Sampler | None) -> bool:
    """Whether a sampler looks at what the box head predicts."""
    return getattr(sampler, "needs_predictions", False)
