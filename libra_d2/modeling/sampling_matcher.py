"""Samplers at the matcher's seam: a matcher that labels what was not chosen as ignored.

Shape shorthand in this module:

    G: number of ground truths in an image
    P: number of candidates of an image: proposals, appended ground truths included, or anchors
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

from .samplers import Matches, Predictions, Sampler

__all__ = ["SamplingMatcher", "needs_predictions"]


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
            ValueError: if a sampler looks at predictions and there are none for this image; or
                weighs candidates outside of :meth:`of`.
        """
        gt_indices, labels = self.matcher(match_quality_matrix)
        if match_quality_matrix.shape[0] > 0:
            ious = match_quality_matrix.amax(dim=0)
        else:
            ious = match_quality_matrix.new_zeros(match_quality_matrix.shape[1])
        matches = Matches(ious, gt_indices, labels)
        if self.needs_predictions:
            matches.predictions = self._next_predictions(tuple(match_quality_matrix.shape))
        return gt_indices, self.sample(matches)

    def sample(self, matches: Matches) -> Tensor:
        """Samples one image's candidates, once they are matched.

        Args:
            matches: what :meth:`__call__` makes of a matrix, with predictions if a sampler needs
                them; weights are set by samplers that have them.

        Returns:
            Their labels, (P,) int8: 1 and 0 for the chosen positives and negatives, -1 for others.

        Raises:
            ValueError: if a sampler weighs candidates outside of :meth:`of`.
        """
        labels = self._sample(matches) if len(matches.labels) > 0 else matches.labels
        if self._batch is not None:
            self._batch.weights.append(matches.weights)
        elif matches.weights is not None:
            raise ValueError(
                f"{self.positive_sampler} and {self.negative_sampler} weigh candidates, which is "
                "for ROI heads: nothing here reads the weights"
            )
        return labels

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
            # Of those that the positive sampler has left.
            num_positives = (labels == 1).sum().clamp(max=self.max_positives)
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


def needs_predictions(sampler: Sampler | Matcher | SamplingMatcher | None) -> bool:
    """Whether a sampler, or a matcher by one of its own, looks at what the box head predicts."""
    return getattr(sampler, "needs_predictions", False)
