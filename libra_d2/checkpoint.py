"""Weights from mmdetection, under detectron2's names; and files of weights, read without risk.

Layers agree one to one; only RetinaNet's anchors come in another order. What has no counterpart is
refused, never dropped silently.
"""

import errno
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["convert_mmdet_state_dict", "read_weights", "write_weights"]

_RESNET = "backbone.bottom_up"
_RPN = "proposal_generator.rpn_head"
_ROI = "roi_heads"
_NUM_RATIOS = 3  # aspect ratios of RetinaNet's anchors, in both

# mmdetection's name as a regular expression, and detectron2's. {level} counts pyramid levels.
_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.conv1\.(weight)", _RESNET + ".stem.conv1.{1}"),
    (r"backbone\.bn1\.(\w+)", _RESNET + ".stem.conv1.norm.{1}"),
    (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.(weight)", _RESNET + ".res{1+1}.{2}.conv{3}.{4}"),
    (r"backbone\.layer(\d)\.(\d+)\.bn(\d)\.(\w+)", _RESNET + ".res{1+1}.{2}.conv{3}.norm.{4}"),
    (r"backbone\.layer(\d)\.0\.downsample\.0\.(weight)", _RESNET + ".res{1+1}.0.shortcut.{2}"),
    (r"backbone\.layer(\d)\.0\.downsample\.1\.(\w+)", _RESNET + ".res{1+1}.0.shortcut.norm.{2}"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", "backbone.fpn_lateral{1+level}.{2}"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", "backbone.fpn_output{1+level}.{2}"),
    (r"neck\.downsample_convs\.(\d+)\.conv\.(\w+)", "backbone.pafpn_downsample{1+level+1}.{2}"),
    (r"neck\.pafpn_convs\.(\d+)\.conv\.(\w+)", "backbone.pafpn_output{1+level+1}.{2}"),
    (r"bfp\.refine\.(theta|phi|g|conv_out)\.conv\.(\w+)", "backbone.bfp.refine.{1}.{2}"),
    (r"bfp\.refine\.conv\.(\w+)", "backbone.bfp.refine.conv.{1}"),
    (r"bfp\.refine\.bn\.(\w+)", "backbone.bfp.refine.norm.{1}"),
    (r"rpn_head\.rpn_conv\.(\w+)", _RPN + ".conv.{1}"),
    (r"rpn_head\.rpn_cls\.(\w+)", _RPN + ".objectness_logits.{1}"),
    (r"rpn_head\.rpn_reg\.(\w+)", _RPN + ".anchor_deltas.{1}"),
    (r"roi_head\.bbox_head\.((?:\d\.)?)shared_fcs\.(\d)\.(\w+)", _ROI + ".box_head.{1}fc{2+1}.{3}"),
    (r"roi_head\.bbox_head\.((?:\d\.)?)fc_cls\.(\w+)", _ROI + ".box_predictor.{1}cls_score.{2}"),
    (r"roi_head\.bbox_head\.((?:\d\.)?)fc_reg\.(\w+)", _ROI + ".box_predictor.{1}bbox_pred.{2}"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(\w+)", _ROI + ".mask_head.mask_fcn{1+1}.{2}"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", _ROI + ".mask_head.deconv.{1}"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", _ROI + ".mask_head.predictor.{1}"),
    (
        r"roi_head\.mask_head\.(\d)\.convs\.(\d+)\.conv\.(\w+)",
        _ROI + ".mask_head.stages.{1}.mask_fcn{2+1}.{3}",
    ),
    (r"roi_head\.mask_head\.(\d)\.upsample\.(\w+)", _ROI + ".mask_head.stages.{1}.deconv.{2}"),
    (
        r"roi_head\.mask_head\.(\d)\.conv_logits\.(\w+)",
        _ROI + ".mask_head.stages.{1}.predictor.{2}",
    ),
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)", "head.cls_subnet.{1*2}.{2}"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)", "head.bbox_subnet.{1*2}.{2}"),
    (r"bbox_head\.retina_cls\.(\w+)", "head.cls_score.{1}"),
    (r"bbox_head\.retina_reg\.(\w+)", "head.bbox_pred.{1}"),
)
_DROPPED = re.compile(r".*\.num_batches_tracked|data_preprocessor\..*")


def convert_mmdet_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of an mmdetection model, version 2.0 or later, for detectron2.

    Faster, Mask, Cascade (Mask) and Fast R-CNN and RetinaNet; on ResNet or ResNeXt; with FPN or
    PAFPN, and BFP around it.

    Args:
        state_dict: mmdetection's names, to tensors.

    Returns:
        detectron2's names, to the same tensors; those of RetinaNet's two output layers reordered.

    Raises:
        ValueError: if it is of an earlier version or another kind of model; it names a layer.
    """
    names = list(state_dict)
    if any(
        name.startswith("bbox_head.fc_") or name.startswith("bbox_head.0.fc_") for name in names
    ):
        raise ValueError(
            "these weights are of mmdetection before 2.0, where background is the first class and "
            "boxes are a pixel wider; convert them with mmdetection's own upgrade_model_version.py "
            "first"
        )
    is_retinanet = any(name.startswith("bbox_head.retina_") for name in names)
    num_laterals = len({m[1] for m in _matches(r"neck(?:\.0)?\.lateral_convs\.(\d+)\.", names)})
    converted = {}
    for name, value in state_dict.items():
        if _DROPPED.fullmatch(name):
            continue
        new = _rename(name, num_laterals, level=3 if is_retinanet else 2)
        converted[new] = _reorder_anchors(new, value, state_dict) if is_retinanet else value
    return converted


def _matches(pattern: str, names: Iterable[str]) -> list[re.Match]:
    return [match for match in (re.match(pattern, name) for name in names) if match]


def _rename(name: str, num_laterals: int, level: int) -> str:
    """detectron2's name; ``level`` is that of the finest level of the pyramid."""
    plain = re.sub(r"^neck\.1\.refine\.", "bfp.refine.", re.sub(r"^neck\.0\.", "neck.", name))
    # Convolutions beyond those of the laterals make further levels.
    extra = re.fullmatch(r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", plain)
    if extra and num_laterals <= int(extra[1]) < num_laterals + 2:
        return f"backbone.top_block.p{6 + int(extra[1]) - num_laterals}.{extra[2]}"
    for pattern, new in _RULES:
        match = re.fullmatch(pattern, plain)
        if match:
            return re.sub(r"\{([^}]+)\}", partial(_fill, match=match, level=level), new)
    raise ValueError(
        f"layer '{name}' has no counterpart here: supported are mmdetection's Faster, Mask, "
        "Cascade and Fast R-CNN and RetinaNet, on ResNet or ResNeXt with FPN, PAFPN and BFP"
    )


def _fill(field: re.Match, match: re.Match, level: int) -> str:
    """A field of a rule: a group of the match, doubled or with numbers and the level added."""
    field = field[1]
    if field.endswith("*2"):
        return str(2 * int(match[int(field[0])]))
    group, *terms = field.split("+")
    if not terms:
        return match[int(group)]
    return str(
        int(match[int(group)]) + sum(level if term == "level" else int(term) for term in terms)
    )


def _reorder_anchors(name: str, value: Tensor, state_dict: dict[str, Tensor]) -> Tensor:
    """The outputs of RetinaNet's head, from ratio-major anchors to detectron2's scale-major."""
    if not name.startswith(("head.cls_score.", "head.bbox_pred.")):
        return value
    num_anchors = state_dict["bbox_head.retina_reg.weight"].shape[0] // 4
    if num_anchors % _NUM_RATIOS or len(value) % num_anchors:
        raise ValueError(
            f"layer '{name}' has {len(value)} outputs for {num_anchors} anchors; anchors must have "
            f"{_NUM_RATIOS} aspect ratios"
        )
    scales = num_anchors // _NUM_RATIOS
    blocks = value.unflatten(0, (_NUM_RATIOS, scales, len(value) // num_anchors))
    return blocks.transpose(0, 1).flatten(0, 2).contiguous()


def read_weights(path: str) -> dict:
    """Reads a file of weights without running code that it may hold.

    Args:
        path: ``.safetensors``, or what ``torch.save`` has written.

    Returns:
        The content: a dict; for ``.safetensors`` ``{"model": tensors by name, "meta": strings}``.

    Raises:
        ValueError: if the file is missing, no such file, damaged, or needs code to be run.
    """
    if not os.path.isfile(path):
        raise ValueError(f"'{path}' does not exist or is not a file")
    if path.endswith(".safetensors"):
        from safetensors import safe_open
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return {"model": tensors, "meta": file.metadata() or {}}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        message = " ".join(str(error).split())
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", message)
        if found:
            raise ValueError(
                f"'{path}' holds more than weights ({found[1]}), which could run any code when "
                "read; save its state_dict alone, where you trust it"
            ) from None
        raise ValueError(f"'{path}' is damaged or no file of weights") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a dict of weights")
    return content


def write_weights(
    path: str, tensors: dict[str, Tensor], meta: dict[str, str], overwrite: bool = False
) -> None:
    """Writes tensors by name and strings about them; the file appears whole or not at all.

    Args:
        path: ``.safetensors`` or ``.pth``, which detectron2's checkpointer reads.
        tensors: weights by name.
        meta: strings by name.
        overwrite: whether a file of this name may be replaced.

    Raises:
        ValueError: if there is such a file, or the name ends otherwise.
    """
    check_output(path, overwrite)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(file: str) -> None:
        if path.endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, meta)
        else:
            torch.save({"model": tensors, "meta": meta}, file)

    write_whole(path, write)


def check_output(path: str, overwrite: bool) -> None:
    """Raises ``ValueError`` unless weights can be written to a file of this name."""
    if not path.endswith((".pth", ".safetensors")):
        raise ValueError(f"the output must end in .pth or .safetensors, got '{path}'")
    refuse_existing(path, overwrite)


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raises ``ValueError`` if a file to write is there and may not be replaced, or is a folder."""
    if os.path.isdir(path):
        raise ValueError(f"'{path}' is a folder; give the name of a file")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"'{path}' exists; give --overwrite to replace it")


def is_disk_full(error: OSError) -> bool:
    """Whether it tells that a disk, or what one may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: str, write: Callable[[str], None]) -> None:
    """Lets ``write`` write beside ``path`` and moves the outcome there, for all to read.

    Whatever ends the program or the machine, under ``path`` is what was there or the whole new
    file.

    Raises:
        ValueError: if it can't be written.
    """
    beside = f"{path}.partial"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # safetensors' are for the owner alone
        os.replace(beside, path)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise ValueError(f"'{path}' cannot be written: {error.strerror or error}") from error
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
