"""Samplers at the matcher's seam: a matcher that labels what was not chosen as ignored.

Shape shorthand in this module:

    G: number of ground truths in an image
    P: number of proposals of an image, appended ground truths included
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling.matcher import Matcher
from torch import Tensor

from libra_d2.config import background_threshold, choose
from libra_d2.sampling import sample_instance_balanced_positives, sample_iou_balanced_negatives

__all__ = ["NEGATIVE_SAMPLERS", "POSITIVE_SAMPLERS", "Matches", "SamplingMatcher"]


@dataclass
class Matches:
    """What a sampler may look at: the outcome of matching one image's proposals."""

    ious: Tensor  # (P,), each proposal's largest IoU with any ground truth; 0 without ground truths
    gt_indices: Tensor  # (P,) int64, the ground truth of that IoU
    labels: Tensor  # (P,) int8; 1 positive, 0 negative, -1 ignored


# (matches, candidates (P,) bool, num_samples) -> kept (P,) bool
Sampler = Callable[[Matches, Tensor, int | Tensor], Tensor]


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


# A sampler a line: its name in the config and how it is made from the config. None leaves the
# choice to detectron2's own random subsampling.
POSITIVE_SAMPLERS: dict[str, Callable[[CfgNode], Sampler] | None] = {
    "random": None,
    "instance_balanced": _instance_balanced,
}
NEGATIVE_SAMPLERS: dict[str, Callable[[CfgNode], Sampler] | None] = {
    "random": None,
    "iou_balanced": _iou_balanced,
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
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        positive_sampler: Sampler | None,
        negative_sampler: Sampler | None,
        batch_size_per_image: int,
        positive_fraction: float,
    ):
        self.matcher = matcher
        self.positive_sampler = positive_sampler
        self.negative_sampler = negative_sampler
        self.batch_size_per_image = batch_size_per_image
        self.max_positives = int(batch_size_per_image * positive_fraction)

    @classmethod
    def from_config(cls, cfg: CfgNode, matcher: Matcher) -> "Matcher | SamplingMatcher":
        """The matcher the config asks for: ``matcher`` itself if both samplers are random."""
        options = cfg.MODEL.ROI_HEADS
        make_positive = choose("MODEL.ROI_HEADS.POSITIVE_SAMPLER", cfg, POSITIVE_SAMPLERS)
        make_negative = choose("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", cfg, NEGATIVE_SAMPLERS)
        if make_positive is None and make_negative is None:
            return matcher
        return cls(
            matcher,
            positive_sampler=make_positive and make_positive(cfg),
            negative_sampler=make_negative and make_negative(cfg),
            batch_size_per_image=options.BATCH_SIZE_PER_IMAGE,
            positive_fraction=options.POSITIVE_FRACTION,
        )

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
        if len(labels) == 0:
            return gt_indices, labels
        if match_quality_matrix.shape[0] > 0:
            ious = match_quality_matrix.amax(dim=0)
        else:
            ious = match_quality_matrix.new_zeros(match_quality_matrix.shape[1])
        matches = Matches(ious, gt_indices, labels)

        positives = labels == 1
        if self.positive_sampler is not None:
            kept = self.positive_sampler(matches, positives, self.max_positives)
            labels = labels.masked_fill(positives & ~kept, -1)
        if self.negative_sampler is not None:
            negatives = labels == 0
            num_negatives = self.batch_size_per_image - positives.sum().clamp(
                max=self.max_positives
            )
            kept = self.negative_sampler(matches, negatives, num_negatives)
            labels = labels.masked_fill(negatives & ~kept, -1)
        return gt_indices, labels
