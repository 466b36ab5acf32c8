"""Backbones: the balanced feature pyramid around any other, and a small ResNet for the CPU."""

from functools import partial
from itertools import pairwise

from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import Tensor

from libra_d2.config import choose
from libra_d2.layers import BalancedFeaturePyramid

from .pyramids import build_pyramid, p6p7_from

__all__ = [
    "build_bfp_backbone",
    "build_retinanet_small_resnet_fpn_backbone",
    "build_small_resnet_fpn_backbone",
]


@BACKBONE_REGISTRY.register()
def build_bfp_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """A feature pyramid whose levels are balanced (Libra R-CNN, section 3.2).

    The pyramid comes from the registered builder named in ``MODEL.BFP.FPN_BUILDER`` and keeps its
    class and the names of its weights, so that checkpoints of the plain model load; only the
    balancing layers are new, as its child ``bfp``.

    Raises:
        ValueError: if the builder does not exist or the levels do not fit ``MODEL.BFP``.
    """
    options = cfg.MODEL.BFP
    builders = {name: b for name, b in BACKBONE_REGISTRY if b is not build_bfp_backbone}
    build = choose("MODEL.BFP.FPN_BUILDER", cfg, builders)
    pyramid = build(cfg, input_shape)
    shapes = pyramid.output_shape()
    names = sorted(shapes, key=lambda name: shapes[name].stride)  # finest first
    if options.IN_FEATURES:
        chosen = [name for name in names if name in options.IN_FEATURES]
        if chosen != list(options.IN_FEATURES):
            raise ValueError(
                "MODEL.BFP.IN_FEATURES must be some of "
                f"{', '.join(names)}, in this order; got {', '.join(options.IN_FEATURES)}"
            )
        names = chosen
    channels = {name: shapes[name].channels for name in names}
    if len(set(channels.values())) != 1:
        raise ValueError(
            f"the levels of MODEL.BFP.IN_FEATURES must have the same channels, got {channels}"
        )
    if not 0 <= options.REFINE_LEVEL < len(names):
        raise ValueError(
            f"MODEL.BFP.REFINE_LEVEL must be in [0, {len(names) - 1}], an index into the levels "
            f"{', '.join(names)}; got {options.REFINE_LEVEL}"
        )
    return add_bfp(
        pyramid,
        names,
        BalancedFeaturePyramid(
            in_channels=channels[names[0]],
            num_levels=len(names),
            refine_level=options.REFINE_LEVEL,
            refine_type=options.REFINE_TYPE,
            norm=partial(get_norm, options.NORM) if options.NORM else "",
        ),
    )


def add_bfp(pyramid: Backbone, names: list[str], bfp: BalancedFeaturePyramid) -> Backbone:
    """Makes a backbone balance its levels ``names``, finest first, after every forward pass."""
    pyramid.add_module("bfp", bfp)
    pyramid.register_forward_hook(partial(_balance, names))
    return pyramid


def _balance(
    names: list[str], pyramid: Backbone, args: tuple, features: dict[str, Tensor]
) -> dict[str, Tensor]:
    balanced = pyramid.bfp([features[name] for name in names])
    return {**features, **dict(zip(names, balanced, strict=True))}


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
