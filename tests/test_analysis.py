"""Pictures of balance, and the numbers beside them."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import BFP, make_model
from toys import LIBRA, SMALL_RETINANET, run_tool, small_config, toy_config

GUIDED = ("MODEL.META_ARCHITECTURE", "LibraRetinaNet", "MODEL.RETINANET.MATCHER", "mutual_guidance")


def rows_of(picture):
    with open(picture.with_suffix(".csv")) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with weights of toys and their configs."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("faster", "retinanet"):
        model = make_model(name)
        prior = ("MODEL.RETINANET.PRIOR_PROB", 0.2)
        cfg = (
            toy_config("Base-Libra-RetinaNet.yaml", *SMALL_RETINANET, *BFP, *prior, *GUIDED)
            if name == "retinanet"
            else small_config(LIBRA, *BFP, "MODEL.RPN.PRE_NMS_TOPK_TEST", 100)
        )
        (folder / name).mkdir()
        cfg.defrost()
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 200
        (folder / name / "config.yaml").write_text(cfg.dump())
        torch.save({"model": model.state_dict()}, folder / name / "model_final.pth")
    return folder


def analyse(*args):
    result = run_tool("analyse.py", *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("end", ["png", "svg"])
def test_losses(end, tmp_path):
    out = tmp_path / f"losses.{end}"
    analyse("losses", out)
    rows = {(r["curve"], round(float(r["x"]), 3)): r for r in rows_of(out)}
    smooth, balanced = rows["smooth L1", 0.5], rows["balanced L1, alpha 0.5", 0.5]
    assert float(smooth["loss"]) == pytest.approx(0.125)
    assert float(smooth["gradient"]) == pytest.approx(0.5)
    # alpha ln(b x + 1), with b so that it is gamma at 1 (Libra R-CNN, equation 8).
    b = np.expm1(1.5 / 0.5)
    assert float(balanced["gradient"]) == pytest.approx(0.5 * np.log(b * 0.5 + 1))
    focal = rows["focal, gamma 2", 0.5]
    assert float(focal["loss"]) == pytest.approx(0.25 * np.log(2))
    if end == "png":
        assert Image.open(out).width > 800


def test_sampling(models, tmp_path):
    out = tmp_path / "sampling.png"
    told = analyse("sampling", models / "faster", out, "--images", 3, "--val", "digits_val")
    rows = rows_of(out)
    for name in ("all negatives", "random", "IoU-balanced", "OHEM: the hardest", "PISA"):
        shares = [float(row[name]) for row in rows]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
        above = 100 * sum(shares[1:])
        line = next(x for x in told.splitlines() if x.startswith(f"{name}: "))
        assert float(line.split(": ")[-1].split()[0]) == pytest.approx(above, abs=0.6)
    assert float(rows[0]["IoU-balanced"]) < float(rows[0]["random"])


def test_features(models, tmp_path):
    out = tmp_path / "features.png"
    analyse("features", models / "faster", out, "--image", 1, "--val", "digits_val")
    rows = {(r["level"], r["stage"]): float(r["mean"]) for r in rows_of(out)}
    assert len(rows) == 15 and rows["p2", "before"] != rows["p2", "after"]
    assert all(mean > 0 for mean in rows.values())


def test_ranks(models, tmp_path):
    out = tmp_path / "ranks.png"
    analyse("ranks", models / "faster", out, "--val", "digits_val")
    negatives = [r for r in rows_of(out) if r["kind"] == "negative"]
    assert [int(r["rank"]) for r in negatives] == list(range(len(negatives))) and negatives
    assert all(float(r["value"]) > 0.05 for r in negatives)


def test_matching(models, tmp_path):
    out = tmp_path / "matching.png"
    weights = models / "retinanet" / "model_final.pth"
    again = models / "retinanet" / "model_0000001.pth"
    again.write_bytes(weights.read_bytes())
    told = analyse(
        *("matching", models / "retinanet", out, "--val", "digits_val"),
        *("--weights", "model_0000001.pth", weights),
    )
    one, other = rows_of(out)
    assert one["model"] == "model_0000001.pth" and other["model"] == "model_final.pth"
    counts = [{k: v for k, v in row.items() if k != "model"} for row in (one, other)]
    assert counts[0] == counts[1]
    assert int(one["guided: to classify"]) > 0 and int(one["guided: to localize"]) > 0
    assert f"{one['IoU']} anchors by IoU" in told


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["sampling", "retinanet", "x.png"], "has no proposals; give a two-stage detector"),
        (["ranks", "retinanet", "x.png"], "has no proposals"),
        (["matching", "faster", "x.png"], "has no anchors of classes; give a RetinaNet"),
        (["features", "faster", "x.jpg"], "must end in .png, .svg, .pdf"),
        (["features", "faster", "x.png", "--image", "-1"], "--image must be at least 0, got -1"),
        (["features", "faster", "x.png", "--image", "999"], "has no image 999"),
        (["features", "faster", "x.png", "--val", "coco:no.json"], "no.json"),
        (["matching", "retinanet", "x.png", "--object", "99"], "--object must be in"),
        (["features", "nothing", "x.png"], "nothing"),
        (["losses", "here.png"], "here.png' exists; give --overwrite"),
    ],
)
def test_bad_input(args, match, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.png").write_text("mine")
    if args[0] != "losses":
        args = [args[0], models / args[1], *args[2:]]
        args += [] if "--val" in args else ["--val", "digits_val"]
    result = run_tool("analyse.py", *args)
    assert result.returncode == 2 and match in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.strip().count("\n") == 0
    assert [f.name for f in tmp_path.iterdir()] == ["here.png"]
