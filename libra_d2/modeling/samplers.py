"""Samplers: which of an image's candidates are trained on.

Shape shorthand in this module:

    G: number of ground truths in an image
    K: number of foreground classes
    P: number of candidates of an image: proposals, appended ground truths included, or anchors
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol

import torch
from detectron2.config import CfgNode
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
    # (P,), of each in the classification loss of LibraFastRCNNOutputLayers, if a sampler sets it.
    weights: Tensor | None = None

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
        others = 1.0 if matches.weights is None else matches.weights
        matches.weights = torch.where(kept, preserve_loss(weights, losses), others)
        return kept


def background_iou(thresholds: Sequence[float], labels: Sequence[int]) -> float:
    """The IoU below which a matcher of these thresholds and labels calls a candidate negative."""
    edges = [upper for upper, label in zip([*thresholds, 1.0], labels, strict=False) if label == 0]
    return min(max(edges, default=thresholds[0]), 1.0)
