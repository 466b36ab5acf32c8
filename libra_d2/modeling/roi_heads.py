"""ROI heads with the samplers and losses of the Libra R-CNN family."""

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Instances

from libra_d2.config import background_threshold

from .fast_rcnn import LibraFastRCNNOutputLayers
from .samplers import SamplingMatcher
from .sampling_log import log_sampled

__all__ = ["LibraROIHeads"]


@ROI_HEADS_REGISTRY.register()
class LibraROIHeads(StandardROIHeads):
    """detectron2's standard ROI heads with balanced sampling and balanced L1 loss.

    Switches: ``MODEL.ROI_HEADS.POSITIVE_SAMPLER``, ``MODEL.ROI_HEADS.NEGATIVE_SAMPLER`` and
    ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE``. With all of them at their defaults it computes what
    its parent does, bit for bit.
    """

    @configurable
    def __init__(self, *, num_iou_bins: int = 3, background_iou: float = 0.5, **kwargs):
        """
        Args:
            num_iou_bins: number of bins in which the sampled negatives' IoU is logged.
            background_iou: upper edge of the last of them, in (0, 1].
            kwargs: see :class:`StandardROIHeads`.
        """
        super().__init__(**kwargs)
        self.num_iou_bins = num_iou_bins
        self.background_iou = background_iou

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["proposal_matcher"] = SamplingMatcher.from_config(cfg, ret["proposal_matcher"])
        ret["num_iou_bins"] = cfg.MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS
        ret["background_iou"] = background_threshold(cfg)
        return ret

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        weights = ret["box_predictor"].state_dict()
        # The parent has drawn weights already: take them over and draw no other random numbers,
        # so that the same seed gives the same model.
        with torch.random.fork_rng(devices=[]):
            ret["box_predictor"] = LibraFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        ret["box_predictor"].load_state_dict(weights)
        return ret

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Samples as the parent does and logs what was sampled.

        Where an image has ground truths, its proposals have one more field: ``gt_indices``, the
        index in the image of the ground truth each answers to.
        """
        sampled = super().label_and_sample_proposals(proposals, [_number(t) for t in targets])
        log_sampled(
            sampled,
            num_gts=[len(t) for t in targets],
            background_label=self.num_classes,
            num_bins=self.num_iou_bins,
            max_iou=self.background_iou,
        )
        return sampled


def _number(targets: Instances) -> Instances:
    """A copy of one image's targets that also has the field ``gt_indices``."""
    indices = torch.arange(len(targets), device=targets.gt_boxes.device)
    return Instances(targets.image_size, **targets.get_fields(), gt_indices=indices)
