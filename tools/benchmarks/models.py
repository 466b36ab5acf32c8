"""Whole detectors: steps of training, and exported ones."""

import contextlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils.events import EventStorage
from torch import nn

from libra_d2 import Detector
from libra_d2.deploy.export import FORMATS, export_model, open_exported
from libra_d2.deploy.exportable import Exportable
from libra_d2.engine import LibraTrainer, load_config
from libra_d2.engine.speed import amp_dtype, fuse, prepare_model

from .measuring import CONFIGS, DEVICE, make_inputs, measure, show

# ---- training iteration


def make_model(config: str, opts: tuple[str, ...] = ()) -> tuple[CfgNode, nn.Module]:
    """A config and its model, with random weights; one of detectron2's classes is left alone."""
    cfg = load_config(str(CONFIGS / config), ["MODEL.WEIGHTS", "", *opts])
    torch.manual_seed(0)
    model = build_model(cfg)
    if any(type(module).__module__.startswith("libra_d2.") for module in model.modules()):
        prepare_model(model, cfg)
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

    def iteration() -> None:
        with EventStorage():
            with _precision(cfg):
                loss = sum(model(inputs).values())
            loss.backward()
        model.zero_grad()

    return iteration


def make_inference(config: str, opts: tuple[str, ...] = (), *, inputs: list[dict]) -> Callable:
    """Detection in a batch, in the precision of the config."""
    cfg, model = make_model(config, opts)
    model.eval()

    @torch.no_grad()
    def inference() -> None:
        with _precision(cfg):
            model(inputs)

    return inference


def _precision(cfg: CfgNode) -> torch.autocast:
    dtype = amp_dtype(cfg)
    is_mixed = dtype != torch.float32
    return torch.autocast(DEVICE, dtype if is_mixed else None, enabled=is_mixed)


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


PLAIN = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
# Each a config and overrides; detectron2's own first.
TWO_STAGE: dict[str, tuple] = {
    "Faster R-CNN (detectron2)": ("Base-RCNN-FPN.yaml", PLAIN),
    "Libra Faster R-CNN": ("Base-Libra-RCNN-FPN.yaml",),
    "PISA Faster R-CNN": (
        "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml",
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "1000"),  # as many proposals as the others
    ),
    "Libra and PISA, 2,000 proposals": ("COCO-Detection/libra_pisa_faster_rcnn_R_50_FPN_1x.yaml",),
    "OHEM Faster R-CNN": ("COCO-Detection/ohem_faster_rcnn_R_50_FPN_1x.yaml",),
}
ONE_STAGE: dict[str, tuple] = {
    "RetinaNet (detectron2)": ("Base-RetinaNet.yaml", ("MODEL.META_ARCHITECTURE", "RetinaNet")),
    "RetinaNet": ("Base-RetinaNet.yaml",),
    "Libra RetinaNet": ("Base-Libra-RetinaNet.yaml",),
    "Mutual Guidance RetinaNet": ("COCO-Detection/mutual_guidance_retinanet_R_50_FPN_1x.yaml",),
}


def benchmark_iteration(repeats: int) -> None:
    show_iterations(TWO_STAGE, repeats)


def benchmark_retinanet(repeats: int) -> None:
    show_iterations(ONE_STAGE, repeats)


def benchmark_speed(repeats: int) -> None:
    config, amp = "Base-Libra-RCNN-FPN.yaml", ("SOLVER.AMP.ENABLED", "True")
    bfloat16 = (*amp, "SOLVER.AMP.DTYPE", "bfloat16")
    channels_last, sparse = ("MODEL.CHANNELS_LAST", "True"), ("MODEL.ROI_ALIGN", "sparse")
    models = {
        "Libra Faster R-CNN": (config,),
        "MODEL.CHANNELS_LAST": (config, channels_last),
        "SOLVER.AMP, bfloat16": (config, bfloat16),
        "both": (config, (*bfloat16, *channels_last)),
    }
    if DEVICE == "cpu":
        models["MODEL.ROI_ALIGN sparse"] = (config, sparse)
        models["all three"] = (config, (*bfloat16, *channels_last, *sparse))
    if DEVICE == "cuda":
        models["SOLVER.AMP, float16"] = (config, amp)
        models["both, float16"] = (config, (*amp, *channels_last))
    show_iterations(models, repeats)
    steps = {name: make_step(name == "SOLVER.FUSED") for name in ("none", "SOLVER.FUSED")}
    seconds = measure(steps, repeats)
    rows = [(name, 1000 * s, s / seconds["none"]) for name, s in seconds.items()]
    show(f"Step of SGD, {config} ({DEVICE})", rows, ("switch", "ms", "ratio"))


def make_step(fused: bool) -> Callable:
    cfg, model = make_model("Base-Libra-RCNN-FPN.yaml")
    optimizer = LibraTrainer.build_optimizer(cfg, model)
    if fused:
        fuse(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer.step


# ---- inference


def benchmark_inference(repeats: int) -> None:
    """Images a second, from arrays in memory to boxes, against detectron2's DefaultPredictor."""
    generator = np.random.default_rng(0)
    images = list(generator.integers(0, 256, (8, 480, 640, 3), dtype=np.uint8))
    # As large as they come; some boxes, none of which is sure with random weights.
    opts = ("INPUT.MIN_SIZE_TEST", "480", "TEST.DETECTIONS_PER_IMAGE", "20")
    rows = []
    for name in ("Libra Faster R-CNN", "Libra RetinaNet"):
        with tempfile.TemporaryDirectory() as folder:
            cfg, model = make_model(EXPORTED[name], opts)
            torch.save({"model": model.state_dict()}, f"{folder}/model.pth")
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = f"{folder}/model.pth", DEVICE
            Path(f"{folder}/model.yaml").write_text(cfg.dump())
            seconds = measure(_ways_to_infer(cfg, folder, images), repeats, warmup=1)
        plain = next(iter(seconds.values()))
        rows += [(name, way, len(images) / s, plain / s) for way, s in seconds.items()]
    title = f"Inference, R50-FPN, 480x640, {len(images)} images ({DEVICE})"
    show(title, rows, ("model", "way", "images/s", "times as many"))


def _ways_to_infer(cfg: CfgNode, folder: str, images: list[np.ndarray]) -> dict[str, Callable]:
    predictor = DefaultPredictor(cfg)
    ways = {"DefaultPredictor (detectron2)": lambda: [predictor(image) for image in images]}
    for half in (False, True):
        for batch_size in (1, 8):
            options = {"batch_size": batch_size, "half": half, "threshold": 0.05}
            detector = Detector(f"{folder}/model.pth", **options)
            name = f"Detector, batches of {batch_size}{', half=True' * half}"
            ways[name] = partial(detector, images)
    if DEVICE != "cpu":  # where onnxruntime runs it here
        return ways
    detector, file = Detector(f"{folder}/model.pth", threshold=0.05), f"{folder}/model.onnx"
    inputs = [detector.preprocess(image)["image"][None] for image in images]
    with contextlib.suppress(ValueError):  # onnxruntime is missing
        export_model(detector.model, file, format="onnx", image=inputs[0])
        exported = open_exported(file, "onnx")
        ways["ONNX"] = lambda: [exported(image) for image in inputs]
    return ways


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
        # A GPU has no part in onnxruntime's, here.
        for format in [f for f in FORMATS if DEVICE == "cpu" or f != "onnx"]:
            for half in (False, True):
                with contextlib.suppress(ValueError), tempfile.TemporaryDirectory() as folder:
                    export_model(model, f"{folder}/model", format=format, image=image, half=half)
                    files[format + ", half" * half] = open_exported(f"{folder}/model", format)
        seconds = measure({n: partial(f, image) for n, f in files.items()}, repeats)
        rows += [(name, n, 1000 * s, s / seconds["eager"]) for n, s in seconds.items()]
    title = f"Exported models, R50-FPN, 480x640, one image ({DEVICE})"
    show(title, rows, ("model", "format", "ms", "ratio"))
