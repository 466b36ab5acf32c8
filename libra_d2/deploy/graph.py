"""A detector as one graph of tensors, in which no decision depends on a size or a value.

What detectron2 decides in Python (are all boxes finite? is a level empty?) a graph of torch.export
can't hold, so that what follows the networks is written here in operators alone. The networks, the
coding of boxes and the pooling on a level are the model's own.

Shape shorthand in this module:

    N: number of images
    A: number of anchors of a level
    R: number of proposals of an image
    M: number of objects found in an image
    K: number of classes
"""

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image, nms

__all__ = ["DetectorGraph"]


class DetectorGraph(nn.Module):
    """Computes what ``Exportable`` computes, in operators that torch.export takes.

    Args:
        model: detectron2's GeneralizedRCNN with standard or cascade heads, or RetinaNet, in
            evaluation mode.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`Exportable.forward`, for a fixed number of images."""
        model, (height, width) = self.model, images.shape[-2:]
        images = (images - model.pixel_mean) / model.pixel_std
        features = model.backbone(_pad(images, model.backbone))
        find = self._find_one_stage if isinstance(model, RetinaNet) else self._find_two_stage
        found = find(features, images.shape[0], (height, width))
        index = [torch.full_like(classes, i) for i, (_, _, classes, *_) in enumerate(found)]
        boxes, scores, classes, *masks = map(torch.cat, zip(*found, strict=True))
        return boxes, scores, classes, torch.cat(index), *masks

    def _find_one_stage(
        self, features: dict[str, Tensor], number: int, size: Sequence[int]
    ) -> list[tuple[Tensor, ...]]:
        model = self.model
        levels = [features[name] for name in model.head_in_features]
        anchors = _anchors(model.anchor_generator, levels)
        logits, deltas = model.head(levels)
        clips_first = getattr(model, "clip_before_nms", False)
        found = []
        for i in range(number):
            candidates = []
            for level, boxes in enumerate(anchors):
                scores = _by_anchor(logits[level][i], model.num_classes).sigmoid()
                above = scores > model.test_score_thresh
                index, scores = above.nonzero(), scores[above]
                scores, best = _top(scores, model.test_topk_candidates)
                anchor, classes = index[best].unbind(1)
                decoded = model.box2box_transform.apply_deltas(
                    _by_anchor(deltas[level][i], 4)[anchor], boxes[anchor]
                )
                candidates.append((decoded, scores, classes))
            boxes, scores, classes = map(torch.cat, zip(*candidates, strict=True))
            if clips_first:
                boxes = clip_boxes_to_image(boxes, size)
            keep = _suppress(boxes, scores, classes, model.test_nms_thresh)
            boxes, scores, classes = _first(
                keep, model.max_detections_per_image, boxes, scores, classes
            )
            found.append((clip_boxes_to_image(boxes, size), scores, classes))
        return found

    def _find_two_stage(
        self, features: dict[str, Tensor], number: int, size: Sequence[int]
    ) -> list[tuple[Tensor, ...]]:
        heads = self.model.roi_heads
        proposals = self._propose(features, number, size)
        found = []
        for i, boxes in enumerate(proposals):
            boxes, scores, predictor = self._classify(features, i, boxes, size)
            boxes, scores, classes = _detect(boxes, scores, size, predictor)
            masks = ()
            if heads.mask_on:
                masks = (self._find_masks(features, i, boxes, classes),)
            found.append((boxes, scores, classes, *masks))
        return found

    def _propose(
        self, features: dict[str, Tensor], number: int, size: Sequence[int]
    ) -> list[Tensor]:
        """Each image's proposals (R, 4), as find_top_rpn_proposals of detectron2 selects them."""
        rpn = self.model.proposal_generator
        levels = [features[name] for name in rpn.in_features]
        anchors = _anchors(rpn.anchor_generator, levels)
        logits, deltas = rpn.rpn_head(levels)
        proposals = []
        for i in range(number):
            candidates = []
            for level, boxes in enumerate(anchors):
                scores, best = _top(
                    _by_anchor(logits[level][i], 1).squeeze(1), rpn.pre_nms_topk[False]
                )
                decoded = rpn.box2box_transform.apply_deltas(
                    _by_anchor(deltas[level][i], 4)[best], boxes[best]
                )
                candidates.append((decoded, scores, torch.full_like(best, level)))
            boxes, scores, of_level = map(torch.cat, zip(*candidates, strict=True))
            is_valid = boxes.isfinite().all(1) & scores.isfinite()
            boxes = clip_boxes_to_image(boxes, size)
            is_valid &= (boxes[:, 2:] - boxes[:, :2] > rpn.min_box_size).all(1)
            boxes, scores, of_level = boxes[is_valid], scores[is_valid], of_level[is_valid]
            keep = _suppress(boxes, scores, of_level, rpn.nms_thresh)
            proposals.extend(_first(keep, rpn.post_nms_topk[False], boxes))
        return proposals

    def _classify(
        self, features: dict[str, Tensor], image: int, boxes: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, Tensor, nn.Module]:
        """Boxes (R, 4) or (R, K * 4), scores (R, K + 1), and the predictor of the last stage."""
        heads = self.model.roi_heads
        levels = [features[name][image : image + 1] for name in heads.box_in_features]
        if not isinstance(heads, CascadeROIHeads):
            predictor = heads.box_predictor
            logits, deltas = predictor(heads.box_head(_pool(heads.box_pooler, levels, boxes)))
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
            return boxes, _probabilities(logits, predictor), predictor
        scores = []
        for stage, predictor in enumerate(heads.box_predictor):
            if stage > 0:
                boxes = clip_boxes_to_image(boxes, size)
            pooled = _pool(heads.box_pooler, levels, boxes)
            logits, deltas = predictor(heads.box_head[stage](pooled))
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
            scores.append(_probabilities(logits, predictor))
        return boxes, sum(scores) * (1.0 / len(scores)), predictor

    def _find_masks(
        self, features: dict[str, Tensor], image: int, boxes: Tensor, classes: Tensor
    ) -> Tensor:
        """Probabilities of the classes' masks, (M, 1, S, S)."""
        heads = self.model.roi_heads
        levels = [features[name][image : image + 1] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(_pool(heads.mask_pooler, levels, boxes))
        if logits.shape[1] > 1:
            logits = logits[torch.arange(classes.shape[0], device=classes.device), classes][:, None]
        return logits.sigmoid()


def _pad(images: Tensor, backbone: nn.Module) -> Tensor:
    """With zeros on the right and below, to sizes that the backbone divides."""
    constraints = backbone.padding_constraints
    divisor = max(constraints.get("size_divisibility", backbone.size_divisibility), 1)
    height, width = images.shape[-2:]
    sizes = [constraints.get("square_size", 0) or n for n in (height, width)]
    padded_height, padded_width = (-(-n // divisor) * divisor for n in sizes)
    return F.pad(images, (0, padded_width - width, 0, padded_height - height))


def _anchors(generator: DefaultAnchorGenerator, levels: Sequence[Tensor]) -> list[Tensor]:
    """Each level's anchors (A, 4), whose number is a product of sizes."""
    anchors = []
    for level, stride, cell in zip(levels, generator.strides, generator.cell_anchors, strict=True):
        y, x = (
            (torch.arange(n, device=cell.device) + generator.offset) * stride
            for n in level.shape[-2:]
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack([x, y, x, y], dim=2).flatten(0, 1)
        anchors.append((centers[:, None] + cell).flatten(0, 1))
    return anchors


def _by_anchor(x: Tensor, channels: int) -> Tensor:
    """(anchors * channels, H, W) of a level to (A, channels)."""
    return x.unflatten(0, (-1, channels)).permute(2, 3, 0, 1).flatten(0, 2)


def _top(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The highest scores, at most so many, and where they are."""
    return scores.topk(torch.sym_min(scores.shape[0], most))


def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Which boxes non-maximum suppression in each group keeps, highest scores first."""
    # Two boxes of no group, which come last: torchvision promises a graph that two are kept.
    boxes = torch.cat([boxes, boxes.new_tensor([[0, 0, 1, 1]] * 2)]).double()
    scores = torch.cat([scores.double(), boxes.new_full((2,), -torch.inf)])
    groups = torch.cat([groups, groups.new_tensor([-1, -2])])
    # Groups so far apart that they do not overlap; in float64, where that changes no IoU.
    extent = boxes.amax() - boxes.amin() + 1
    return nms(boxes + (groups * extent)[:, None], scores, threshold)[:-2]


def _probabilities(logits: Tensor, predictor: nn.Module) -> Tensor:
    return logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(1)


def _first(keep: Tensor, most: int, *fields: Tensor) -> tuple[Tensor, ...]:
    keep = keep if most < 0 else keep[:most]  # detectron2's -1 is for all
    return tuple(field[keep] for field in fields)


def _pool(pooler: ROIPooler, levels: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """What the pooler takes from one image's levels inside of boxes (R, 4)."""
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    if len(levels) == 1:
        return pooler.level_poolers[0](levels[0], rois)
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    level = pooler.canonical_level + torch.log2(sides / pooler.canonical_box_size + 1e-8)
    level = level.floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    pooled = levels[0].new_zeros(boxes.shape[0], levels[0].shape[1], *pooler.output_size)
    for i, pool in enumerate(pooler.level_poolers):
        (here,) = (level == i).nonzero(as_tuple=True)
        pooled = pooled.index_put((here,), pool(levels[i], rois[here]))
    return pooled


def _detect(
    boxes: Tensor, scores: Tensor, size: Sequence[int], predictor: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (M, 4), scores and classes, as fast_rcnn_inference of detectron2 selects them."""
    is_valid = boxes.isfinite().all(1) & scores.isfinite().all(1)
    scores = scores[:, :-1]
    boxes = clip_boxes_to_image(boxes.unflatten(1, (-1, 4)), size)  # (R, K or 1, 4)
    above = (scores > predictor.test_score_thresh) & is_valid[:, None]
    boxes = boxes.expand(-1, scores.shape[1], -1)[above]
    scores, classes = scores[above], above.nonzero()[:, 1]
    keep = _suppress(boxes, scores, classes, predictor.test_nms_thresh)
    return _first(keep, predictor.test_topk_per_image, boxes, scores, classes)
