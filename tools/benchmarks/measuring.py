"""How things are measured, side by side, and shown."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(
    candidates: dict[str, Callable], repeats: int, warmup: int = 3, calls: int = 1
) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that all see the same machine.

    Args:
        candidates: what to measure.
        repeats: number of turns.
        warmup: number of turns before those that count.
        calls: calls in a row in a turn; several find their data and code in the caches.
    """
    seconds = {name: [] for name in candidates}
    for i in range(warmup + repeats):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize()
            if i >= warmup:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# All that was shown, for --json.
TABLES: list[dict] = []


def show(title: str, rows: list[tuple], headers: tuple[str, ...]) -> None:
    """Prints a table, and keeps it."""
    TABLES.append({"title": title, "rows": [dict(zip(headers, row, strict=True)) for row in rows]})
    print(f"\n### {title}\n")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3g"), flush=True)


def make_inputs(size: tuple[int, int], num_images: int, num_objects: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(num_images):
        corner = torch.rand(num_objects, 2, generator=generator) * torch.tensor(size[::-1]) * 0.7
        extent = torch.rand(num_objects, 2, generator=generator) * 250 + 20
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_boxes.clip(size)
        instances.gt_classes = torch.randint(80, (num_objects,), generator=generator)
        # As a loader gives them, where SOLVER.FAST is on.
        image = (torch.rand(3, *size, generator=generator) * 255).to(torch.uint8)
        image = image.pin_memory() if DEVICE == "cuda" else image
        inputs.append({"image": image, "instances": instances})
    return inputs
