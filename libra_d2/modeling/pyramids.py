"""Pyramids: PAFPN, and RetinaNet's top block as mmdetection has it."""

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor, nn

__all__ = [
    "PAFPN",
    "LastLevelP6P7WithoutReLU",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
]


class PAFPN(FPN):
    """FPN with one more path, from the finest level up (Liu et al., PANet, CVPR 2018, section 3.1).

    Each level is added to the finer one's output after a 3x3 convolution of stride 2, and goes
    through a 3x3 convolution; the finest stays. Layers made from a level (P6 from P5) see the
    outcome, as in mmdetection. The weights of the FPN keep their names.

    Args:
        kwargs: see :class:`FPN`.
    """

    def __init__(self, bottom_up: Backbone, in_features: list[str], out_channels: int, **kwargs):
        super().__init__(bottom_up, in_features, out_channels, **kwargs)
        self.path_names = self._out_features[: len(in_features)]
        norm = kwargs.get("norm", "")
        for name in self.path_names[1:]:
            for kind, stride in (("downsample", 2), ("output", 1)):
                conv = Conv2d(
                    out_channels,
                    out_channels,
                    kernel_size=3,
                    stride=stride,
                    padding=1,
                    bias=norm == "",
                    norm=get_norm(norm, out_channels),
                )
                weight_init.c2_xavier_fill(conv)
                self.add_module(f"pafpn_{kind}{name[1:]}", conv)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Levels by name, finest first, from images (N, C, H, W)."""
        features = super().forward(x)
        finest, *others = self.path_names
        path = features[finest]
        for name in others:
            path = features[name] + getattr(self, f"pafpn_downsample{name[1:]}")(path)
            features[name] = getattr(self, f"pafpn_output{name[1:]}")(path)
        if self.top_block is not None and self.top_block.in_feature in self.path_names:
            extra = self.top_block(features[self.top_block.in_feature])
            features.update(zip(self._out_features[len(self.path_names) :], extra, strict=True))
        return features


class LastLevelP6P7WithoutReLU(nn.Module):
    """Makes P7 from P6 without a ReLU between, as mmdetection's RetinaNet does.

    Args:
        top_block: detectron2's block, whose convolutions it takes over under the same names.
    """

    def __init__(self, top_block: LastLevelP6P7):
        super().__init__()
        self.num_levels = top_block.num_levels
        self.in_feature = top_block.in_feature
        self.p6 = top_block.p6
        self.p7 = top_block.p7

    def forward(self, c5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_resnet_pafpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """PAFPN (P2..P6) on a ResNet; reads what detectron2's ``build_resnet_fpn_backbone`` does."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return build_pyramid(cfg, bottom_up, LastLevelMaxPool(), kind=PAFPN)


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_pafpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """The same with RetinaNet's P6 and P7, made from the last stage."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return build_pyramid(cfg, bottom_up, p6p7_from(bottom_up, cfg), kind=PAFPN)


def build_pyramid(cfg, bottom_up: Backbone, top_block: nn.Module, kind: type[FPN] = FPN) -> FPN:
    """A pyramid on any bottom-up network, from ``MODEL.FPN``."""
    options = cfg.MODEL.FPN
    return kind(
        bottom_up=bottom_up,
        in_features=options.IN_FEATURES,
        out_channels=options.OUT_CHANNELS,
        norm=options.NORM,
        top_block=top_block,
        fuse_type=options.FUSE_TYPE,
    )


def p6p7_from(bottom_up: Backbone, cfg) -> LastLevelP6P7:
    """RetinaNet's top block for a bottom-up network's last stage."""
    return LastLevelP6P7(bottom_up.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
