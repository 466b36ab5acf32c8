"""The models of LazyConfigs: those shipped are those of the yaml files; and those of others."""

import re

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import StandardROIHeads, build_model
from detectron2.projects.point_rend import PointRendMaskHead, add_pointrend_config
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from toys import CONFIGS, make_inputs

from libra_d2 import Detector
from libra_d2.engine import load_config
from libra_d2.engine.lazy_config import load_lazy_config
from libra_d2.modeling import BalancedPyramid, BalancedSampling, LibraROIHeads, SamplingMatcher
from libra_d2.zoo import get_config

SHIPPED = sorted(str(f.relative_to(CONFIGS)) for f in CONFIGS.glob("COCO-*/*.py"))
COMMON = {
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "libra_cascade_mask_rcnn": "COCO-InstanceSegmentation/libra_cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "libra_cascade_rcnn": "COCO-Detection/libra_cascade_rcnn_R_50_FPN_1x.yaml",
    "libra_faster_rcnn": "COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml",
    "libra_mask_rcnn": "COCO-InstanceSegmentation/libra_mask_rcnn_R_50_FPN_1x.yaml",
    "libra_retinanet": "COCO-Detection/libra_retinanet_R_50_FPN_1x.yaml",
    "libra_rpn": "COCO-Detection/libra_rpn_R_50_FPN_1x.yaml",
    "mutual_guidance_retinanet": "COCO-Detection/mutual_guidance_retinanet_R_50_FPN_1x.yaml",
    "ohem_faster_rcnn": "COCO-Detection/ohem_faster_rcnn_R_50_FPN_1x.yaml",
    "pisa_faster_rcnn": "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml",
    "pisa_retinanet": "COCO-Detection/pisa_retinanet_R_50_FPN_1x.yaml",
}

# R18, whose batch norm learns: random weights under frozen statistics explode.
YAML_R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
YAML_R18 += ["MODEL.RESNETS.NORM", "BN", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
YAML_R18 += ["MODEL.BACKBONE.FREEZE_AT", 0]


def as_r18(model):
    fpn = model.backbone.get("pyramid", model.backbone)
    fpn.bottom_up.stem.norm = fpn.bottom_up.stages.norm = "BN"
    fpn.bottom_up.stages.depth = 18
    del fpn.bottom_up.stages.stride_in_1x1  # of bottlenecks
    if "in_channels" in fpn.top_block:
        fpn.top_block.in_channels = 512
    return model


def losses_of(model, inputs):
    torch.manual_seed(1)
    with EventStorage():
        return model.train()(inputs)


class TestShipped:
    @pytest.mark.parametrize("name", COMMON)
    def test_a_common_model_is_the_yaml_files(self, name):
        """The same weights by name and, from one seed, the same losses."""
        yaml = load_config(str(CONFIGS / COMMON[name]), YAML_R18)
        expected = build_model(yaml)
        file = CONFIGS / "common" / "models" / f"{name}.py"
        model = instantiate(as_r18(LazyConfig.load(str(file)).model))
        assert list(expected.state_dict()) == list(model.state_dict())
        model.load_state_dict(expected.state_dict())
        inputs = make_inputs((3, 0), size=(64, 64), masks=yaml.MODEL.MASK_ON)
        losses, wanted = losses_of(model, inputs), losses_of(expected, inputs)
        assert losses.keys() == wanted.keys()
        for key, loss in wanted.items():
            torch.testing.assert_close(losses[key], loss, atol=1e-6, rtol=1e-6, msg=key)

    def test_there_is_a_yaml_file_of_each(self):
        assert {f.stem for f in (CONFIGS / "common" / "models").glob("*.py")} == set(COMMON)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_a_config_comes_back_from_its_file(self, name, tmp_path):
        lazy = load_lazy_config(str(CONFIGS / name)).lazy
        LazyConfig.save(lazy, str(tmp_path / "one.yaml"))
        back = LazyConfig.load(str(tmp_path / "one.yaml"))
        LazyConfig.save(back, str(tmp_path / "two.yaml"))
        assert (tmp_path / "one.yaml").read_text() == (tmp_path / "two.yaml").read_text()
        assert not list(tmp_path.glob("*.pkl"))
        assert set(back) == {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
        assert OmegaConf.to_container(back.train) == OmegaConf.to_container(lazy.train)


def point_rend_head(num_classes):
    """PointRend's mask head, which is made from a config of its own."""
    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.POINT_HEAD.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON, cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = True, ""
    cfg.MODEL.ROI_MASK_HEAD.FC_DIM = cfg.MODEL.POINT_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p2"]
    return PointRendMaskHead(cfg, {"p2": ShapeSpec(channels=256, stride=4)})


class TheirHeads(StandardROIHeads):
    """Of a user's own."""


class MyHeads(BalancedSampling, TheirHeads):
    """The same, balanced."""


class TestSomeoneElses:
    """The three lines of docs/lazyconfig.md."""

    @staticmethod
    def balance(model):
        text = (CONFIGS.parent / "docs" / "lazyconfig.md").read_text()
        (lines,) = re.findall(r"```python\n(# Balanced\n.*?)```", text, re.S)
        exec(lines, {"model": model})

    @staticmethod
    def with_bitmasks():
        inputs = make_inputs((3, 0), size=(64, 64), masks=True)
        for image in inputs:
            own = image["instances"]
            polygons = own.gt_masks.polygons
            own.remove("gt_masks")
            own.gt_masks = BitMasks.from_polygon_masks(polygons, 64, 64)
        return inputs

    def test_point_rend(self):
        """A Mask R-CNN whose masks are PointRend's, which knows nothing of this project."""
        model = as_r18(get_config("common/models/mask_rcnn_fpn.py").model)
        model.roi_heads.update(
            mask_in_features=["p2"],
            mask_pooler=None,
            mask_head=L(point_rend_head)(num_classes="${..num_classes}"),
        )
        self.balance(model)
        built = instantiate(model)
        assert isinstance(built.roi_heads, LibraROIHeads)
        assert isinstance(built.backbone, BalancedPyramid)
        losses = losses_of(built, self.with_bitmasks())
        assert "loss_mask_point" in losses
        assert all(torch.isfinite(loss) for loss in losses.values())

    def test_heads_of_their_own(self):
        model = as_r18(get_config("common/models/mask_rcnn_fpn.py").model)
        model.roi_heads._target_ = TheirHeads
        self.balance(model)
        model.roi_heads._target_ = MyHeads
        built = instantiate(model)
        assert isinstance(built.roi_heads, TheirHeads)
        assert isinstance(built.roi_heads.proposal_matcher, SamplingMatcher)
        losses_of(built, make_inputs((3, 0), size=(64, 64), masks=True))


def test_a_cascade_detects(tmp_path):
    model = as_r18(LazyConfig.load(str(CONFIGS / "common/models/libra_cascade_rcnn.py")).model)
    torch.save({"model": instantiate(model).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "own.py").write_text(
        f"""
from detectron2.config import LazyConfig
from libra_d2.zoo import get_config

model = LazyConfig.load({str(CONFIGS / "common/models/libra_cascade_rcnn.py")!r}).model
model.backbone.pyramid.bottom_up.stem.norm = "BN"
model.backbone.pyramid.bottom_up.stages.update(depth=18, norm="BN")
del model.backbone.pyramid.bottom_up.stages.stride_in_1x1
dataloader = get_config("common/data/coco.py").dataloader
dataloader.test.mapper.augmentations[0].short_edge_length = 64
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = get_config("common/optim.py").SGD
train = get_config("common/train.py").train
train.init_checkpoint = {str(tmp_path / "model.pth")!r}
"""
    )
    detector = Detector(tmp_path / "own.py", threshold=0.3, device="cpu")
    assert [p.test_score_thresh for p in detector.model.roi_heads.box_predictor] == [0.3] * 3
    detector(np.zeros((60, 90, 3), np.uint8))
