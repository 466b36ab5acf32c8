"""Exported detectors: they find what the model finds, and run without this project."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from test_export import BFP, SIZES, make_image, make_model
from toys import BASELINE, CONFIGS, LIBRA, run_tool, small_config

from libra_d2 import Detector
from libra_d2.deploy.agreement import EXACT, HALF, check_agreement, compare
from libra_d2.deploy.export import check_exportable, export_model, open_exported, smallest_side
from libra_d2.deploy.exportable import Exportable
from libra_d2.deploy.graph import DetectorGraph
from libra_d2.deploy.plain import make_plain

MASK = ("MODEL.MASK_ON", True)
KINDS = {
    "faster": ("faster", ()),
    "mask": ("faster", MASK),
    "cascade": ("cascade", MASK),
    "retinanet": ("retinanet", ()),
}


def detector(kind, *opts):
    name, own = KINDS[kind]
    return make_model(name, *own, *opts), Exportable(make_model(name, *own, *opts))


@pytest.mark.parametrize("format", ["onnx", "torchscript", "script"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_same(kind, format, tmp_path):
    model, reference = detector(kind)
    if (kind, format) == ("cascade", "script"):
        with pytest.raises(ValueError, match="a cascade cannot be scripted; the other formats"):
            export_model(model, tmp_path / "x", format=format, image=make_image((64, 64))[None])
        return
    batch = 1 if kind == "cascade" else 2
    images = [torch.stack([make_image(size), make_image(size) / 2])[:batch] for size in SIZES]
    file = tmp_path / "model"
    export_model(model, file, format=format, image=images[0])
    assert not model.training
    exported = open_exported(file, format)
    report = check_agreement(reference.eval(), exported, images, EXACT, 0.05)
    assert [(e["height"], e["width"]) for e in report] == list(SIZES)
    assert all(e["objects"] > 0 for e in report)


@pytest.mark.parametrize(
    ("kind", "opts"),
    [
        *((kind, ()) for kind in KINDS),
        ("retinanet", ("MODEL.RETINANET.CLIP_BOXES", "before_nms")),
        ("faster", ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)),
        ("faster", ("TEST.DETECTIONS_PER_IMAGE", -1)),
        ("faster", ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)),
    ],
)
def test_the_graph_of_it_finds_the_same(kind, opts):
    model, reference = detector(kind, *opts)
    graph, black = DetectorGraph(model).eval(), torch.zeros(1, 3, 160, 160)
    images = [torch.stack([make_image(size), make_image(size) / 2]) for size in SIZES]
    with torch.no_grad():
        for image in (*images, black):
            expected, got = reference.eval()(image), graph(image)
            assert len(expected) == len(got)
            for one, other in zip(expected, got, strict=True):
                assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("kind", ["mask", "cascade", "retinanet"])
def test_torch_export(kind, tmp_path):
    model, reference = detector(kind)
    least = smallest_side(model, "torch-export")
    assert least == (129 if kind == "retinanet" else 65)
    images = [make_image(size)[None] for size in ((least + 64, 320), (288, 160), (least, least))]
    # So high a threshold that nothing is found in one of them.
    with torch.no_grad():
        lowest = min(reference.eval()(image)[1].max().item() for image in images)
    heads = model if kind == "retinanet" else model.roi_heads.box_predictor
    for head in heads if kind == "cascade" else [heads]:
        head.test_score_thresh = lowest
    file = tmp_path / "model.pt2"
    export_model(model, file, format="torch-export", image=images[0])
    exported = open_exported(file, "torch-export")
    report = check_agreement(Exportable(model).eval(), exported, images, EXACT, lowest)
    assert min(e["objects"] for e in report) == 0
    with pytest.raises(AssertionError, match="Guard failed"):
        exported(make_image((least - 1, 320))[None])


def test_what_torch_export_can_not_take(tmp_path, capsys):
    class Deciding(torch.nn.Module):
        size_divisibility, padding_constraints = 32, {}

        def forward(self, x):
            return {} if x.sum() > 0 else {"p2": x}

    model = make_model("faster")
    model.backbone = Deciding()
    with pytest.raises(ValueError, match="^torch.export can't take this model; onnx and .* may: "):
        export_model(model, tmp_path / "x", format="torch-export", image=make_image((96, 96))[None])
    assert not list(tmp_path.iterdir()) and "def forward" not in capsys.readouterr().err


def test_torch_export_needs_bounds_of_sizes(monkeypatch):
    """Which torch 2.6 has not."""
    monkeypatch.setattr(torch.export.Dim, "AUTO", object())
    check_exportable(make_model("faster"), "onnx")
    with pytest.raises(ValueError, match=r"^format torch-export needs torch 2\.7 or later"):
        check_exportable(make_model("faster"), "torch-export")


@pytest.mark.parametrize(
    ("kind", "format"),
    [("retinanet", "onnx"), ("retinanet", "torchscript"), ("cascade", "torchscript")],
)
def test_in_half_precision(kind, format, tmp_path):
    model, reference = detector(kind)
    image = make_image(SIZES[0])[None]
    export_model(model, tmp_path / "model", format=format, image=image, half=True)
    with torch.no_grad():
        got = open_exported(tmp_path / "model", format)(image)
        expected = reference.eval()(image)
    assert got[0].dtype == torch.float32
    assert len(got[0]) != len(expected[0]) or not torch.equal(got[0], expected[0])
    assert compare(expected, got, HALF, 0.05)[1] == ""


@pytest.mark.parametrize("refine", ["non_local", "conv", "none"])
@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_a_plain_one_computes_the_same(kind, refine):
    model, reference = detector(kind, "MODEL.BFP.REFINE_TYPE", refine)
    plain = Exportable(make_plain(model))
    assert not any(type(m).__module__.startswith("libra_d2.modeling") for m in plain.modules())
    for size in SIZES:
        with torch.no_grad():
            pairs = zip(
                plain(make_image(size)[None]), reference(make_image(size)[None]), strict=True
            )
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)


def test_what_is_not_balanced_is_exported_too(tmp_path):
    model = build_model(small_config(BASELINE)).eval()
    image = make_image(SIZES[0])[None]
    export_model(model, tmp_path / "model", format="script", image=image)
    exported = open_exported(tmp_path / "model", "script")
    check_agreement(Exportable(model), exported, [image], EXACT, 0.05)


class TestAgreement:
    FOUND = (
        torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 60]]),
        torch.tensor([0.9, 0.5]),
        torch.tensor([1, 2]),
        torch.tensor([0, 0]),
    )

    def change(self, part, index, value):
        changed = [x.clone() for x in self.FOUND]
        changed[part][index] = value
        return changed

    def test_the_order_is_open(self):
        turned = [x.flip(0) for x in self.FOUND]
        assert compare(self.FOUND, turned, EXACT, 0.05) == (2, "")

    @pytest.mark.parametrize(("part", "value"), [(0, 1.0), (1, 0.6), (2, 3), (3, 1)])
    def test_each_part_counts(self, part, value):
        problem = compare(self.FOUND, self.change(part, 1, value), EXACT, 0.05)[1]
        assert problem == "1 of 2 objects are missing"

    def test_one_too_many(self):
        fewer = [x[:1] for x in self.FOUND]
        assert "1 of 2 objects are too many" in compare(fewer, self.FOUND, EXACT, 0.05)[1]
        assert compare(fewer, self.FOUND, EXACT, 0.05, most=2)[1] == ""  # may be cut off
        assert "missing" in compare([x[1:] for x in self.FOUND], fewer, EXACT, 0.05)[1]

    @pytest.mark.parametrize("tolerance", [EXACT, HALF])
    def test_one_that_finds_nothing_does_not_agree(self, tolerance):
        nothing = [x[:0] for x in self.FOUND]
        assert "2 of 2 objects are missing" in compare(self.FOUND, nothing, tolerance, 0.05)[1]
        assert "too many" in compare(nothing, self.FOUND, tolerance, 0.05)[1]

    def test_masks_go_with_their_objects(self):
        masks = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)])
        found = [*self.FOUND, masks]
        assert compare(found, [x.flip(0) for x in found], EXACT, 0.05)[1] == ""
        swapped = [*self.FOUND, masks.flip(0)]
        assert "2 of 2 objects are missing" in compare(found, swapped, EXACT, 0.05)[1]

    def test_near_the_threshold_one_may_be_missing(self):
        fewer = [x[:1] for x in self.FOUND]
        assert compare(self.FOUND, fewer, EXACT, 0.4995)[1] == ""

    def test_nothing_found_shows_nothing(self):
        nothing = [x[:0] for x in self.FOUND]
        with pytest.raises(ValueError, match="shows nothing; name some"):
            check_agreement(
                lambda x: nothing, lambda x: nothing, [torch.zeros(1, 3, 8, 8)], EXACT, 0.05
            )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Weights of a toy, and its config."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model("faster")
    cfg = small_config(LIBRA, *BFP, "MODEL.RPN.PRE_NMS_TOPK_TEST", 100)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    pixels = np.random.default_rng(0).integers(0, 255, (120, 150, 3), np.uint8)
    for i in range(3):
        Image.fromarray(np.roll(pixels, i * 40, axis=1)).save(folder / f"{i}.png")
    return folder


class TestTool:
    @pytest.mark.parametrize(
        ("format", "end"),
        [
            ("onnx", "onnx"),
            ("script", "pt"),
            pytest.param("torch-export", "pt2", marks=pytest.mark.slow),
        ],
    )
    def test_the_script_beside_it_finds_the_same(self, run_folder, tmp_path, format, end):
        images = [run_folder / f"{i}.png" for i in range(3)]
        out = tmp_path / f"model.{end}"
        result = run_tool(
            *("export_model.py", run_folder, out, "--format", format, "--device", "cpu"),
            *("--images", *images),
        )
        assert result.returncode == 0, result.stderr
        assert "it agrees with the detector on" in result.stdout
        about = json.loads(Path(f"{out}.json").read_text())
        assert len(about["classes"]) == 10 and len(about["agreed_at"]) == 3
        assert about["input"]["channels"] == "BGR" and about["input"]["shorter_side"] == 96
        blocked = ["libra_d2", "detectron2"] + (["torch"] if format == "onnx" else [])
        code = f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked}))\n"
        code += f"sys.argv = ['x', {str(images[0])!r}]; runpy.run_path({f'{out}.py'!r})"
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        found = Detector(run_folder, threshold=0.05, device="cpu")(images[0])
        lines = [line.split()[1:] for line in ran.stdout.splitlines()]
        assert len(lines) == len(found.boxes) > 0
        for line, name, score, box in zip(
            lines, found.class_names, found.scores, found.boxes, strict=True
        ):
            assert line[0] == name and float(line[1]) == pytest.approx(score, abs=2e-3)
            assert np.allclose([float(x) for x in line[2:]], box, atol=0.2)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["model.pt", "--format", "onnx"], "a file of format onnx must end in .onnx"),
            (["model.pt", "--format", "script", "--half"], "script has no half precision"),
            (["model.onnx", "--format", "onnx", "--batch", "0"], "batch must be at least 1, got 0"),
            (["model.onnx", "--format", "onnx"], "name images to compare .* with --images"),
            (["model.onnx", "--format", "onnx", "--images", "no.png"], "no.png"),
            (["here.onnx", "--format", "onnx"], "here.onnx' exists; give --overwrite"),
        ],
    )
    def test_bad_input(self, run_folder, tmp_path, monkeypatch, arguments, match):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here.onnx").write_text("mine")
        no_data = ["--opts", "DATASETS.TEST", "('none',)"]
        result = run_tool("export_model.py", run_folder, *arguments, "--device", "cpu", *no_data)
        assert result.returncode == 2 and re.search(match, result.stderr), result.stderr
        assert result.stderr.strip().count("\n") == 0
        assert [f.name for f in tmp_path.iterdir()] == ["here.onnx"]
        assert (tmp_path / "here.onnx").read_text() == "mine"

    def test_what_does_not_agree_is_not_kept(self, run_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "libra_d2.deploy.bundle.open_exported",
            lambda file, format: lambda x: [y + 1 for y in open_exported(file, format)(x)],
        )
        result = run_tool(
            *("export_model.py", run_folder, tmp_path / "model.pt", "--format", "torchscript"),
            *("--images", run_folder / "0.png", "--device", "cpu"),
        )
        assert result.returncode == 2 and "does not agree with the model at" in result.stderr
        assert not list(tmp_path.iterdir())

    def test_the_commands_of_the_docs(self, run_folder, tmp_path, monkeypatch):
        text = (CONFIGS.parent / "docs" / "deploy.md").read_text()
        first, second = re.search(r"```\n(.*?)```", text, re.S)[1].strip().splitlines()
        monkeypatch.chdir(tmp_path)
        argv = first.replace("output/demo", str(run_folder)).split()
        images = ["--images", str(run_folder / "0.png")]
        assert run_tool(Path(argv[1]).name, *argv[2:], *images).returncode == 0
        (tmp_path / "a.jpg").write_bytes((run_folder / "0.png").read_bytes())
        ran = subprocess.run(
            shlex.split(second.replace("python", sys.executable)), capture_output=True, text=True
        )
        assert ran.returncode == 0 and "a.jpg" in ran.stdout


def test_what_can_not_be_exported(monkeypatch):
    with monkeypatch.context() as context:
        context.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="format onnx needs onnx and onnxruntime"):
            check_exportable(make_model("faster"), "onnx")
    with pytest.raises(ValueError, match="format must be one of torchscript, script, onnx"):
        check_exportable(make_model("faster"), "tflite")
    with pytest.raises(ValueError, match="Linear with NoneType cannot be exported"):
        check_exportable(torch.nn.Linear(1, 1), "onnx")
    model = make_model("retinanet")
    model.clip_before_nms = True
    with pytest.raises(ValueError, match="before_nms cannot be scripted"):
        check_exportable(model, "script")
