"""Which candidates are trained on: samplers as functions from a mask to a mask.

Every sampler takes ``candidates``, a bool mask, and returns ``kept``, a bool mask of the same shape
that is True only where ``candidates`` is and at most ``num_samples`` times along the last axis;
``sample_score_hlr_negatives`` returns weights beside it. But for those that need NMS no sampler
moves data to the host, so leading dimensions batch and ``num_samples`` may be a tensor.

Shape shorthand in this package:

    ...: leading (batch) dimensions, often none
    N: number of candidates' slots (proposals, anchors) of an image
    K: number of IoU bins
"""

from .balanced import sample_instance_balanced_positives, sample_iou_balanced_negatives
from .hard import sample_hard, sample_hard_nms, sample_score_hlr_negatives
from .masks import sample_random

__all__ = [
    "sample_hard",
    "sample_hard_nms",
    "sample_instance_balanced_positives",
    "sample_iou_balanced_negatives",
    "sample_random",
    "sample_score_hlr_negatives",
]
