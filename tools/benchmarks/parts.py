"""Parts of a detector: pyramid, matching, losses."""

import itertools
from collections.abc import Callable

import torch
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from libra_d2.engine import load_config
from libra_d2.layers import BalancedFeaturePyramid, NonLocal2d
from libra_d2.modeling import LibraFastRCNNOutputLayers, LibraRPN, MutualGuidanceMatcher
from libra_d2.modeling.max_iou import match_anchors
from libra_d2.modeling.roi_align import ParallelROIAlign, SparseROIAlign

from .measuring import CONFIGS, DEVICE, make_inputs, measure, show

_STRIDES = (4, 8, 16)  # of the levels that most boxes are pooled from

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


# ---- matching of anchors


def make_matchings(num_objects: int) -> dict[str, Callable]:
    """Labels of one image by the largest IoU, and both of Mutual Guidance; anchors of 800x1216."""
    anchors = make_anchors((800, 1216)).to(DEVICE)
    gt = make_inputs((800, 1216), num_images=1, num_objects=num_objects)[0]["instances"].to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, len(anchors), 80, generator=generator) - 4).to(DEVICE)
    deltas = (torch.randn(1, len(anchors), 4, generator=generator) * 0.1).to(DEVICE)
    max_iou = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    guided = MutualGuidanceMatcher(sigma=2.0, positive_iou=0.5, negative_iou=0.4)
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))

    def guide() -> None:
        with EventStorage():
            guided(anchors, logits, deltas, [gt], transform)

    return {
        "pairwise_iou + Matcher (detectron2)": lambda: max_iou(pairwise_iou(gt.gt_boxes, anchors)),
        "the same from overlaps": lambda: list(match_anchors(max_iou, [gt.gt_boxes], anchors)),
        "Mutual Guidance": guide,
    }


def benchmark_matching(repeats: int) -> None:
    seconds = measure(make_matchings(30), repeats)
    plain = next(iter(seconds.values()))
    show(
        f"Matching 30 objects with {len(make_anchors((800, 1216))):,} anchors ({DEVICE})",
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


# ---- proposals of an RPN


def make_proposing(num_images: int, training: bool) -> dict[str, Callable]:
    """Proposals of images of 800x1216, from random logits and deltas."""
    cfg = load_config(str(CONFIGS / "Base-RCNN-FPN.yaml"))
    strides = [4, 8, 16, 32, 64]
    shapes = {f"p{i + 2}": ShapeSpec(channels=256, stride=s) for i, s in enumerate(strides)}
    rpn = LibraRPN(cfg, shapes).to(DEVICE).train(training)
    size = (800, 1216)
    features = [torch.zeros(1, 1, *(side // s for side in size), device=DEVICE) for s in strides]
    anchors = rpn.anchor_generator(features)
    generator = torch.Generator().manual_seed(0)
    logits, deltas = (
        [scale * torch.randn(num_images, len(a), *last, generator=generator) for a in anchors]
        for scale, last in ((1.0, ()), (0.1, (4,)))
    )
    logits, deltas = ([level.to(DEVICE) for level in levels] for levels in (logits, deltas))
    predictions = anchors, logits, deltas, [size] * num_images
    return {
        "detectron2": lambda: RPN.predict_proposals(rpn, *predictions),
        "LibraRPN": lambda: rpn.predict_proposals(*predictions),
    }


def benchmark_proposals(repeats: int) -> None:
    rows = []
    for training, num_images in itertools.product((True, False), (1, 8)):
        seconds = measure(make_proposing(num_images, training), repeats)
        plain, own = (1000 * value for value in seconds.values())
        rows.append(("training" if training else "inference", num_images, plain, own, own / plain))
    title = f"Proposals of images of 800x1216 from an RPN's logits and deltas, ms ({DEVICE})"
    show(title, rows, ("mode", "images", "detectron2", "LibraRPN", "ratio"))


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


# ---- pooling


def make_pooling(
    kind: type[ROIAlign], stride: int, layout: torch.memory_format
) -> dict[str, Callable]:
    """Forward and backward of 200 boxes, as large as a level's are, of one of 800x1216 pixels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 256, 800 // stride, 1216 // stride, generator=generator)
    features = features.to(DEVICE, memory_format=layout).requires_grad_()
    extents = (0.5 + 0.5 * torch.rand(200, 2, generator=generator)) * 28 * stride
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([1216, 800]) * 0.6
    boxes = torch.cat([torch.zeros(200, 1), corners, corners + extents], dim=1).to(DEVICE)
    pooler = kind(7, 1 / stride, 0)
    pooled = pooler(features, boxes)
    gradient = torch.randn_like(pooled)
    return {
        "forward": lambda: pooler(features, boxes),
        "backward": lambda: torch.autograd.grad(pooled, features, gradient, retain_graph=True),
    }


def benchmark_pooling(repeats: int) -> None:
    kinds = {
        "detectron2": (ROIAlign, torch.contiguous_format),
        "all threads": (ParallelROIAlign, torch.contiguous_format),
        "sparse": (SparseROIAlign, torch.contiguous_format),
        "sparse, channels last": (SparseROIAlign, torch.channels_last),
    }
    poolings = {
        (name, stride): make_pooling(kind, stride, layout)
        for name, (kind, layout) in kinds.items()
        for stride in _STRIDES
    }
    seconds = {
        part: measure({key: ways[part] for key, ways in poolings.items()}, repeats)
        for part in ("forward", "backward")
    }
    rows = [
        (name, *(1000 * seconds[part][name, stride] for stride in _STRIDES for part in seconds))
        for name in kinds
    ]
    headers = (f"stride {stride}, {part}" for stride in _STRIDES for part in seconds)
    title = f"ROIAlign of 200 boxes, 256 channels, 800x1216 pixels, ms ({DEVICE})"
    show(title, rows, ("way", *headers))
