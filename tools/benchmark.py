#!/usr/bin/env python
"""Measures speed and memory, side by side in one run, and prints a table a topic (Markdown).

python tools/benchmark.py                 # all, on the GPU if there is one
python tools/benchmark.py samplers bfp    # some
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from libra_d2.deploy.export import FORMATS, export_model, open_exported
from libra_d2.deploy.exportable import Exportable
from libra_d2.engine import load_config
from libra_d2.engine.speed import amp_dtype, prepare_model
from libra_d2.layers import BalancedFeaturePyramid, NonLocal2d
from libra_d2.modeling import LibraFastRCNNOutputLayers, MutualGuidanceMatcher
from libra_d2.sampling import sample_instance_balanced_positives, sample_iou_balanced_negatives

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
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


def show(title: str, rows: list[tuple], headers: tuple[str, ...]) -> None:
    print(f"\n### {title}\n")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3g"), flush=True)


# ---- samplers


def make_matches(num_images: int, num_positives: int) -> tuple[Tensor, Tensor, Tensor]:
    """IoUs, ground-truth indices and mask of positives of 2,000 proposals an image."""
    generator = torch.Generator().manual_seed(0)
    ious = torch.rand(num_images, 2000, generator=generator) ** 3 * 0.5
    ious[:, :num_positives] += 0.5
    gt_indices = torch.randint(20, (num_images, 2000), generator=generator)
    squeeze = (lambda x: x[0].to(DEVICE)) if num_images == 1 else (lambda x: x.to(DEVICE))
    return squeeze(ious), squeeze(gt_indices), squeeze(ious >= 0.5)


def sample_both(ious: Tensor, gt_indices: Tensor, positives: Tensor) -> None:
    """Both Libra samplers: 512 samples, at most a quarter of them positive."""
    num_positives = positives.sum(-1).clamp(max=128)
    sample_instance_balanced_positives(gt_indices, positives, 128)
    sample_iou_balanced_negatives(ious, ~positives, 512 - num_positives)


def benchmark_samplers(repeats: int) -> None:
    rows = []
    for num_positives, calls in itertools.product((60, 400), (20, 1)):
        one, batch = (make_matches(n, num_positives) for n in (1, 16))
        labels = torch.where(one[2], 0, 1)
        seconds = measure(
            {
                "detectron2": partial(subsample_labels, labels, 512, 0.25, 1),
                "one": partial(sample_both, *one),
                "batch": partial(sample_both, *batch),
            },
            repeats=repeats * 20,
            calls=calls,
        )
        milliseconds = {name: 1000 * value for name, value in seconds.items()}
        ratio = seconds["batch"] / seconds["one"]
        rows.append((num_positives, calls, *milliseconds.values(), ratio))
    show(
        f"Sampling 512 of 2,000 proposals ({DEVICE}, ms)",
        rows,
        (
            "positives",
            "calls in a row",
            "random (detectron2)",
            "both Libra samplers",
            "16 images, one call",
            "16 images / 1",
        ),
    )


# ---- balanced feature pyramid


class TextbookNonLocal2d(NonLocal2d):
    """The same block with the matrix of attention weights in memory."""

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (conv(x).flatten(2) for conv in (self.theta, self.phi, self.g))
        weights = (theta.transpose(1, 2) @ phi).softmax(dim=-1)
        return x + self.conv_out((weights @ g.transpose(1, 2)).transpose(1, 2).reshape(x.shape))


BLOCKS = {
    "textbook": TextbookNonLocal2d,
    "libra_d2": NonLocal2d,
    "no block": lambda channels: nn.Identity(),
}


def make_bfp_step(block: str) -> Callable[[], None]:
    """Forward and backward of BFP with 256 channels and P4 of 50x84, that of 800x1333 pixels."""
    torch.manual_seed(0)
    bfp = BalancedFeaturePyramid(256, 5, refine_type="none")
    bfp.refine = BLOCKS[block](256)
    bfp.to(DEVICE)
    sizes = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    levels = [torch.randn(1, 256, *size, device=DEVICE, requires_grad=True) for size in sizes]

    def step() -> None:
        loss = sum(level.sum() for level in bfp(levels))
        torch.autograd.grad(loss, [*levels, *bfp.parameters()])

    return step


def peak_memory(step: Callable[[], None]) -> float:
    """The most that torch's allocator hands out during a step, beyond what it had, in MiB."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
    # The public tables add up an operator's allocations; a peak needs them in their order.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def benchmark_bfp(repeats: int) -> None:
    names = ("textbook", "libra_d2")
    steps = {name: make_bfp_step(name) for name in BLOCKS}
    seconds = measure({name: steps[name] for name in names}, repeats)
    peaks = {name: peak_memory(step) for name, step in steps.items()}
    rows = [
        (name, 1000 * seconds[name], peaks[name], peaks[name] - peaks["no block"]) for name in names
    ]
    rows.append(("ratio", *(rows[1][i] / rows[0][i] for i in (1, 2, 3))))
    show(
        f"BFP with non-local block, P4 of 50x84, forward and backward ({DEVICE})",
        rows,
        ("form", "ms", "peak memory, MiB", "of it more than without the block, MiB"),
    )


# ---- matching of Mutual Guidance


def benchmark_matching(repeats: int) -> None:
    """Both labellings of one image against detectron2's one, on all anchors of 800x1216."""
    anchors = make_anchors((800, 1216)).to(DEVICE)
    gt = make_inputs((800, 1216), num_images=1, num_objects=30)[0]["instances"].to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, len(anchors), 80, generator=generator) - 4).to(DEVICE)
    deltas = (torch.randn(1, len(anchors), 4, generator=generator) * 0.1).to(DEVICE)
    max_iou = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    guided = MutualGuidanceMatcher(sigma=2.0, positive_iou=0.5, negative_iou=0.4)
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    with EventStorage():
        seconds = measure(
            {
                "pairwise_iou + Matcher (detectron2)": lambda: max_iou(
                    pairwise_iou(gt.gt_boxes, anchors)
                ),
                "Mutual Guidance": lambda: guided(anchors, logits, deltas, [gt], transform),
            },
            repeats,
        )
    plain = next(iter(seconds.values()))
    show(
        f"Matching 30 objects with {len(anchors):,} anchors ({DEVICE})",
        [(name, 1000 * value, value / plain) for name, value in seconds.items()],
        ("matching", "ms", "ratio"),
    )


def make_anchors(size: tuple[int, int]) -> Boxes:
    """RetinaNet's anchors of an image, levels P3 to P7."""
    cfg = load_config(str(CONFIGS / "Base-RetinaNet.yaml"))
    strides = [8, 16, 32, 64, 128]
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in strides])
    features = [torch.zeros(1, 1, *(-(-side // stride) for side in size)) for stride in strides]
    return Boxes.cat(generator(features))


# ---- importance-based reweighting


def make_box_loss_step(*opts: str) -> Callable:
    """Losses of the box head for 2 images with 512 ROIs each, 256 of all positive; and backward."""
    cfg = load_config(str(CONFIGS / "Base-RCNN-FPN.yaml"), opts)
    torch.manual_seed(0)
    predictor = LibraFastRCNNOutputLayers(cfg, ShapeSpec(channels=1024)).to(DEVICE)
    proposals = []
    for _ in range(2):
        image = Instances((800, 1216))
        corner, gt_indices = torch.rand(512, 2) * 700, torch.randint(20, (512,))
        image.proposal_boxes = Boxes(torch.cat([corner, corner + 50], dim=1))
        gt_corner = torch.rand(20, 2) * 700
        image.gt_boxes = Boxes(torch.cat([gt_corner, gt_corner + 60], dim=1)[gt_indices])
        image.gt_classes = torch.where(torch.arange(512) < 128, gt_indices * 3, 80)
        image.gt_indices = gt_indices
        proposals.append(image.to(DEVICE))
    logits = torch.randn(1024, 81, device=DEVICE, requires_grad=True)
    deltas = torch.randn(1024, 320, device=DEVICE, requires_grad=True)

    def step() -> None:
        with EventStorage():
            losses = predictor.losses((logits, deltas), proposals)
        torch.autograd.grad(sum(losses.values()), (logits, deltas))

    return step


def benchmark_reweighting(repeats: int) -> None:
    seconds = measure(
        {
            "plain": make_box_loss_step(),
            "ISR-P": make_box_loss_step("MODEL.PISA.ISR_POSITIVE.ENABLED", "True"),
            "ISR-P and CARL": make_box_loss_step(
                *("MODEL.PISA.ISR_POSITIVE.ENABLED", "True", "MODEL.PISA.CARL.ENABLED", "True")
            ),
        },
        repeats=repeats * 10,
    )
    plain = seconds["plain"]
    show(
        f"Losses of the box head, 2 images with 256 positives, forward and backward ({DEVICE})",
        [(name, 1000 * value, 1000 * (value - plain)) for name, value in seconds.items()],
        ("losses", "ms", "more than plain, ms"),
    )


# ---- training iteration


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
        image = torch.rand(3, *size, generator=generator) * 255
        inputs.append({"image": image, "instances": instances})
    return inputs


def make_model(config: str, opts: tuple[str, ...] = ()) -> tuple[CfgNode, nn.Module]:
    """A config and its model, with random weights."""
    cfg = load_config(str(CONFIGS / config), ["MODEL.WEIGHTS", "", *opts])
    torch.manual_seed(0)
    model = prepare_model(build_model(cfg), cfg)
    # Random residual branches under frozen batch norm make features, and so losses, explode, and
    # gradients so small that their products are denormal numbers, which slow a CPU down.
    for block in model.modules():
        if isinstance(block, BottleneckBlock):
            block.conv3.norm.weight.fill_(0.1)
    return cfg, model


def make_iteration(config: str, opts: tuple[str, ...] = (), *, inputs: list[dict]) -> Callable:
    """Forward and backward of a model, which no step changes, in the precision of its config."""
    cfg, model = make_model(config, opts)
    model.train()
    dtype = amp_dtype(cfg)
    is_mixed = dtype != torch.float32

    def iteration() -> None:
        with EventStorage():
            with torch.autocast(DEVICE, dtype if is_mixed else None, enabled=is_mixed):
                loss = sum(model(inputs).values())
            loss.backward()
        model.zero_grad()

    return iteration


def show_iterations(models: dict[str, tuple], repeats: int) -> None:
    """Measures models, each a config and overrides; ratios are to the first."""
    num_images = 2 if DEVICE == "cuda" else 1
    inputs = make_inputs((800, 1216), num_images)
    iterations = {name: make_iteration(*model, inputs=inputs) for name, model in models.items()}
    seconds = measure(iterations, repeats, warmup=1 if DEVICE == "cpu" else 5)
    baseline = next(iter(seconds.values()))
    show(
        f"Forward and backward in training, R50-FPN, {num_images} x 800x1216 ({DEVICE})",
        [(name, value, value / baseline) for name, value in seconds.items()],
        ("model", "s", "ratio"),
    )


def benchmark_iteration(repeats: int) -> None:
    plain = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
    models = {
        "Faster R-CNN (detectron2)": ("Base-RCNN-FPN.yaml", plain),
        "Libra Faster R-CNN": ("Base-Libra-RCNN-FPN.yaml",),
        "PISA Faster R-CNN": (
            "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml",
            ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "1000"),  # as many proposals as the others
        ),
        "OHEM Faster R-CNN": ("COCO-Detection/ohem_faster_rcnn_R_50_FPN_1x.yaml",),
    }
    show_iterations(models, repeats)


def benchmark_retinanet(repeats: int) -> None:
    models = {
        "RetinaNet (detectron2)": (
            "Base-RetinaNet.yaml",
            ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ),
        "RetinaNet": ("Base-RetinaNet.yaml",),
        "Libra RetinaNet": ("Base-Libra-RetinaNet.yaml",),
        "Mutual Guidance RetinaNet": ("COCO-Detection/mutual_guidance_retinanet_R_50_FPN_1x.yaml",),
    }
    show_iterations(models, repeats)


def benchmark_speed(repeats: int) -> None:
    config, amp = "Base-Libra-RCNN-FPN.yaml", ("SOLVER.AMP.ENABLED", "True")
    bfloat16 = (*amp, "SOLVER.AMP.DTYPE", "bfloat16")
    channels_last = ("MODEL.CHANNELS_LAST", "True")
    models = {
        "Libra Faster R-CNN": (config,),
        "MODEL.CHANNELS_LAST": (config, channels_last),
        "SOLVER.AMP, bfloat16": (config, bfloat16),
        "both": (config, (*bfloat16, *channels_last)),
    }
    if DEVICE == "cuda":
        models["SOLVER.AMP, float16"] = (config, amp)
        models["both, float16"] = (config, (*amp, *channels_last))
    show_iterations(models, repeats)


# ---- exported models


EXPORTED = {
    "Libra Faster R-CNN": "Base-Libra-RCNN-FPN.yaml",
    "Libra Mask R-CNN": "COCO-InstanceSegmentation/libra_mask_rcnn_R_50_FPN_1x.yaml",
    "Libra Cascade R-CNN": "COCO-Detection/libra_cascade_rcnn_R_50_FPN_1x.yaml",
    "Libra RetinaNet": "Base-Libra-RetinaNet.yaml",
}


@torch.no_grad()
def benchmark_export(repeats: int) -> None:
    image, rows = torch.rand(1, 3, 480, 640, device=DEVICE) * 255, []
    for name, config in EXPORTED.items():
        _, model = make_model(config, ("TEST.DETECTIONS_PER_IMAGE", "20"))
        model.eval()
        files = {"eager": Exportable(model).eval()}
        for format in FORMATS:
            for half in (False, True):
                with contextlib.suppress(ValueError), tempfile.TemporaryDirectory() as folder:
                    export_model(model, f"{folder}/model", format=format, image=image, half=half)
                    files[format + ", half" * half] = open_exported(f"{folder}/model", format)
        seconds = measure({n: partial(f, image) for n, f in files.items()}, repeats)
        rows += [(name, n, 1000 * s, s / seconds["eager"]) for n, s in seconds.items()]
    title = f"Exported models, R50-FPN, 480x640, one image ({DEVICE})"
    show(title, rows, ("model", "format", "ms", "ratio"))


BENCHMARKS = {
    "samplers": benchmark_samplers,
    "bfp": benchmark_bfp,
    "matching": benchmark_matching,
    "reweighting": benchmark_reweighting,
    "iteration": benchmark_iteration,
    "retinanet": benchmark_retinanet,
    "speed": benchmark_speed,
    "export": benchmark_export,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all if none")
    parser.add_argument("--repeats", type=int, default=15, help="the median is over so many")
    args = parser.parse_args(argv)
    unknown = [name for name in args.what if name not in BENCHMARKS]
    if unknown or args.repeats < 1:
        parser.error(
            f"there is no benchmark '{unknown[0]}'; there is {', '.join(BENCHMARKS)}"
            if unknown
            else f"--repeats must be at least 1, got {args.repeats}"
        )
    name = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {DEVICE}: {name}")
    for what in args.what or BENCHMARKS:
        BENCHMARKS[what](args.repeats)


if __name__ == "__main__":
    main()
