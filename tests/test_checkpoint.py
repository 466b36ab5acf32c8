"""Weights from mmdetection: names, order, shapes; files that are damaged, hostile or of others."""

import json
import os
import pickle
import sys

import pytest
import torch
from detectron2.modeling import build_model
from mmdet_weights import FPN, SMALL, mmdet_state
from toys import CONFIGS, make_inputs, run_tool

from libra_d2.checkpoint import convert_mmdet_state_dict, read_weights, write_weights
from libra_d2.engine import load_config

TOOLS = CONFIGS.parent / "tools"


def options_of(stem):
    options = {"kind": "faster"}
    for name in ("retinanet", "cascade_mask", "cascade", "mask", "fast_"):
        if name in stem:
            options["kind"] = name.replace("_", " ").strip()
            break
    if "X_101" in stem:
        options |= {"groups": 32 if "32x4d" in stem else 64, "width": 1}
    options["depth"] = 101 if "101" in stem else 50
    if "libra" in stem or "balanced" in stem:
        options["bfp"] = "non_local"
    return {**options, "pafpn": "pafpn" in stem}


SHIPPED = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*_mmdet.yaml"))


def load(config, state, *opts):
    """The model of a shipped config, small, with converted weights."""
    small = [*SMALL, *opts]
    if "X_101" in str(config):
        small += ["MODEL.RESNETS.WIDTH_PER_GROUP", 1]
    cfg = load_config(str(CONFIGS / config), list(map(str, small)))
    model = build_model(cfg).eval()
    incompatible = model.load_state_dict(convert_mmdet_state_dict(state), strict=False)
    assert incompatible.unexpected_keys == []
    assert all(n.endswith("num_batches_tracked") for n in incompatible.missing_keys)
    return model


class TestConversion:
    @pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
    def test_every_name_and_shape_fits(self, config):
        load(config, mmdet_state(**options_of(config.stem)))

    @pytest.mark.parametrize("classes", [1, 3, 80])
    def test_other_numbers_of_classes(self, classes):
        config = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_mmdet.yaml"
        state = mmdet_state(kind="mask", classes=classes)
        load(config, state, "MODEL.ROI_HEADS.NUM_CLASSES", classes)
        config = "COCO-Detection/retinanet_R_50_FPN_1x_mmdet.yaml"
        load(
            config,
            mmdet_state(kind="retinanet", classes=classes),
            "MODEL.RETINANET.NUM_CLASSES",
            classes,
        )

    def test_bfp_of_one_convolution(self):
        config = "COCO-Detection/libra_faster_rcnn_R_50_FPN_1x_mmdet.yaml"
        model = load(config, mmdet_state(bfp="conv"), "MODEL.BFP.REFINE_TYPE", "conv")
        assert model.backbone.bfp.refine.conv.weight.shape == (FPN, FPN, 3, 3)

    def test_no_tensor_is_lost_or_made_up(self):
        state = mmdet_state(kind="cascade mask", bfp="non_local", pafpn=True)
        converted = convert_mmdet_state_dict(state)
        kept = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
        assert len(converted) == len(kept)
        assert {id(v) for v in converted.values()} == {id(v) for v in kept.values()}

    @torch.no_grad()
    def test_retinanets_anchors_come_in_detectron2s_order(self):
        """mmdetection: block 3 * ratio + scale; detectron2: 3 * scale + ratio."""
        state = mmdet_state(kind="retinanet", anchors=9, classes=5)
        sizes = [[s, 1.26 * s, 1.587 * s] for s in (32, 64, 128, 256, 512)]
        config = "COCO-Detection/retinanet_R_50_FPN_1x_mmdet.yaml"
        opts = ["MODEL.ANCHOR_GENERATOR.SIZES", sizes, "MODEL.RETINANET.NUM_CLASSES", 5]
        model = load(config, state, *opts)
        x = torch.randn(1, FPN, 4, 4)
        for ours, theirs, k in (("cls_score", "retina_cls", 5), ("bbox_pred", "retina_reg", 4)):
            expected = torch.nn.functional.conv2d(
                x, state[f"bbox_head.{theirs}.weight"], state[f"bbox_head.{theirs}.bias"], padding=1
            )
            got = getattr(model.head, ours)(x)
            for ratio in range(3):
                for scale in range(3):
                    here, there = 3 * scale + ratio, 3 * ratio + scale
                    torch.testing.assert_close(
                        got[:, here * k : here * k + k], expected[:, there * k : there * k + k]
                    )

    @torch.no_grad()
    def test_features_are_those_of_the_named_layers(self):
        """A stem and a lateral, from mmdetection's tensors by hand."""
        state = mmdet_state()
        model = load("COCO-Detection/faster_rcnn_R_50_FPN_1x_mmdet.yaml", state)
        image = torch.randn(1, 3, 64, 64)
        F = torch.nn.functional
        x = F.conv2d(image, state["backbone.conv1.weight"], stride=2, padding=3)
        stats = [
            state[f"backbone.bn1.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        ]
        x = F.max_pool2d(F.relu(F.batch_norm(x, *stats)), 3, 2, 1)
        torch.testing.assert_close(model.backbone.bottom_up.stem(image), x)

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("bbox_head.fc_cls.weight", "mmdetection before 2.0, where background is the first"),
            ("backbone.features.0.weight", "layer 'backbone.features.0.weight' has no counterpart"),
            ("roi_head.semantic_head.convs.0.conv.weight", "has no counterpart here"),
            ("backbone.layer1.0.conv2.conv_offset.weight", "has no counterpart here"),
        ],
    )
    def test_what_has_no_counterpart_is_refused(self, name, match):
        state = {**mmdet_state(), name: torch.zeros(3)}
        with pytest.raises(ValueError, match=match):
            convert_mmdet_state_dict(state)

    @torch.no_grad()
    def test_a_mask_head_a_stage_averages_probabilities(self):
        config = "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_1x_mmdet.yaml"
        head = load(config, mmdet_state(kind="cascade mask")).roi_heads.mask_head
        x = torch.randn(2, FPN, 14, 14)
        expected = torch.stack([stage.layers(x).sigmoid() for stage in head.stages]).mean(0)
        torch.testing.assert_close(head.layers(x).sigmoid(), expected)
        assert len(head.stages) == 3


class TestFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_round_trip(self, suffix, tmp_path):
        path = str(tmp_path / f"weights{suffix}")
        tensors = {"a.weight": torch.randn(3, 4).t(), "b": torch.tensor(7)}
        write_weights(path, tensors, {"source": "test"})
        content = read_weights(path)
        torch.testing.assert_close(
            content["model"], {k: v.contiguous() for k, v in tensors.items()}
        )
        assert content["meta"]["source"] == "test"
        assert [f.name for f in tmp_path.iterdir()] == [f"weights{suffix}"]

    def test_nothing_is_replaced_unasked(self, tmp_path):
        path = tmp_path / "weights.pth"
        path.write_text("mine")
        with pytest.raises(ValueError, match="exists; give --overwrite"):
            write_weights(str(path), {}, {})
        assert path.read_text() == "mine"
        (tmp_path / "folder.pth").mkdir()
        with pytest.raises(ValueError, match="folder.pth' is a folder; give the name of a file"):
            write_weights(str(tmp_path / "folder.pth"), {}, {}, overwrite=True)
        write_weights(str(path), {"a": torch.ones(1)}, {}, overwrite=True)
        assert read_weights(str(path))["model"]["a"] == 1

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04", b"{}"])
    def test_damaged(self, suffix, content, tmp_path):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or no file of weights|holds more than"):
            read_weights(str(path))

    def test_truncated(self, tmp_path):
        write_weights(str(tmp_path / "a.pth"), {"a": torch.zeros(10000)}, {})
        whole = (tmp_path / "a.pth").read_bytes()
        (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="is damaged"):
            read_weights(str(tmp_path / "a.pth"))

    def test_code_is_not_run(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({"state_dict": {}, "meta": Hostile()}, tmp_path / "hostile.pth")
        with pytest.raises(ValueError, match="holds more than weights.*could run any code"):
            read_weights(str(tmp_path / "hostile.pth"))
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(ValueError, match="holds more than weights|is damaged"):
            read_weights(str(tmp_path / "plain.pth"))
        assert not (tmp_path / "ran").exists()


def convert(*args):
    return run_tool("convert_mmdet.py", *args)


class TestTool:
    CONFIG = ("--config-file", CONFIGS / "COCO-Detection/libra_faster_rcnn_R_50_FPN_1x_mmdet.yaml")

    def test_converts_evaluates_and_keeps_class_names(self, tmp_path):
        state = mmdet_state(bfp="non_local")
        meta = {"mmdet_version": "2.25.0", "CLASSES": tuple("abcdefghij")}
        torch.save({"state_dict": state, "meta": meta}, tmp_path / "in.pth")
        small = [opt for opt in SMALL if opt != "MODEL.WEIGHTS"]
        small.remove("")
        args = (tmp_path / "in.pth", tmp_path / "out.pth", *self.CONFIG, "--opts", *small)
        result = convert(*args)
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / "out.classes.json").read_text()) == list("abcdefghij")
        cfg = load_config(str(tmp_path / "out.yaml"))
        assert cfg.MODEL.WEIGHTS == str(tmp_path / "out.pth")
        model = build_model(cfg).eval()
        model.load_state_dict(read_weights(str(tmp_path / "out.pth"))["model"])
        expected = load(self.CONFIG[1], state)
        inputs = make_inputs((2,))
        with torch.no_grad():
            got, wanted = (m(inputs)[0]["instances"].pred_boxes.tensor for m in (model, expected))
        assert torch.equal(got, wanted)
        again = convert(*args)
        assert again.returncode == 2 and "exists; give --overwrite" in again.stderr

    def test_what_does_not_fit_is_named_and_nothing_written(self, tmp_path):
        torch.save({"state_dict": mmdet_state()}, tmp_path / "in.pth")
        result = convert(tmp_path / "in.pth", tmp_path / "out.pth", *self.CONFIG)
        message = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert "missing (backbone.bfp.refine" in message and "of another shape" in message
        assert [f.name for f in tmp_path.iterdir()] == ["in.pth"]

    def test_versions_before_2_are_refused(self, tmp_path):
        torch.save(
            {"state_dict": mmdet_state(), "meta": {"mmdet_version": "1.2.0"}}, tmp_path / "in.pth"
        )
        result = convert(tmp_path / "in.pth", tmp_path / "out.pth")
        assert result.returncode == 2 and "mmdetection 1.2.0; before 2.0" in result.stderr

    @pytest.mark.parametrize("lacks", ["bbox_head", "backbone"])
    def test_parts_of_a_detector(self, tmp_path, lacks):
        state = {k: v for k, v in mmdet_state().items() if lacks not in k}
        torch.save({"state_dict": state}, tmp_path / "in.pth")
        result = convert(tmp_path / "in.pth", tmp_path / "out.pth")
        assert result.returncode == 2 and "there is no config for weights without" in result.stderr

    def test_a_missing_file(self, tmp_path):
        result = convert(tmp_path / "no.pth", tmp_path / "out.pth")
        assert result.returncode == 2 and "no.pth' does not exist" in result.stderr


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    import convert_mmdet

    return convert_mmdet


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
def test_the_config_is_found_by_the_layers(config, tool):
    options = options_of(config.stem)
    state = convert_mmdet_state_dict(mmdet_state(**options))
    # What tells a ResNet from a ResNeXt, at its full width.
    groups = options.get("groups", 1)
    kernel = (64, 64, 3, 3) if groups == 1 else (groups * 4, 4, 3, 3)
    state["backbone.bottom_up.res2.0.conv2.weight"] = torch.zeros(kernel)
    meta = {"config": "isr=dict(k=2)"} if "pisa" in config.stem else {}
    assert tool.choose_config(state, meta).stem == config.stem


def test_a_model_without_a_config_is_named(tool):
    state = convert_mmdet_state_dict(mmdet_state(depth=101, kind="cascade mask", bfp="non_local"))
    with pytest.raises(ValueError, match="no config libra_cascade_mask_rcnn_.*give --config-file"):
        tool.choose_config(state, {})
