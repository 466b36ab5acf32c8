"""Region proposal network with balanced samples and losses (Libra R-CNN, table 3).

Shape shorthand in this module:

    N: number of images
    R: number of anchors of an image, over all levels
"""

from collections.abc import Collection
from typing import ClassVar

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F

from libra_d2.config import get_key, settle
from libra_d2.sampling import sample_random

from .box_losses import BOX_LOSSES, DETECTRON2S, BoxLoss, detectron2s_box_loss
from .max_iou import match_anchors
from .proposals import find_top_candidates, find_top_proposals
from .samplers import (
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    Sampler,
)
from .sampling_matcher import SamplingMatcher, needs_predictions
from .switches import check_bound, naming_keys, refuse_replaced
from .targets import take_boxes

__all__ = ["LibraRPN"]

LOSS_NORMALIZERS = ("batch_size", "sampled")


@PROPOSAL_GENERATOR_REGISTRY.register()
class LibraRPN(RPN):
    """detectron2's RPN with balanced samples and losses, and a bound on its negatives.

    Switches: ``MODEL.RPN.NEGATIVE_POSITIVE_UB``, ``LOSS_NORMALIZER``, ``POSITIVE_SAMPLER``,
    ``NEGATIVE_SAMPLER`` and ``BBOX_REG_LOSS_TYPE``. With all of them at their defaults it computes
    what its parent does, bit for bit.
    """

    # The config keys it reads, and the values that ask for nothing that detectron2 has not.
    switches: ClassVar[dict[str, Collection]] = {
        "MODEL.RPN.NEGATIVE_POSITIVE_UB": (-1,),
        "MODEL.RPN.LOSS_NORMALIZER": ("auto", "batch_size"),
        "MODEL.RPN.POSITIVE_SAMPLER": ("random",),
        "MODEL.RPN.NEGATIVE_SAMPLER": ("random",),
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": DETECTRON2S,
    }

    @configurable
    def __init__(
        self,
        *,
        negative_positive_ub: int = -1,
        loss_normalizer: str = "batch_size",
        positive_sampler: Sampler | None = None,
        negative_sampler: Sampler | None = None,
        box_loss: BoxLoss | None = None,
        **kwargs,
    ):
        """
        Args:
            negative_positive_ub: the largest number of negatives a positive, which an image without
                positives may have too; -1 for no bound.
            loss_normalizer: what both losses are divided by: "batch_size", the parent's
                ``batch_size_per_image`` times the number of images, or "sampled", the number of
                anchors really sampled.
            positive_sampler: chooses the positives to train on; None for the parent's choice.
            negative_sampler: the same for negatives.
            box_loss: of each positive's deltas, anchor and ground truth; None for that of the
                parent's ``box_reg_loss_type`` and ``smooth_l1_beta``.
            kwargs: see :class:`RPN`.

        Raises:
            ValueError: if an argument is out of its range or they exclude each other.
        """
        if box_loss is not None:
            refuse_replaced(kwargs, ("box_reg_loss_type", "smooth_l1_beta"), "box_loss")
        super().__init__(**kwargs)
        check_bound(negative_positive_ub)
        if loss_normalizer not in LOSS_NORMALIZERS:
            raise ValueError(
                f"loss_normalizer must be one of {', '.join(LOSS_NORMALIZERS)}, "
                f"got '{loss_normalizer}'"
            )
        self.negative_positive_ub = negative_positive_ub
        self.loss_normalizer = loss_normalizer
        self.box_loss = box_loss or detectron2s_box_loss(
            self.box_reg_loss_type, self.smooth_l1_beta
        )
        if positive_sampler is None and negative_sampler is None:
            return
        for sampler in (positive_sampler, negative_sampler):
            if needs_predictions(sampler):
                raise ValueError(
                    f"{sampler} looks at a box head's predictions: it is for MODEL.ROI_HEADS, not "
                    "for MODEL.RPN"
                )
        if self.anchor_boundary_thresh >= 0:
            raise ValueError(
                "anchor_boundary_thresh (MODEL.RPN.BOUNDARY_THRESH) must be -1 with a sampler, "
                f"which counts all anchors; got {self.anchor_boundary_thresh}"
            )
        self.anchor_matcher = SamplingMatcher(
            self.anchor_matcher,
            positive_sampler=positive_sampler,
            negative_sampler=negative_sampler,
            batch_size_per_image=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            negative_positive_ub=negative_positive_ub,
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret = {k: v for k, v in ret.items() if k not in ("box_reg_loss_type", "smooth_l1_beta")}
        bound = cfg.MODEL.RPN.NEGATIVE_POSITIVE_UB
        with naming_keys(cfg, "MODEL.RPN"):
            check_bound(bound)
        # The published models, whose negatives are bounded, had the mean over the sampled.
        key = "MODEL.RPN.LOSS_NORMALIZER"
        normalizer = settle(key, cfg, paper="batch_size", mmdet="sampled")
        if bound != -1 and get_key(cfg, key) == "auto":
            normalizer = "sampled"
        return {
            **ret,
            "negative_positive_ub": bound,
            "loss_normalizer": normalizer,
            "positive_sampler": POSITIVE_SAMPLERS.make("MODEL.RPN.POSITIVE_SAMPLER", cfg),
            "negative_sampler": NEGATIVE_SAMPLERS.make("MODEL.RPN.NEGATIVE_SAMPLER", cfg),
            "box_loss": BOX_LOSSES.make("MODEL.RPN.BBOX_REG_LOSS_TYPE", cfg),
        }

    @torch.jit.unused
    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels and ground truths as the parent gives them, to the bit; see :func:`match_anchors`.

        Args:
            anchors: boxes of each level, in pixels.
            gt_instances: ground truths of each of N images.

        Returns:
            Labels, (R,) int8 in {-1, 0, 1}, and the ground truths that positives answer to, (R, 4),
            of each image.
        """
        sampler = self.anchor_matcher if type(self.anchor_matcher) is SamplingMatcher else None
        matcher = self.anchor_matcher if sampler is None else sampler.matcher
        if type(matcher) is not Matcher or self.anchor_boundary_thresh >= 0:
            return super().label_and_sample_anchors(anchors, gt_instances)
        all_anchors, all_gts = Boxes.cat(anchors), [gt.gt_boxes for gt in gt_instances]
        gt_labels, gt_boxes = [], []
        matched = match_anchors(matcher, all_gts, all_anchors)
        for gt, matches in zip(gt_instances, matched, strict=True):
            labels = matches.labels if sampler is None else sampler.sample(matches)
            gt_labels.append(self._subsample_labels(labels))
            gt_boxes.append(take_boxes(gt, matches.gt_indices))
        return gt_labels, gt_boxes

    def _subsample_labels(self, label: Tensor) -> Tensor:
        """Samples as the parent does, to the bit, then drops random negatives over the bound.

        It waits for a GPU once, where the parent does twice.

        Args:
            label: (R,) of -1, 0, 1 for ignored, negative and positive anchors; changed in place.
        """
        positives, negatives = label == 1, label == 0
        num_positives, num_negatives = torch.stack([positives.sum(), negatives.sum()]).tolist()
        num_drawn = min(num_positives, int(self.batch_size_per_image * self.positive_fraction))
        num_left = self.batch_size_per_image - num_drawn
        label.fill_(-1)
        label.scatter_(0, _draw(positives, num_positives, num_drawn), 1)
        label.scatter_(0, _draw(negatives, num_negatives, num_left), 0)
        if self.negative_positive_ub < 0:
            return label
        negatives = label == 0
        bound = self.negative_positive_ub * max(num_drawn, 1)
        label[negatives & ~sample_random(negatives, bound)] = -1
        return label

    @torch.jit.unused
    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Objectness and box loss, over the anchors that were sampled.

        Args:
            anchors: boxes of each level.
            pred_objectness_logits: (N, anchors of the level) of each level.
            gt_labels: (R,) of each image; 1 positive, 0 negative, -1 not trained on.
            pred_anchor_deltas: (N, anchors of the level, 4) of each level.
            gt_boxes: the ground truths that positives answer to, (R, 4) of each image.

        Returns:
            ``loss_rpn_cls`` and ``loss_rpn_loc``, scalars.
        """
        labels, gt_boxes = torch.stack(gt_labels), torch.stack(gt_boxes)
        positives = (labels == 1).nonzero(as_tuple=True)
        sampled = (labels >= 0).nonzero(as_tuple=True)
        num_positives, num_sampled = len(positives[0]), len(sampled[0])
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", num_positives / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", (num_sampled - num_positives) / len(labels))

        objectness = F.binary_cross_entropy_with_logits(
            cat(pred_objectness_logits, dim=1)[sampled],
            labels[sampled].to(torch.float32),
            reduction="sum",
        )
        box_losses = self.box_loss(
            self.box2box_transform,
            cat(pred_anchor_deltas, dim=1)[positives],
            Boxes.cat(anchors).tensor[positives[1]],
            gt_boxes[positives],
        )
        normalizer = self.batch_size_per_image * len(labels)
        if self.loss_normalizer == "sampled":
            normalizer = max(num_sampled, 1)
        losses = {
            "loss_rpn_cls": objectness / normalizer,
            "loss_rpn_loc": box_losses.sum() / normalizer,
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Proposals as the parent finds them, to the bit; see :func:`find_top_proposals`.

        Args:
            anchors: boxes of each level, in pixels.
            pred_objectness_logits: (N, anchors of the level) of each level.
            pred_anchor_deltas: (N, anchors of the level, 4) of each level.
            image_sizes: height and width of each of N images, in pixels.

        Returns:
            ``proposal_boxes`` and ``objectness_logits`` of each image, by descending logits.
        """
        decodes_otherwise = type(self)._decode_proposals is not RPN._decode_proposals
        if decodes_otherwise or torch.jit.is_tracing():
            return super().predict_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        candidates = find_top_candidates(
            anchors,
            pred_objectness_logits,
            pred_anchor_deltas,
            self.box2box_transform,
            self.pre_nms_topk[self.training],
        )
        return find_top_proposals(
            *candidates,
            image_sizes,
            nms_thresh=self.nms_thresh,
            number=self.post_nms_topk[self.training],
            min_box_size=self.min_box_size,
            training=self.training,
        )


def _draw(candidates: Tensor, number: int, num_samples: int) -> Tensor:
    """Indices of some candidates, at random.

    Args:
        candidates: bool mask, (R,).
        number: of the candidates.
        num_samples: how many to draw; all, if they are fewer.
    """
    drawn = torch.randperm(number, device=candidates.device)[:num_samples]
    # The k-th is where k have been counted: of a crowd no list is made.
    return torch.searchsorted(candidates.cumsum(0), drawn + 1)
