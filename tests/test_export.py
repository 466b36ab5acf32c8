"""Traced and exported pyramids hold at other sizes than the one they were recorded at."""

import copy

import onnxruntime
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from toys import LIBRA, SMALL_RETINANET, small_config, toy_config

from libra_d2.modeling import BalancedPyramid

RECORDED = (128, 192)
# P6 nests in P4 at the first alone.
SIZES = (RECORDED, (160, 96), (288, 320), (96, 224))
BFP = ("MODEL.BACKBONE.NAME", "build_bfp_backbone")
CASCADE = ("MODEL.ROI_HEADS.NAME", "LibraCascadeROIHeads")
CASCADE += ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)


def make_model(kind, *opts):
    torch.manual_seed(0)
    opts = (*opts, "MODEL.RPN.PRE_NMS_TOPK_TEST", 100)
    if kind == "retinanet":
        prior = ("MODEL.RETINANET.PRIOR_PROB", 0.2)
        cfg = toy_config("Base-Libra-RetinaNet.yaml", *SMALL_RETINANET, *BFP, *prior, *opts)
    else:
        cfg = small_config(LIBRA, *BFP, *(CASCADE if kind == "cascade" else ()), *opts)
    model = build_model(cfg).eval()
    assert isinstance(model.backbone, BalancedPyramid)
    for parameter in model.backbone.bfp.parameters():
        nn.init.normal_(parameter, std=0.1)
    if kind == "retinanet":
        # So that scores are not all 1, as which of equal ones come first is open, nor boxes huge.
        model.head.cls_score.weight.data.mul_(3e-2)
        model.head.bbox_pred.weight.data.mul_(1e-3)
    return model


def make_image(size):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(sum(size))) * 255


class Backbone(nn.Module):
    """Levels as a tuple, which every exporter knows."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return tuple(self.backbone(x).values())


@torch.no_grad()
@pytest.mark.parametrize("refine", ["non_local", "conv", "none"])
@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_backbone(kind, refine, tmp_path):
    model = make_model(kind, "MODEL.BFP.REFINE_TYPE", refine)
    module = Backbone(copy.deepcopy(model.backbone)).eval()
    example = make_image(RECORDED)[None] / 255
    traced = torch.jit.trace(module, example)
    file = str(tmp_path / "backbone.onnx")
    torch.onnx.export(
        module,
        (example,),
        file,
        opset_version=17,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}},
    )
    session = onnxruntime.InferenceSession(file)
    for size in SIZES:
        image = make_image(size)[None] / 255
        levels = module(image)
        for got, expected in zip(traced(image), levels, strict=True):
            assert torch.equal(got, expected)
        for got, expected in zip(session.run(None, {"x": image.numpy()}), levels, strict=True):
            torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-4, atol=1e-4)
