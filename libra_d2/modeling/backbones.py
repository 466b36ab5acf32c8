"""Backbones: the balanced feature pyramid around any other, and a small ResNet for the CPU."""

from functools import partial
from itertools import pairwise

from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from libra_d2.config import choose
from libra_d2.layers import BalancedFeaturePyramid

from .balanced_pyramid import BalancedPyramid, levels_to_balance
from .pyramids import PAFPN, build_pyramid, p6p7_from
from .switches import naming_keys

__all__ = [
    "build_bfp_backbone",
    "build_retinanet_small_resnet_fpn_backbone",
    "build_small_resnet_fpn_backbone",
]


@BACKBONE_REGISTRY.register()
def build_bfp_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """A feature pyramid whose levels are balanced (Libra R-CNN, section 3.2).

    The pyramid comes from the registered builder named in ``MODEL.BFP.FPN_BUILDER``; with
    ``MODEL.BFP.ENABLED`` False it stays as it is.

    Raises:
        ValueError: if the builder does not exist or the levels do not fit ``MODEL.BFP``.
    """
    options = cfg.MODEL.BFP
    builders = {name: b for name, b in BACKBONE_REGISTRY if b is not build_bfp_backbone}
    pyramid = choose("MODEL.BFP.FPN_BUILDER", cfg, builders)(cfg, input_shape)
    if not options.ENABLED:
        return pyramid
    with naming_keys(cfg, "MODEL.BFP"):
        names = levels_to_balance(pyramid, options.IN_FEATURES)
        bfp = BalancedFeaturePyramid(
            in_channels=pyramid.output_shape()[names[0]].channels,
            num_levels=len(names),
            refine_level=options.REFINE_LEVEL,
            refine_type=options.REFINE_TYPE,
            norm=partial(get_norm, options.NORM) if options.NORM else "",
        )
        return BalancedPyramid(pyramid, bfp, options.IN_FEATURES)


@BACKBONE_REGISTRY.register()
def build_small_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """FPN (P2..P6) on a ResNet of one basic block a stage, for training from scratch on a CPU.

    Reads ``MODEL.SMALL_RESNET``, ``MODEL.FPN`` and, of ``MODEL.RESNETS``, NORM and
    STEM_OUT_CHANNELS.

    Raises:
        ValueError: if the widths are not four, or two in a row are the same.
    """
    return build_pyramid(cfg, _build_small_resnet(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_small_resnet_pafpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """The same with PAFPN.

    Raises:
        ValueError: if the widths are not four, or two in a row are the same.
    """
    return build_pyramid(cfg, _build_small_resnet(cfg, input_shape), LastLevelMaxPool(), kind=PAFPN)


@BACKBONE_REGISTRY.register()
def build_retinanet_small_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """The same with RetinaNet's P6 and P7, made from the last stage.

    Raises:
        ValueError: if the widths are not four, or two in a row are the same.
    """
    bottom_up = _build_small_resnet(cfg, input_shape)
    return build_pyramid(cfg, bottom_up, p6p7_from(bottom_up, cfg))


def _build_small_resnet(cfg, input_shape: ShapeSpec) -> ResNet:
    widths = cfg.MODEL.SMALL_RESNET.OUT_CHANNELS
    if len(widths) != 4 or any(a == b for a, b in pairwise(widths)):
        # detectron2's basic block has no convolution on its shortcut if its channels stay.
        raise ValueError(
            "MODEL.SMALL_RESNET.OUT_CHANNELS must be four numbers, each other than the one before, "
            f"got {widths}"
        )
    norm = cfg.MODEL.RESNETS.NORM
    in_channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=in_channels, norm=norm)
    stages = []
    for i, out_channels in enumerate(widths):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks=1,
                in_channels=in_channels,
                out_channels=out_channels,
                stride_per_block=[1 if i == 0 else 2],
                norm=norm,
            )
        )
        in_channels = out_channels
    return ResNet(
        stem, stages, out_features=cfg.MODEL.FPN.IN_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
