"""What makes a training faster than plain detectron2: precision and memory format."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from torch import nn

from libra_d2.config import choose

__all__ = ["amp_dtype", "prepare_model"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """What a training computes in where torch deems it safe, by ``SOLVER.AMP``; else float32.

    Raises:
        ValueError: if ``MODEL.DEVICE`` can't.
    """
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    auto = torch.float16 if on_gpu else torch.bfloat16
    dtype = choose("SOLVER.AMP.DTYPE", cfg, {"auto": auto, **_DTYPES})
    if not cfg.SOLVER.AMP.ENABLED:
        return torch.float32
    if dtype == torch.float16 and not on_gpu:
        raise ValueError(
            f"SOLVER.AMP.DTYPE float16 needs a GPU; on MODEL.DEVICE {cfg.MODEL.DEVICE} use bfloat16"
        )
    if dtype == torch.bfloat16 and on_gpu and not torch.cuda.is_bf16_supported():
        raise ValueError("SOLVER.AMP.DTYPE bfloat16 is not supported by this GPU; use float16")
    return dtype


def prepare_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Gives a model the memory format and the poolers that a config asks for, in place."""
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if amp_dtype(cfg) == torch.bfloat16:
        poolers = [
            (owner, name, child)
            for owner in model.modules()
            for name, child in owner.named_children()
            if type(child) is ROIAlign
        ]
        for owner, name, pooler in poolers:
            setattr(owner, name, ExactROIAlign.like(pooler))
    return model


class ExactROIAlign(ROIAlign):
    """ROIAlign whose boxes are not rounded to the precision of the features.

    The parent gives boxes the features' dtype. bfloat16 has eight significant bits: a box at 1,000
    pixels would move by up to four.
    """

    @classmethod
    def like(cls, pooler: ROIAlign) -> "ExactROIAlign":
        """One of the same settings."""
        return cls(pooler.output_size, pooler.spatial_scale, pooler.sampling_ratio, pooler.aligned)

    def forward(self, features: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """Pools features (N, C, H, W) of any float dtype; boxes (R, 5), float32: (R, C, h, w)."""
        return super().forward(features.float(), rois.float()).to(features.dtype)
