"""What limits each figure: arithmetic, memory, or the number of calls.

Each operation that torch carries out would take, on a machine that reached its own measured
ceilings, the longest of three: its arithmetic by the rate of a large matrix product, its bytes by
that of a large copy, and an empty call. Their sum is a bound; what of it is which tells what
limits, and what was measured by the bound how far it is from it. Caches can beat the second.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from libra_d2.modeling.half import tf32

from .measuring import DEVICE, make_inputs, measure, show
from .models import ONE_STAGE, TWO_STAGE, make_iteration, make_step
from .parts import make_bfp_step, make_box_loss_step, make_matchings
from .samplers import make_matches, sample_both

_KINDS = ("arithmetic", "memory", "calls")
_DTYPES = torch.float32, torch.bfloat16


def _attention(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch counts what GPUs compute attention with.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Ceilings:
    """The rates that this machine reaches: operations and bytes a second, seconds a call."""

    def __init__(self, repeats: int):
        size, num_bytes = (8192, 2**30) if DEVICE == "cuda" else (2048, 2**28)
        block = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
        one, into = torch.zeros(1, device=DEVICE), torch.empty_like(block)
        tasks = {"copy": lambda: into.copy_(block), "call": lambda: one.add_(1)}
        for dtype in _DTYPES:
            matrix = torch.rand(size, size, device=DEVICE).to(dtype)
            tasks[dtype] = partial(torch.mm, matrix, matrix)
        seconds = measure(tasks, repeats)
        seconds |= measure({"call": tasks["call"]}, repeats, calls=1000)
        self.flops = {dtype: 2 * size**3 / seconds[dtype] for dtype in _DTYPES}
        self.bytes = 2 * num_bytes / seconds["copy"]
        self.call = seconds["call"]


class Bound(TorchDispatchMode):
    """Adds up what operations would take at a machine's ceilings, in seconds by what limits."""

    def __init__(self, ceilings: Ceilings):
        super().__init__()
        self.ceilings, self.seconds = ceilings, Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        outcome = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(outcome) if isinstance(x, Tensor)]
        if not func.is_view:
            kind, seconds = self._limit(func, args, kwargs or {}, outcome, tensors + results)
            self.seconds[kind] += seconds
        return outcome

    def _limit(
        self, func: Any, args: tuple, kwargs: dict, outcome: Any, tensors: list[Tensor]
    ) -> tuple[str, float]:
        ceilings, flops = self.ceilings, 0
        if func._overloadpacket in _FLOPS:
            flops = _FLOPS[func._overloadpacket](*args, **kwargs, out_val=outcome)
        dtypes = {x.dtype for x in tensors}
        rate = ceilings.flops[torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32]
        num_bytes = sum(x.numel() * x.element_size() for x in tensors)
        limits = flops / rate, num_bytes / ceilings.bytes, ceilings.call
        return max(zip(_KINDS, limits, strict=True), key=lambda limit: limit[1])


def bound(function: Callable, ceilings: Ceilings) -> Counter:
    """The seconds a function would take at a machine's ceilings, by what limits them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is shared among threads of ROIAlign is not seen here
    try:
        with Bound(ceilings) as adding:
            function()
    finally:
        torch.set_num_threads(threads)
    return adding.seconds


@tf32(False)  # so that float32 is that of the ceiling
def benchmark_limits(repeats: int) -> None:
    ceilings = Ceilings(repeats)
    rates = [(f"{str(k)[6:]}, 10^9 operations/s", v / 1e9) for k, v in ceilings.flops.items()]
    rates += [("memory, GB/s", ceilings.bytes / 1e9), ("a call, us", ceilings.call * 1e6)]
    show(f"Ceilings ({DEVICE})", rates, ("what", "rate"))
    inputs = make_inputs((800, 1216), 2 if DEVICE == "cuda" else 1)
    figures = {name: make_iteration(*model, inputs=inputs) for name, model in _models().items()}
    small = {
        "both Libra samplers, 400 positives": partial(sample_both, *make_matches(1, 400)),
        "BFP with non-local block": make_bfp_step("libra_d2"),
        "Mutual Guidance's matching, 30 objects": make_matchings(30)["Mutual Guidance"],
        "losses with ISR-P and CARL": make_box_loss_step(
            *("MODEL.PISA.ISR_POSITIVE.ENABLED", "True", "MODEL.PISA.CARL.ENABLED", "True")
        ),
        "step of SGD": make_step(fused=False),
        "step of SGD, SOLVER.FUSED": make_step(fused=True),
    }
    seconds = measure(figures, max(repeats // 5, 1), warmup=1) | measure(small, repeats)
    rows = []
    for name, function in (figures | small).items():
        parts = bound(function, ceilings)
        total = sum(parts.values())
        shares = [parts[kind] / total for kind in _KINDS]
        rows.append((name, 1000 * seconds[name], 1000 * total, *shares, seconds[name] / total))
    shares = [f"of it {kind}" for kind in _KINDS]
    headers = ("figure", "ms", "bound, ms", *shares, "measured / bound")
    show(f"What limits each figure ({DEVICE})", rows, headers)


def _models() -> dict[str, tuple]:
    bfloat16 = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16")
    libra = TWO_STAGE["Libra Faster R-CNN"][0]
    return {**TWO_STAGE, "Libra Faster R-CNN, bfloat16": (libra, bfloat16), **ONE_STAGE}
