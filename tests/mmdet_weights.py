"""Random weights as mmdetection writes them."""

import torch
from toys import TOY

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# The toy widths of tests/toys.py, where mmdetection's generator below has to follow them.
STEM, RES2, FPN, FC, MASK = 16, 32, 64, 32, 16
SMALL = [*TOY, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NUM_CONVS", 2]


def mmdet_state(
    depth=50, groups=1, width=2, classes=10, bfp=None, pafpn=False, kind="faster", anchors=3
):
    """Random weights under mmdetection's names, shaped as it shapes them.

    ``kind``: faster, mask, fast, cascade, cascade mask or retinanet.
    """
    generator = torch.Generator().manual_seed(0)
    state = {}

    def conv(name, out, into, size, bias=False):
        state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=generator) * 0.1
        if bias:
            state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def fc(name, out, into):
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name, channels):
        for field in ("weight", "bias", "running_mean"):
            state[f"{name}.{field}"] = torch.randn(channels, generator=generator) * 0.1
        state[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("backbone.conv1", STEM, 3, 7)
    norm("backbone.bn1", STEM)
    into, out, bottleneck = STEM, RES2, groups * width
    for layer, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            name = f"backbone.layer{layer}.{block}"
            if block == 0:
                conv(f"{name}.downsample.0", out, into, 1)
                norm(f"{name}.downsample.1", out)
            conv(f"{name}.conv1", bottleneck, into, 1)
            conv(f"{name}.conv2", bottleneck, bottleneck // groups, 3)
            conv(f"{name}.conv3", out, bottleneck, 1)
            for j, channels in ((1, bottleneck), (2, bottleneck), (3, out)):
                norm(f"{name}.bn{j}", channels)
            into = out
        out, bottleneck = 2 * out, 2 * bottleneck

    is_retinanet = kind == "retinanet"
    neck = "neck.0" if bfp else "neck"
    channels = [RES2 * 2**i for i in range(4)][1 if is_retinanet else 0 :]
    for i, c in enumerate(channels):
        conv(f"{neck}.lateral_convs.{i}.conv", FPN, c, 1, bias=True)
        conv(f"{neck}.fpn_convs.{i}.conv", FPN, FPN, 3, bias=True)
        if pafpn and i > 0:
            conv(f"{neck}.downsample_convs.{i - 1}.conv", FPN, FPN, 3, bias=True)
            conv(f"{neck}.pafpn_convs.{i - 1}.conv", FPN, FPN, 3, bias=True)
    if is_retinanet:
        conv(f"{neck}.fpn_convs.3.conv", FPN, channels[-1], 3, bias=True)
        conv(f"{neck}.fpn_convs.4.conv", FPN, FPN, 3, bias=True)
    if bfp == "non_local":
        for part in ("g", "theta", "phi", "conv_out"):
            conv(f"neck.1.refine.{part}.conv", FPN, FPN, 1, bias=True)
    elif bfp == "conv":
        conv("neck.1.refine.conv", FPN, FPN, 3, bias=True)

    if is_retinanet:
        for i in range(2):
            conv(f"bbox_head.cls_convs.{i}.conv", FPN, FPN, 3, bias=True)
            conv(f"bbox_head.reg_convs.{i}.conv", FPN, FPN, 3, bias=True)
        conv("bbox_head.retina_cls", anchors * classes, FPN, 3, bias=True)
        conv("bbox_head.retina_reg", anchors * 4, FPN, 3, bias=True)
        return state
    if kind != "fast":
        conv("rpn_head.rpn_conv", FPN, FPN, 3, bias=True)
        conv("rpn_head.rpn_cls", 3, FPN, 1, bias=True)
        conv("rpn_head.rpn_reg", 12, FPN, 1, bias=True)
    is_cascade = "cascade" in kind
    for stage in [f".{i}" for i in range(3)] if is_cascade else [""]:
        head = f"roi_head.bbox_head{stage}"
        fc(f"{head}.fc_cls", classes + 1, FC)
        fc(f"{head}.fc_reg", 4 if is_cascade else 4 * classes, FC)
        fc(f"{head}.shared_fcs.0", FC, FPN * 49)
        fc(f"{head}.shared_fcs.1", FC, FC)
        if "mask" in kind:
            head = f"roi_head.mask_head{stage}"
            for i in range(4):
                conv(f"{head}.convs.{i}.conv", MASK, FPN if i == 0 else MASK, 3, bias=True)
            conv(f"{head}.upsample", MASK, MASK, 2, bias=True)
            conv(f"{head}.conv_logits", classes, MASK, 1, bias=True)
    return state


# Each shipped config for converted weights, and what its weights are made of.
