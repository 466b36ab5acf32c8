"""Shipped configs at a size that trains in a second, and images to go with them."""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from libra_d2.engine import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=_needs_gpu)]

# Narrow layers, small images and few samples; what a config switches stays as it is.
TOY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 2,
    "MODEL.SMALL_RESNET.OUT_CHANNELS", [16, 24, 32, 40],
    "MODEL.RESNETS.NORM", "BN",  # random weights under frozen statistics explode
    "MODEL.FPN.OUT_CHANNELS", 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
    "MODEL.ROI_HEADS.NUM_CLASSES", 10,
    "MODEL.RETINANET.NUM_CLASSES", 10,
    "MODEL.RETINANET.NUM_CONVS", 1,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]],
    "INPUT.MIN_SIZE_TRAIN", (96,),
    "INPUT.MIN_SIZE_TEST", 96,
    "SOLVER.IMS_PER_BATCH", 2,
    "SOLVER.BASE_LR", 1e-5,
    "SOLVER.STEPS", (),
    "SOLVER.MAX_ITER", 2,
    "SOLVER.WARMUP_ITERS", 0,
    "DATALOADER.NUM_WORKERS", 0,
    "TEST.EVAL_PERIOD", 0,
    "SEED", 1,
]  # fmt: skip

LIBRA = "Base-Libra-RCNN-FPN.yaml"
BASELINE = "Base-RCNN-FPN.yaml"
# detectron2's own classes, for the same model.
PLAIN = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN"]

SMALL = ["MODEL.BACKBONE.NAME", "build_small_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
SMALL += ["MODEL.RESNETS.NORM", "BN", "MODEL.BFP.FPN_BUILDER", "build_small_resnet_fpn_backbone"]


RETINANET = "Base-RetinaNet.yaml"
_RETINANET_BUILDER = "build_retinanet_small_resnet_fpn_backbone"
SMALL_RETINANET = ["MODEL.BACKBONE.NAME", _RETINANET_BUILDER, "MODEL.BACKBONE.FREEZE_AT", 0]
SMALL_RETINANET += ["MODEL.RESNETS.NORM", "BN", "MODEL.BFP.FPN_BUILDER", _RETINANET_BUILDER]
SMALL_RETINANET += ["MODEL.BFP.REFINE_LEVEL", 1]


def toy_opts(*opts) -> list[str]:
    """Overrides that make any shipped config a toy, and then some."""
    return [str(opt) for opt in (*TOY, *opts)]


def toy_config(config: str, *opts):
    """A shipped config, by its path under configs/, as a toy."""
    return load_config(str(CONFIGS / config), toy_opts(*opts))


def small_config(config, *opts):
    """A toy whose backbone is the small ResNet, not frozen."""
    return toy_config(config, *SMALL, *opts)


def small_retinanet(*opts):
    """A toy RetinaNet whose backbone is the small ResNet, not frozen."""
    return toy_config(RETINANET, *SMALL_RETINANET, *opts)


def train_step(cfg, inputs=None, build=build_model):
    """Losses, gradients and logged numbers of one step from a fixed seed, and the model."""
    torch.manual_seed(0)
    model = build(cfg).train()
    torch.manual_seed(1)
    with EventStorage() as storage:
        losses = model(make_inputs() if inputs is None else inputs)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, {k: v for k, (v, _) in storage.latest().items()}, model


def one_level(*opts, num_images=2, num_anchors=60):
    """A RetinaNet and arguments of its ``losses`` on one level of random anchors."""
    model = build_model(small_retinanet(*opts)).train()
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(num_anchors, 2, generator=generator) * 60
    anchors = Boxes(torch.cat([corner, corner + 20], dim=1))
    logits = torch.randn(num_images, num_anchors, 10, generator=generator)
    deltas = torch.randn(num_images, num_anchors, 4, generator=generator) * 0.3
    labels = torch.randint(-1, 11, (num_images, num_anchors), generator=generator)
    shift = torch.rand(num_images, num_anchors, 4, generator=generator) * 4
    return model, anchors, logits, deltas, labels, anchors.tensor + shift


def call_losses(model, anchors, logits, deltas, labels, gt_boxes, **kwargs):
    with EventStorage():
        return model.losses([anchors], [logits], list(labels), [deltas], list(gt_boxes), **kwargs)


def make_inputs(num_objects=(3, 0, 1), size=(96, 128), masks=False) -> list[dict]:
    """A batch for training: an image with each of these numbers of objects, masked or not."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    inputs = []
    for n in num_objects:
        corner = torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        extent = torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) * 0.3 + 8
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.randint(10, (n,), generator=generator)
        if masks:  # the boxes themselves
            corners = instances.gt_boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]]
            instances.gt_masks = PolygonMasks([[polygon.numpy()] for polygon in corners])
        image = torch.rand(3, height, width, generator=generator) * 255
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def load_tool(name: str) -> ModuleType:
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name[:-3], CONFIGS.parent / "tools" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *args) -> SimpleNamespace:
    """Runs a program of tools/ in this process: ``returncode``, ``stdout`` and ``stderr``."""
    module = load_tool(name)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([str(arg) for arg in args])
        except SystemExit as exit_:
            code = exit_.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
