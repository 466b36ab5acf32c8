"""An RPN's proposals, chosen for a batch as a whole as far as NMS.

Shape shorthand in this module:

    N: number of images
    L: number of levels
    K: number of candidates of an image: the highest-scoring anchors of each level
"""

import torch
from detectron2.layers import batched_nms, cat
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["find_top_candidates", "find_top_proposals"]


def find_top_candidates(
    anchors: list[Boxes],
    logits: list[Tensor],
    deltas: list[Tensor],
    transform: Box2BoxTransform,
    number: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The anchors of each level that score highest, as boxes: no others are decoded.

    Args:
        anchors: boxes of each of L levels, in pixels.
        logits: (N, anchors of the level) of each level.
        deltas: (N, anchors of the level, 4) of each level.
        transform: makes boxes of anchors and deltas.
        number: how many to take of a level, at most.

    Returns:
        Boxes, (N, K, 4) float32 in pixels; their logits, (N, K), those of a level descending; their
        levels, (K,) int64.
    """
    boxes, top_logits, levels = [], [], []
    for level, (own_anchors, own_logits, own_deltas) in enumerate(
        zip(anchors, logits, deltas, strict=True)
    ):
        values, index = own_logits.topk(min(number, own_logits.shape[1]), dim=1)
        chosen = own_deltas.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
        decoded = transform.apply_deltas(
            chosen.flatten(end_dim=1), own_anchors.tensor[index.flatten()]
        )
        boxes.append(decoded.view(chosen.shape))
        top_logits.append(values)
        levels.append(index.new_full(index.shape[1:], level))
    return cat(boxes, dim=1), cat(top_logits, dim=1), cat(levels)


def find_top_proposals(
    boxes: Tensor,
    logits: Tensor,
    levels: Tensor,
    image_sizes: list[tuple[int, int]],
    *,
    nms_thresh: float,
    number: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Proposals of each image: its candidates, clipped to the image, after NMS of each level.

    The host waits for a GPU three times, and for the NMS of each image.

    Args:
        boxes: (N, K, 4) float32 in pixels.
        logits: (N, K).
        levels: (K,) int64.
        image_sizes: height and width of each image, in pixels.
        nms_thresh: IoU, in [0, 1].
        number: how many to return of an image, at most.
        min_box_size: sides must be longer, in pixels.
        training: whether candidates that are not finite are an error, or are left out.

    Returns:
        ``proposal_boxes`` and ``objectness_logits``, by descending logits.

    Raises:
        FloatingPointError: if a box or logit is not finite, in training.
    """
    is_finite = boxes.isfinite().all(dim=2) & logits.isfinite()
    sizes = torch.tensor(image_sizes, dtype=boxes.dtype).flip(1).repeat(1, 2)
    boxes = torch.minimum(boxes.clamp(min=0), sizes.to(boxes.device).unsqueeze(1))
    is_kept = (boxes[..., 2:] - boxes[..., :2] > min_box_size).all(dim=2) & is_finite
    *numbers, all_finite = torch.cat([is_kept.sum(dim=1), is_finite.all()[None]]).tolist()
    if training and not all_finite:
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN: the RPN has diverged.")
    images, places = is_kept.nonzero(as_tuple=True)
    candidates = boxes[images, places], logits[images, places], levels[places]
    per_image = (x.split(numbers) for x in candidates)
    proposals = []
    for size, *of_image in zip(image_sizes, *per_image, strict=True):
        own_boxes, own_logits, _ = of_image
        kept = batched_nms(*of_image, nms_thresh)[:number]
        fields = {"proposal_boxes": Boxes(own_boxes[kept]), "objectness_logits": own_logits[kept]}
        proposals.append(Instances(size, **fields))
    return proposals
