"""Training and inference on a GPU: time, memory and host synchronisations, by precision."""

import itertools
import warnings
from collections.abc import Callable

import torch

from libra_d2.modeling.half import tf32

from .measuring import DEVICE, make_inputs, measure, show
from .models import ONE_STAGE, TWO_STAGE, make_inference, make_iteration

_MIXED = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE")
# Overrides of the config, and whether float32 products may be in TF32.
PRECISIONS: dict[str, tuple[tuple[str, ...], bool]] = {
    "float32": ((), False),
    "TF32": ((), True),
    "float16": ((*_MIXED, "float16"), True),
    "bfloat16": ((*_MIXED, "bfloat16"), True),
}


def benchmark_gpu(repeats: int) -> None:
    """Everything."""
    _refuse_cpu("gpu")
    for family, depth, batch in itertools.product((TWO_STAGE, ONE_STAGE), (50, 101), (2, 8)):
        for precision in PRECISIONS:
            try:
                show_cell(family, depth, batch, precision, repeats)
            except torch.OutOfMemoryError:
                print(f"\nR{depth}, {batch} images, {precision}: more memory than there is")
            torch.cuda.empty_cache()


def benchmark_gpu_short(repeats: int) -> None:
    """R50, two images, in TF32 and in bfloat16."""
    _refuse_cpu("gpu-short")
    for family, precision in itertools.product((TWO_STAGE, ONE_STAGE), ("TF32", "bfloat16")):
        show_cell(family, 50, 2, precision, repeats)


def show_cell(
    family: dict[str, tuple],
    depth: int,
    num_images: int,
    precision: str,
    repeats: int,
    size: tuple[int, int] = (800, 1216),
) -> None:
    """Measures models side by side, and shows them; ratios are to the first.

    Args:
        family: models, each a config and overrides.
        depth: of the ResNet.
        num_images: in a batch.
        precision: of ``PRECISIONS``.
        repeats: the median is over so many.
        size: of an image, height and width.
    """
    opts, has_tf32 = PRECISIONS[precision]
    opts = (*opts, "MODEL.RESNETS.DEPTH", str(depth))
    inputs = make_inputs(size, num_images)
    images = [{"image": x["image"], "height": size[0], "width": size[1]} for x in inputs]
    training, inference = {}, {}
    for name, (config, *own) in family.items():
        of_model = config, sum(own, ()) + opts
        training[name] = make_iteration(*of_model, inputs=inputs)
        inference[name] = make_inference(*of_model, inputs=images)
    with tf32(has_tf32):
        seconds = [measure(training, repeats, warmup=3), measure(inference, repeats, warmup=3)]
        memory = {name: more_memory(iteration) for name, iteration in training.items()}
        syncs = {name: count_syncs(iteration) for name, iteration in training.items()}
    plain = next(iter(family))
    rows = [
        (
            name,
            *(value for s in seconds for value in (1000 * s[name], s[name] / s[plain])),
            memory[name],
            syncs[name],
        )
        for name in family
    ]
    headers = (
        "model",
        "training, ms",
        "of plain",
        "inference, ms",
        "of it",
        "GiB",
        "synchronisations",
    )
    title = f"R{depth}, {num_images} x {size[0]}x{size[1]}, {precision} ({DEVICE})"
    show(title, rows, headers)


def count_syncs(function: Callable) -> int:
    """How often the host waits for the GPU; 0 on a CPU."""
    if DEVICE != "cuda":
        function()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


def more_memory(function: Callable) -> float:
    """The most that a function holds on the GPU beyond what is there before, in GiB; else 0."""
    if DEVICE != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _refuse_cpu(what: str) -> None:
    if DEVICE != "cuda":
        raise ValueError(f"{what} needs a GPU that torch finds")
