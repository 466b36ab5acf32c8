"""What makes a training faster than plain detectron2: precision, memory, fused steps."""

import ctypes
import os
import platform
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from libra_d2.config import choose, set_key
from libra_d2.modeling.roi_align import ROI_ALIGNS, use_roi_align

__all__ = [
    "amp_dtype",
    "choose_speed",
    "cpu_capabilities",
    "fuse",
    "keep_memory",
    "prepare_model",
    "settle_speed",
]

# Of mallopt (malloc.h), with what they are set to: no block from the kernel alone, none given back,
# and 64 MiB asked for at a time.
_MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**26)}
_DETECTRON2S_WORKERS, _MOST_WORKERS = 4, 8
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def settle_speed(cfg: CfgNode) -> None:
    """Sets what :func:`choose_speed` gives, in place, and tells it."""
    chosen = choose_speed(cfg)
    for key, value in chosen.items():
        set_key(cfg, key, value)
    if chosen:
        print(f"SOLVER.FAST: {', '.join(f'{key} {value}' for key, value in chosen.items())}")


def choose_speed(cfg: CfgNode) -> dict[str, Any]:
    """The keys, and their values, that ``SOLVER.FAST`` comes to here; none without it.

    On a GPU: mixed precision, in bfloat16 where it has it, TF32, channels last, a fused optimizer;
    images are resized by torch, pinned, and loaded by as many workers as there are cores for it.
    On a CPU the same without TF32 and pinned memory; with mixed precision only where bfloat16 is
    faster; ROIAlign is sparse; and memory is kept, which a GPU's allocator does anyway. Few workers
    load for it, as its cores are at work.
    """
    if not cfg.SOLVER.FAST:
        return {}
    on_cpu = cfg.MODEL.DEVICE == "cpu" or not torch.cuda.is_available()
    chosen = {"SOLVER.FUSED": True, "INPUT.RESIZE": "torch", "MODEL.CHANNELS_LAST": True}
    if cfg.DATALOADER.NUM_WORKERS == _DETECTRON2S_WORKERS:  # nobody has chosen another number
        chosen["DATALOADER.NUM_WORKERS"] = _num_workers(on_cpu)
    if on_cpu:
        chosen["MODEL.ROI_ALIGN"] = "sparse"
    if on_cpu and _has_glibc():
        chosen["SOLVER.KEEP_MEMORY"] = True
    if on_cpu and cpu_gains_from_bfloat16():
        chosen |= {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"}
    if not on_cpu:
        dtype = "bfloat16" if _gpu_has_bfloat16() else "float16"
        chosen |= {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": dtype}
        chosen |= {"FLOAT32_PRECISION": "high", "DATALOADER.PIN_MEMORY": True}
    return chosen


def _num_workers(on_cpu: bool) -> int:
    """One for eight cores that compute; of a GPU's share of the cores all but one, if of use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = cores // 8 if on_cpu else cores // torch.cuda.device_count() - 1
    return min(max(wanted, 1), _MOST_WORKERS)


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)  # which would be slow


def cpu_capabilities() -> dict[str, Any]:
    """What torch tells of this CPU: its instructions, and ``cpu_name``; older ones tell nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def cpu_gains_from_bfloat16() -> bool:
    """Whether this CPU convolves faster in bfloat16, by its name and instructions.

    With AVX512-BF16 and without AMX an AMD EPYC takes half of float32's time, and an Intel Xeon
    more than all of it (docs/benchmarks.md). To measure it here would be at the mercy of what else
    is running, and differ between the processes of a run.
    """
    cpu = cpu_capabilities()
    is_intel = cpu.get("cpu_name", "").startswith("Intel")
    return cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and not is_intel)


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer's step one kernel, in place, if it is one of torch's that can."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group.update(fused=True, foreach=False)


def keep_memory() -> None:
    """Lets this process keep the memory it frees, which is then quick to get again.

    By default glibc returns large blocks at once, and the kernel clears every page of the next one:
    a fifth of a CPU's step goes into that. The process then stays as large as it once was.
    It is what ``MALLOC_MMAP_MAX_``, ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_TOP_PAD_`` do. Without
    glibc nothing happens.
    """
    if _has_glibc():
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC.values():
            mallopt(parameter, value)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


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
    if dtype == torch.bfloat16 and on_gpu and not _gpu_has_bfloat16():
        raise ValueError("SOLVER.AMP.DTYPE bfloat16 is not supported by this GPU; use float16")
    return dtype


def prepare_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Gives a model the memory format that a config asks for, and fast poolers, in place."""
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    use_roi_align(model, choose("MODEL.ROI_ALIGN", cfg, ROI_ALIGNS))
    return model
