"""Mutual Guidance: each task's labels come from what the other task predicts.

Zhang et al., Localize to Classify and Classify to Localize: Mutual Guidance in Object Detection,
ACCV 2020, section 3.

Shape shorthand in this module:

    G: number of ground truths of an image, or of several whose anchors are told apart
    A: number of anchors
    P: number of pairs of them that overlap, a few percent of G times A
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "check_mutual_guidance",
    "classify_to_localize",
    "guide_mutually",
    "localize_to_classify",
]

_POSITIVE, _IGNORED, _NOT_OWN = 2, 1, -1  # the larger is the stronger claim to an anchor


def check_mutual_guidance(positive_iou: float, negative_iou: float, sigma: float = 2.0) -> None:
    """Raises ``ValueError`` unless the options of the matching functions make sense."""
    if not 0.0 < negative_iou <= positive_iou <= 1.0:
        raise ValueError(
            f"negative_iou must be above 0 and at most positive_iou, which is at most 1; got "
            f"{negative_iou} and {positive_iou}"
        )
    if not 1.0 < sigma < math.inf:
        raise ValueError(f"sigma must be greater than 1, got {sigma}")


@torch.no_grad()
def localize_to_classify(
    anchor_ious: Tensor,
    regressed_ious: Tensor,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
) -> tuple[Tensor, Tensor]:
    """Labels for classification: those anchors are positive whose predicted boxes fit best.

    As many as the anchors' own IoUs would make positive (and ignored) are positive (and ignored)
    for a ground truth, but ranked by the IoU of the predicted boxes.

    Args:
        anchor_ious: IoU of ground truths and anchors, (G, A) in [0, 1]; dense, or sparse (COO), as
            :func:`libra_d2.modeling.overlaps.find_overlaps` gives it for many objects.
        regressed_ious: IoU of ground truths and the boxes now predicted from the anchors, (G, A);
            dense or sparse.
        positive_iou: a ground truth has as many positives as anchors of at least this IoU.
        negative_iou: of those of at least this IoU the rest are ignored.

    Returns:
        The index of each anchor's ground truth, (A,) int64, meaningful where it is positive or
        ignored; its label, (A,) int8: 1 positive, 0 negative, -1 ignored. Every ground truth that
        overlaps an anchor has a positive, as long as there are anchors.

    Raises:
        ValueError: if the shapes differ or the thresholds are not ordered.
    """
    check_mutual_guidance(positive_iou, negative_iou)
    _check_shapes(anchor_ious, regressed_ious)
    anchor_pairs = _Pairs.of(anchor_ious)
    numbers = anchor_pairs.count_own(positive_iou, negative_iou)
    return _label(_Pairs.of(regressed_ious), anchor_pairs, *numbers)


@torch.no_grad()
def classify_to_localize(
    anchor_ious: Tensor,
    class_scores: Tensor,
    *,
    sigma: float = 2.0,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
) -> tuple[Tensor, Tensor]:
    r"""Labels for box regression: anchors that classify well are preferred.

    As many as the anchors' own IoUs would make positive are positive for a ground truth, but
    ranked by the amplified IoU :math:`iou^{(\sigma - score) / \sigma}`, which is the IoU itself for
    a score of 0.

    Args:
        anchor_ious: IoU of ground truths and anchors, (G, A) in [0, 1]; dense or sparse (COO).
        class_scores: scores now predicted at the anchors for the ground truths' classes, (G, A)
            in [0, 1]; dense, or sparse at the indices of sparse ``anchor_ious``.
        sigma: greater than 1; the larger, the less the scores matter.
        positive_iou: a ground truth has as many positives as anchors of at least this IoU.
        negative_iou: checked like that of :func:`localize_to_classify`, so that both take the same
            thresholds; no anchor is ignored here.

    Returns:
        The index of each anchor's ground truth, (A,) int64, meaningful where it is positive; its
        label, (A,) int8: 1 positive, 0 not. Every ground truth that overlaps an anchor has a
        positive, as long as there are anchors.

    Raises:
        ValueError: if the shapes differ, sigma is not greater than 1 or the thresholds are not
            ordered.
    """
    check_mutual_guidance(positive_iou, negative_iou, sigma)
    _check_shapes(anchor_ious, class_scores)
    anchor_pairs = _Pairs.of(anchor_ious)
    (num_positives,) = anchor_pairs.count_own(positive_iou)
    amplified = _amplify(anchor_pairs, anchor_ious, class_scores, sigma)
    return _label(amplified, anchor_pairs, num_positives, num_positives)


@torch.no_grad()
def guide_mutually(
    anchor_ious: Tensor,
    regressed_ious: Tensor,
    class_scores: Tensor,
    *,
    sigma: float = 2.0,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What :func:`localize_to_classify` and :func:`classify_to_localize` give, counting once.

    Args:
        anchor_ious: as both take it.
        regressed_ious: as the first takes it.
        class_scores: as the second takes it.
        sigma: the same.
        positive_iou: as both take it.
        negative_iou: the same.

    Returns:
        Indices and labels for classification, and those for box regression.

    Raises:
        ValueError: as they do.
    """
    check_mutual_guidance(positive_iou, negative_iou, sigma)
    _check_shapes(anchor_ious, regressed_ious)
    _check_shapes(anchor_ious, class_scores)
    anchor_pairs = _Pairs.of(anchor_ious)
    num_positives, num_not_negative = anchor_pairs.count_own(positive_iou, negative_iou)
    regressed_pairs = _Pairs.of(regressed_ious)
    amplified = _amplify(anchor_pairs, anchor_ious, class_scores, sigma)
    return (
        _label(regressed_pairs, anchor_pairs, num_positives, num_not_negative),
        _label(amplified, anchor_pairs, num_positives, num_positives),
    )


def _check_shapes(anchor_ious: Tensor, other: Tensor) -> None:
    if anchor_ious.dim() != 2 or anchor_ious.shape != other.shape:
        raise ValueError(
            "both matrices must have the same shape (ground truths, anchors), got "
            f"{tuple(anchor_ious.shape)} and {tuple(other.shape)}"
        )


def _have_equal_indices(one: Tensor, other: Tensor) -> bool:
    one, other = one.coalesce().indices(), other.coalesce().indices()
    # Those made of each other share them, and need not be looked at.
    return (one.data_ptr() == other.data_ptr() and one.shape == other.shape) or torch.equal(
        one, other
    )


def _amplify(
    anchor_pairs: "_Pairs", anchor_ious: Tensor, class_scores: Tensor, sigma: float
) -> "_Pairs":
    """The amplified IoUs of the pairs of anchor_ious."""
    if not class_scores.is_sparse:
        scores = class_scores[anchor_pairs.gts, anchor_pairs.anchors]
    elif anchor_ious.is_sparse and _have_equal_indices(class_scores, anchor_ious):
        scores = class_scores.coalesce().values()
    else:
        raise ValueError("sparse class_scores must have the indices of sparse anchor_ious")
    return replace(anchor_pairs, values=anchor_pairs.values ** ((sigma - scores) / sigma))


@dataclass(frozen=True)
class _Pairs:
    """The entries of a (G, A) matrix that are not 0, by rows; of a sparse one some may be."""

    gts: Tensor  # (P,) int64, ascending
    anchors: Tensor  # (P,) int64
    values: Tensor  # (P,)
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: Tensor) -> "_Pairs":
        matrix = (matrix if matrix.is_sparse else matrix.to_sparse()).coalesce()
        # Two boxes without area have the IoU 0 / 0, which is no overlap.
        values = matrix.values().nan_to_num(0.0)
        return cls(*matrix.indices(), values, tuple(matrix.shape))

    def __getitem__(self, chosen: Tensor) -> "_Pairs":
        """Those of a mask, which is searched once."""
        chosen = chosen.nonzero()[:, 0]
        # index_select takes a fraction of the time of brackets.
        columns = (self.gts, self.anchors, self.values)
        return _Pairs(*(column.index_select(0, chosen) for column in columns), self.shape)

    def own(self, at_least: float = 0.0) -> "_Pairs":
        """The pairs in which an anchor is with its best ground truth, and some others of value 0.

        Before that, the best anchor of each ground truth counts 1.

        Args:
            at_least: those below may be missing, but for the best of each ground truth.
        """
        # One look at all pairs leaves few: the largest of each ground truth and of each anchor.
        leads = self.values == self._highest(self.gts, self.shape[0])
        if at_least > 0:
            leads |= self.values >= at_least
        else:
            leads |= self.values == self._highest(self.anchors, self.shape[1])
        pairs = self[leads & (self.values > 0)]
        values = pad(pairs.values, (0, 1)).index_fill(0, pairs.best_of_gts(), 1.0)[:-1]
        pairs = replace(pairs, values=values)
        is_own = values == pairs._highest(pairs.anchors, self.shape[1])
        return replace(pairs, values=values.masked_fill(~is_own, 0.0))

    def best_of_gts(self) -> Tensor:
        """Position of each ground truth's largest value, the first of equal ones; P without any."""
        num_gts, num_pairs = self.shape[0], len(self.values)
        positions = torch.arange(num_pairs, device=self.gts.device)
        is_best = self.values == self._highest(self.gts, num_gts)
        positions = positions.masked_fill(~is_best, num_pairs)
        first = self.gts.new_full((num_gts,), num_pairs)
        return first.scatter_reduce(0, self.gts, positions, "amin")

    def _highest(self, groups: Tensor, number: int) -> Tensor:
        """The largest value of each pair's group, (P,)."""
        highest = self.values.new_zeros(number).scatter_reduce(0, groups, self.values, "amax")
        return highest.index_select(0, groups)

    def count_own(self, *minima: float) -> list[Tensor]:
        """Numbers of each ground truth's own values of at least each of these, (G,) int64."""
        own, zeros = self.own(min(minima)), self.gts.new_zeros(self.shape[0])
        return [zeros.scatter_add(0, own.gts, (own.values >= m).to(torch.int64)) for m in minima]

    def ranks(self) -> Tensor:
        """Rank of each pair's value among those of its ground truth, (P,) from 0, the largest."""
        order = self.values.argsort(descending=True, stable=True)
        order = order[self.gts[order].argsort(stable=True)]
        starts = torch.searchsorted(self.gts, torch.arange(self.shape[0], device=order.device))
        positions = torch.arange(len(order), device=order.device)
        return torch.empty_like(order).scatter(0, order, positions) - starts[self.gts]


def _label(
    quality: _Pairs, anchor_pairs: _Pairs, num_positives: Tensor, num_not_negative: Tensor
) -> tuple[Tensor, Tensor]:
    """Labels the first of each ground truth's ranking positive, those after them ignored.

    Anchors that are not a ground truth's own are never taken: were they, an object with few good
    predictions would claim anchors anywhere in the image.

    Args:
        quality: what to rank by.
        anchor_pairs: IoUs of the anchors.
        num_positives: (G,) int64.
        num_not_negative: number of positive and ignored anchors, (G,) int64.
    """
    own = quality.own()
    num_gts, num_anchors = own.shape
    ranks = own.ranks()
    states = (ranks < num_not_negative[own.gts]).to(torch.int8) * _IGNORED
    states = states.masked_fill(ranks < num_positives[own.gts], _POSITIVE)
    states = states.masked_fill(own.values == 0, _NOT_OWN)

    state = states.new_zeros(num_anchors).scatter_reduce(0, own.anchors, states, "amax")
    matched_gt = _first_gt(own.gts.masked_fill(states != state[own.anchors], num_gts), own)
    labels = (state == _POSITIVE).to(torch.int8) - (state == _IGNORED).to(torch.int8)
    matched_gt = matched_gt.masked_fill(matched_gt == num_gts, 0)
    return _serve_left_out(anchor_pairs, matched_gt, labels)


def _first_gt(gts: Tensor, pairs: _Pairs) -> Tensor:
    """The lowest number among the pairs of each anchor, (A,) int64; G where it has none."""
    num_gts, num_anchors = pairs.shape
    return gts.new_full((num_anchors,), num_gts).scatter_reduce(0, pairs.anchors, gts, "amin")


def _serve_left_out(pairs: _Pairs, matched_gt: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gives every ground truth without a positive the free anchor of its largest IoU.

    Left out are those that share their best anchor with another, and those that all predictions
    miss. They are few; if several want the same anchor, the first gets it and the others choose
    again.
    """
    num_gts = pairs.shape[0]
    while True:
        served = matched_gt.masked_fill(labels != 1, num_gts)
        left_out = labels.new_ones(num_gts + 1).index_fill(0, served, 0)
        is_free = (labels.index_select(0, pairs.anchors) != 1) & (pairs.values > 0)
        pairs = pairs[(left_out.index_select(0, pairs.gts) == 1) & is_free]
        if len(pairs.values) == 0:
            return matched_gt, labels
        positions = torch.arange(len(pairs.values), device=labels.device)
        is_wanted = positions == pairs.best_of_gts()[pairs.gts]
        winner = _first_gt(pairs.gts.masked_fill(~is_wanted, num_gts), pairs)
        matched_gt = torch.where(winner < num_gts, winner, matched_gt)
        labels = torch.where(winner < num_gts, 1, labels)
