"""tools/benchmarks: what its tables are computed with. Times decide nothing here."""

import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from toys import CONFIGS

sys.path.insert(0, str(CONFIGS.parent / "tools"))

from benchmarks import gpu, limits, loading, measuring
from benchmarks.samplers import make_matches, make_mmdetections, sample_both, sample_by_the_book

# An operation a second, a hundred bytes a second, a hundredth of a second a call.
SLOW = SimpleNamespace(flops={torch.float32: 1.0, torch.bfloat16: 10.0}, bytes=100.0, call=0.01)


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch):
    monkeypatch.setattr(measuring, "TABLES", [])


class TestBound:
    def test_products_are_limited_by_arithmetic(self):
        a, b = torch.rand(4, 5), torch.rand(5, 6)
        assert limits.bound(lambda: a @ b, SLOW) == {"arithmetic": 2 * 4 * 5 * 6}
        a, b = a.bfloat16(), b.bfloat16()
        assert limits.bound(lambda: a @ b, SLOW) == {"arithmetic": 24.0}

    def test_backward_counts_too(self):
        a, b = torch.rand(4, 5, requires_grad=True), torch.rand(5, 6, requires_grad=True)
        seconds = limits.bound(lambda: (a @ b).sum().backward(), SLOW)
        assert seconds["arithmetic"] == 3 * 2 * 4 * 5 * 6

    def test_attention_counts_on_a_cpu(self):
        q = torch.rand(1, 1, 6, 8)
        attend = torch.nn.functional.scaled_dot_product_attention
        assert limits.bound(lambda: attend(q, q, q), SLOW)["arithmetic"] == 2 * 2 * 6 * 6 * 8

    def test_others_by_bytes_or_calls(self):
        x = torch.rand(100)
        assert limits.bound(lambda: x + 1, SLOW) == {"memory": 2 * 400 / 100}
        fast = SimpleNamespace(**{**vars(SLOW), "bytes": 1e9})
        assert limits.bound(lambda: x + 1, fast) == {"calls": 0.01}
        assert limits.bound(lambda: x.view(10, 10), fast) == {}


def test_a_cell_compares_with_the_first(monkeypatch, capsys):
    made = []

    def make(config, opts, inputs):
        assert opts == ("A", "B", *gpu.PRECISIONS["bfloat16"][0], "MODEL.RESNETS.DEPTH", "101")
        assert len(inputs) == 2 and inputs[0]["image"].shape == (3, 32, 48)
        made.append("instances" in inputs[0])
        return lambda: None

    def take(candidates, repeats, warmup):
        return {name: 4.0 if name == "slow" else 1.0 for name in candidates}

    monkeypatch.setattr(gpu, "measure", take)
    monkeypatch.setattr(gpu, "make_iteration", make)
    monkeypatch.setattr(gpu, "make_inference", make)
    family = {"slow": ("slow.yaml", ("A", "B")), "fast": ("fast.yaml", ("A", "B"))}
    gpu.show_cell(family, 101, 2, "bfloat16", repeats=1, size=(32, 48))
    (table,) = measuring.TABLES
    assert table["title"].startswith("R101, 2 x 32x48, bfloat16")
    slow, fast = table["rows"]
    assert slow["training, ms"] == 4000 and slow["of plain"] == slow["of it"] == 1
    assert fast["of plain"] == fast["of it"] == 0.25
    assert made == [True, False] * 2
    assert "| slow" in capsys.readouterr().out


@pytest.mark.parametrize("num_positives", [60, 400])
def test_samplers_that_are_compared_run(num_positives):
    sample_both(*make_matches(16, num_positives))
    sample_by_the_book(*make_matches(1, num_positives))


def test_mmdetections_sampler_runs():
    pytest.importorskip("mmdet")
    make_mmdetections(*make_matches(1, 400))()


def test_images_that_are_kept_are_not_read(tmp_path, monkeypatch):
    Image.fromarray(loading._make_image(60, 80)).save(tmp_path / "image.jpg")
    ways = loading._ways_to_load(str(tmp_path / "image.jpg"), (60, 80))
    loaded = [way() for way in ways.values()]
    monkeypatch.setattr("libra_d2.data.cache.read_image", None)
    (kept,) = (way for name, way in ways.items() if "CACHE" in name)
    (torchs,) = (x for x, name in zip(loaded, ways, strict=True) if name.endswith("torch"))
    assert kept()["image"].shape == torchs["image"].shape
