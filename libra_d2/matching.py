"""Mutual Guidance: each task's labels come from what the other task predicts.

Zhang et al., Localize to Classify and Classify to Localize: Mutual Guidance in Object Detection,
ACCV 2020, section 3.

Shape shorthand in this module:

    G: number of ground truths of an image
    A: number of anchors
"""

import math

import torch
from torch import Tensor

__all__ = ["check_mutual_guidance", "classify_to_localize", "localize_to_classify"]

# Beyond any quality, so that the largest entry of a column tells an anchor's state.
_POSITIVE, _IGNORED = 3.0, 2.0


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
        anchor_ious: IoU of ground truths and anchors, (G, A) in [0, 1].
        regressed_ious: IoU of ground truths and the boxes now predicted from the anchors, (G, A).
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
    return _label(
        _keep_best(regressed_ious),
        anchor_ious,
        num_positives=_count(anchor_ious, positive_iou),
        num_not_negative=_count(anchor_ious, negative_iou),
    )


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
        anchor_ious: IoU of ground truths and anchors, (G, A) in [0, 1].
        class_scores: scores now predicted at the anchors for the ground truths' classes, (G, A)
            in [0, 1].
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
    num_positives = _count(anchor_ious, positive_iou)
    return _label(
        _keep_best(_amplify(anchor_ious, class_scores, sigma)),
        anchor_ious,
        num_positives=num_positives,
        num_not_negative=num_positives,
    )


def _check_shapes(anchor_ious: Tensor, other: Tensor) -> None:
    if anchor_ious.dim() != 2 or anchor_ious.shape != other.shape:
        raise ValueError(
            "both matrices must have the same shape (ground truths, anchors), got "
            f"{tuple(anchor_ious.shape)} and {tuple(other.shape)}"
        )


def _amplify(anchor_ious: Tensor, class_scores: Tensor, sigma: float) -> Tensor:
    amplified = anchor_ious.clone()
    overlap = anchor_ious.nonzero(as_tuple=True)  # a few percent; 0 stays 0
    amplified[overlap] = anchor_ious[overlap] ** ((sigma - class_scores[overlap]) / sigma)
    return amplified


def _keep_best(quality: Tensor) -> Tensor:
    """A copy in which each ground truth's best anchor counts 1, and an anchor only for its best.

    What an anchor is not best for is 0 there. A ground truth that nothing overlaps has no best.
    """
    quality = quality.clone()
    if quality.numel() == 0:
        return quality
    best, anchors = quality.max(dim=1, keepdim=True)
    quality.scatter_(1, anchors, (best > 0).to(quality.dtype))
    return quality.masked_fill_(quality != quality.amax(dim=0), 0.0)


def _count(anchor_ious: Tensor, iou: float) -> Tensor:
    """Number of each ground truth's own anchors of at least this IoU, (G,) int64."""
    if anchor_ious.numel() == 0:
        return anchor_ious.new_zeros(len(anchor_ious), dtype=torch.int64)
    # Few anchors reach it, or are the best of a ground truth: the others need no look.
    within_reach = anchor_ious.amax(dim=0) >= iou
    within_reach[anchor_ious.max(dim=1).indices] = True
    return (_keep_best(anchor_ious[:, within_reach]) >= iou).sum(dim=1)


def _label(
    quality: Tensor, anchor_ious: Tensor, *, num_positives: Tensor, num_not_negative: Tensor
) -> tuple[Tensor, Tensor]:
    """Labels the first of each ground truth's ranking positive, those after them ignored.

    Args:
        quality: outcome of :func:`_keep_best`, (G, A); overwritten.
        anchor_ious: (G, A).
        num_positives: (G,) int64.
        num_not_negative: number of positive and ignored anchors, (G,) int64.
    """
    if quality.numel() == 0:
        labels = quality.new_zeros(quality.shape[1], dtype=torch.int8)
        return labels.long(), labels
    # Anchors that are not this ground truth's own, of quality 0, are never taken: were they, an
    # object with few good predictions would claim anchors anywhere in the image.
    values, anchors = quality.topk(int(num_not_negative.max()), dim=1)
    rank = torch.arange(values.shape[1], device=values.device)
    state = values.masked_fill(rank < num_not_negative[:, None], _IGNORED)
    state.masked_fill_(rank < num_positives[:, None], _POSITIVE)
    quality.scatter_(1, anchors, torch.where(values > 0, state, values))

    state, matched_gt = quality.max(dim=0)
    labels = (state == _POSITIVE).to(torch.int8) - (state == _IGNORED).to(torch.int8)
    return _serve_left_out(anchor_ious, matched_gt, labels)


def _serve_left_out(
    anchor_ious: Tensor, matched_gt: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives every ground truth without a positive the free anchor of its largest IoU.

    Left out are those that share their best anchor with another, and those that all predictions
    miss. They are few; if several want the same anchor, the first gets it and the others choose
    again.
    """
    num_gts, num_anchors = anchor_ious.shape
    while True:
        left_out = (
            labels.new_ones(num_gts).index_fill(0, matched_gt[labels == 1], 0).nonzero()[:, 0]
        )
        if len(left_out) == 0:
            return matched_gt, labels
        free = anchor_ious[left_out].masked_fill(labels == 1, 0.0)
        best, anchors = free.max(dim=1)
        anchors, left_out = anchors[best > 0], left_out[best > 0]
        if len(left_out) == 0:
            return matched_gt, labels
        winner = matched_gt.new_full((num_anchors,), num_gts)
        winner = winner.scatter_reduce(0, anchors, left_out, "amin")
        matched_gt = torch.where(winner < num_gts, winner, matched_gt)
        labels = torch.where(winner < num_gts, 1, labels)
