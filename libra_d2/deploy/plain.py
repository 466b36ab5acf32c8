"""A trained model for inference alone: detectron2's own classes, and one pyramid."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from libra_d2.modeling import (
    BalancedPyramid,
    BalancedSampling,
    LibraFastRCNNOutputLayers,
    LibraRetinaNet,
    LibraRPN,
)
from libra_d2.modeling.look import LookPooler
from libra_d2.modeling.roi_align import ParallelROIAlign

__all__ = ["make_plain"]

# What they add serves training, or runs in Python alone.
_BEYOND = (
    BalancedSampling,
    LibraFastRCNNOutputLayers,
    LibraRetinaNet,
    LibraRPN,
    LookPooler,
    ParallelROIAlign,
)


def make_plain(model: nn.Module) -> nn.Module:
    """A copy of a detector that computes the same at inference and can be scripted.

    Its parts are of detectron2's classes, of which ours are subclasses with the same weights; a
    :class:`BalancedPyramid` becomes a :class:`ScriptablePyramid`.

    Args:
        model: in evaluation mode.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _BEYOND) and not getattr(module, "clip_before_nms", False):
            parents = (c for c in type(module).__mro__ if c.__module__.startswith("detectron2."))
            module.__class__ = next(parents)
    if isinstance(model.backbone, BalancedPyramid):
        model.backbone = ScriptablePyramid(model.backbone)
    return model.eval()


class ScriptablePyramid(nn.Module):
    """What a :class:`BalancedPyramid` computes, in words that TorchScript knows.

    Args:
        balanced: whose weights it shares.
    """

    def __init__(self, balanced: BalancedPyramid):
        super().__init__()
        self.pyramid = balanced.pyramid
        self.refine = balanced.bfp.refine
        self.refine_level = balanced.bfp.refine_level
        self.names = list(balanced.in_features)
        self.size_divisibility = balanced.size_divisibility
        self.padding_constraints = dict(balanced.padding_constraints)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Levels by name, as the pyramid gives them, from images (N, C, H, W)."""
        features = self.pyramid(x)
        base = features[self.names[self.refine_level]]
        height, width = base.shape[2], base.shape[3]
        integrated = torch.zeros_like(base)
        for i, name in enumerate(self.names):
            integrated = integrated + _resize(
                features[name], height, width, i < self.refine_level, i == self.refine_level
            )
        refined = self.refine(integrated / len(self.names))
        for i, name in enumerate(self.names):
            level = features[name]
            features[name] = level + _resize(
                refined,
                level.shape[2],
                level.shape[3],
                i > self.refine_level,
                i == self.refine_level,
            )
        return features


def _resize(x: Tensor, height: int, width: int, pools: bool, is_same: bool) -> Tensor:
    if is_same:
        return x
    if pools:
        return F.adaptive_max_pool2d(x, [height, width])
    return F.interpolate(x, size=[height, width], mode="nearest")
