"""What makes a training faster than plain detectron2: precision and memory format."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from torch import nn

from libra_d2.config import choose, set_key

__all__ = ["amp_dtype", "fuse", "prepare_model", "settle_speed"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def settle_speed(cfg: CfgNode) -> None:
    """With ``SOLVER.FAST`` sets what makes a training faster here, in place, and tells it.

    On a GPU: mixed precision, in bfloat16 where it has it, TF32, channels last, a fused optimizer.
    On a CPU the same without TF32 where it has instructions for bfloat16, which is slow elsewhere.
    """
    if not cfg.SOLVER.FAST:
        return
    on_cpu = cfg.MODEL.DEVICE == "cpu" or not torch.cuda.is_available()
    chosen = {"SOLVER.FUSED": True}
    if on_cpu and cpu_has_bfloat16():
        chosen |= {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"}
    if not on_cpu:
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        chosen |= {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": dtype}
        chosen["FLOAT32_PRECISION"] = "high"
    if "SOLVER.AMP.ENABLED" in chosen:
        chosen["MODEL.CHANNELS_LAST"] = True
    for key, value in chosen.items():
        set_key(cfg, key, value)
    print(f"SOLVER.FAST: {', '.join(f'{key} {value}' for key, value in chosen.items())}")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16, and not by way of float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer's step one kernel, in place, if it is one of torch's that can."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group.update(fused=True, foreach=False)


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
