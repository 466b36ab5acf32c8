"""Region proposal network with a bound on its negatives."""

from detectron2.config import configurable
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from torch import Tensor

from libra_d2.sampling import sample_random

__all__ = ["LibraRPN"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class LibraRPN(RPN):
    """detectron2's RPN that trains on at most so many negatives a positive.

    Switch: ``MODEL.RPN.NEGATIVE_POSITIVE_UB``; -1, the default, is detectron2's behaviour.
    """

    @configurable
    def __init__(self, *, negative_positive_ub: int = -1, **kwargs):
        """
        Args:
            negative_positive_ub: the largest number of negatives a positive, which an image without
                positives may have too; -1 for no bound.
            kwargs: see :class:`RPN`.
        """
        super().__init__(**kwargs)
        self.negative_positive_ub = negative_positive_ub

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["negative_positive_ub"] = cfg.MODEL.RPN.NEGATIVE_POSITIVE_UB
        return ret

    def _subsample_labels(self, label: Tensor) -> Tensor:
        """Samples as the parent does, then drops random negatives over the bound.

        Args:
            label: (R,) of -1, 0, 1 for ignored, negative and positive anchors; changed in place.
        """
        label = super()._subsample_labels(label)
        if self.negative_positive_ub < 0:
            return label
        negatives = label == 0
        bound = self.negative_positive_ub * (label == 1).sum().clamp(min=1)
        label[negatives & ~sample_random(negatives, bound)] = -1
        return label
