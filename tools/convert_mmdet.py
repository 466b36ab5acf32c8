#!/usr/bin/env python
"""Converts weights of mmdetection (2.0 or later) so that they run here, to the last bit.

python tools/convert_mmdet.py IN.pth OUT.pth                 # picks the config by what it finds
python tools/convert_mmdet.py IN.pth OUT.safetensors --config-file configs/....yaml [--opts ...]

Beside OUT it writes OUT's name with .yaml, the complete config, which names OUT as its weights, and
with .classes.json, if the file knows its classes. Then, for instance:

python train_net.py --eval-only --config-file OUT.yaml
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

import libra_d2.modeling  # noqa: F401  (imported to register)
from libra_d2.checkpoint import (
    check_output,
    convert_mmdet_state_dict,
    read_weights,
    write_weights,
    write_whole,
)
from libra_d2.engine import load_config
from libra_d2.engine.run import one_sentence_errors

LISTED = 5  # layers that a message names


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="mmdetection's file")
    parser.add_argument("output", help="file to write: .pth or .safetensors")
    parser.add_argument("--config-file", default="auto", help="config of the model, or auto")
    parser.add_argument("--config", dest="config_file", help=argparse.SUPPRESS)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config overrides, KEY VALUE ..."
    )
    return parser


def read_checkpoint(path: str) -> tuple[dict[str, Tensor], dict]:
    """State dict and meta of mmdetection's file.

    Raises:
        ValueError: if it is none, or of a version before 2.0.
    """
    content = read_weights(path)
    meta = content.get("meta") or {}
    state_dict = content.get("state_dict", content.get("model", content))
    if not isinstance(meta, dict):
        meta = {}
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(f"'{path}' has no state_dict")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"'{path}' has no state_dict of tensors by name: see '{name}'")
    version = str(meta.get("mmdet_version", "2.0"))
    if version.split(".")[0] in ("0", "1"):
        raise ValueError(
            f"'{path}' is of mmdetection {version}; before 2.0 background was the first class and "
            "boxes were a pixel wider. Convert it with mmdetection's upgrade_model_version.py first"
        )
    return state_dict, meta


def choose_config(state: dict[str, Tensor], meta: dict) -> Path:
    """The shipped config for a model, by the layers it has; PISA by the name in its meta.

    Args:
        state: detectron2's names.
        meta: mmdetection's.

    Raises:
        ValueError: if none is shipped; it says what was found.
    """
    for part, kind in (("cls_score.bias", "detector"), ("bottom_up.res2.0.conv2.weight", "ResNet")):
        if not any(name.endswith(part) for name in state):
            raise ValueError(
                f"there is no config for weights without {part}, which are of no {kind}; give "
                "--config-file"
            )
    has = lambda part: any(part in name for name in state)  # noqa: E731
    name = "retinanet" if has("head.cls_subnet") else "mask_rcnn" if has(".mask_head") else "rcnn"
    if has("roi_heads.box_head.0."):
        name = f"cascade_{name}"
    elif name == "rcnn":
        name = "faster_rcnn" if has("proposal_generator") else "fast_rcnn"
    name = ("pafpn_" if has("pafpn") else "") + name
    if has("backbone.bfp."):
        name = ("balanced_" if has("pafpn") else "libra_") + name
    elif "isr" in str(meta.get("config", "")) or "pisa" in str(meta.get("config", "")).lower():
        name = f"pisa_{name}"
    kernel = state["backbone.bottom_up.res2.0.conv2.weight"].shape
    depth = {6: 50, 23: 101}.get(
        len({m[1] for m in (re.search(r"res4\.(\d+)\.", n) for n in state) if m}), "?"
    )
    kind = (
        f"R_{depth}"
        if kernel[1] == kernel[0]
        else f"X_{depth}_{kernel[0] // kernel[1]}x{kernel[1]}d"
    )
    stem = f"{name}_{kind}_FPN_1x_mmdet"
    found = list((ROOT / "configs").rglob(f"{stem}.yaml"))
    if not found:
        raise ValueError(
            f"there is no config {stem}.yaml, as these weights would need; give --config-file, and "
            "overrides, for a model of their shape"
        )
    return found[0]


def count_classes(state: dict[str, Tensor]) -> dict[str, int]:
    """The config keys of the number of classes, and it, from the last layers."""
    for name, value in state.items():
        if re.fullmatch(r"roi_heads\.box_predictor\.(?:\d\.)?cls_score\.bias", name):
            return {"MODEL.ROI_HEADS.NUM_CLASSES": len(value) - 1}
    if "head.cls_score.bias" not in state:  # of an RPN alone
        return {}
    num_anchors = len(state["head.bbox_pred.bias"]) // 4
    return {"MODEL.RETINANET.NUM_CLASSES": len(state["head.cls_score.bias"]) // num_anchors}


def check_fit(state: dict[str, Tensor], cfg: CfgNode) -> None:
    """Checks every name and shape against the model of a config.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    own = {
        name: value.shape
        for name, value in build_model(cfg).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name])}"
        for name in own
        if name in state and state[name].shape != own[name]
    ]
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": other,
    }
    if any(problems.values()):
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:LISTED])}{', ...' * (len(names) > LISTED)})"
            for kind, names in problems.items()
            if names
        ]
        raise ValueError(f"the weights do not fit the config's model: {'; '.join(parts)}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        stem = Path(args.output).with_suffix("")
        sides = {"config": f"{stem}.yaml", "classes": f"{stem}.classes.json"}
        check_output(args.output, args.overwrite)
        existing = [path for path in sides.values() if Path(path).exists()]
        if existing and not args.overwrite:
            raise ValueError(f"'{existing[0]}' exists; give --overwrite to replace it")
        if Path(args.input).resolve() == Path(args.output).resolve():
            raise ValueError(f"'{args.input}' would replace itself; give another output")
        state_dict, meta = read_checkpoint(args.input)
        state = convert_mmdet_state_dict(state_dict)
        file = args.config_file
        file = str(choose_config(state, meta)) if file == "auto" else file
        opts = [str(part) for item in count_classes(state).items() for part in item]
        weights = ["MODEL.WEIGHTS", str(Path(args.output).resolve())]
        cfg = load_config(file, ["MODEL.DEVICE", "cpu", *opts, *args.opts, *weights])
        check_fit(state, cfg)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "auto"
        classes = meta.get("CLASSES") or (meta.get("dataset_meta") or {}).get("classes")
        write_weights(args.output, state, {"source": Path(args.input).name}, args.overwrite)
        write_whole(sides["config"], lambda path: Path(path).write_text(cfg.dump()))
        if classes:
            names = json.dumps([str(name) for name in classes], indent=1)
            write_whole(sides["classes"], lambda path: Path(path).write_text(names))
    print(f"wrote {args.output}; evaluate it with")
    print(f"  python train_net.py --eval-only --config-file {sides['config']}")


if __name__ == "__main__":
    main()
