"""The command-line tools, and what they refuse in one sentence."""

import csv
import hashlib
import json

import cv2
import pytest
import torch
from toys import CONFIGS, run_tool

from libra_d2.checkpoint import read_weights


def fails(tool, args, match):
    result = run_tool(tool, *args)
    message = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert match in message[-1] and "Traceback" not in result.stderr, result.stderr


class TestAnalyse:
    def test_plots_what_a_run_logged(self, tmp_path):
        records = [
            {"iteration": i, "total_loss": 2 / (i + 1), "roi_head/negative_iou_bin0": 0.3}
            for i in range(0, 60, 20)
        ]
        records.append({"iteration": 60, "bbox/AP": 12.0})
        (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, records)))
        other = tmp_path / "other"
        other.mkdir()
        (other / "metrics.json").write_text(json.dumps({"iteration": 5, "total_loss": 1.0}) + "\n")
        out = tmp_path / "plots" / "out.png"
        result = run_tool("analyse.py", "run", tmp_path / "metrics.json", other, out)
        assert result.returncode == 0, result.stderr
        assert cv2.imread(str(out)).shape[1] > 1000
        with open(out.with_suffix(".csv")) as file:
            rows = list(csv.DictReader(file))
        assert {"metric": "bbox/AP", "value": "12.0"}.items() <= rows[-1 - 1].items()
        assert rows[-1]["run"].endswith("/other") and rows[-1]["value"] == "1.0"

    @pytest.mark.parametrize(
        ("content", "output", "match"),
        [
            (None, "out.png", "does not exist; give the metrics.json"),
            ("{\n[", "out.png", "one object a line"),
            ("[1]", "out.png", "holds no metrics"),
            ("", "out.png", "holds no metrics"),
            ('{"iter', "out.png", "holds no metrics"),
            ('{"iteration": 1}', "out.gif", "must end in .png"),
        ],
    )
    def test_bad_input(self, content, output, match, tmp_path):
        if content is not None:
            (tmp_path / "metrics.json").write_text(content)
        fails("analyse.py", ["run", tmp_path / "metrics.json", tmp_path / output], match)
        assert not (tmp_path / output).exists()


class TestExport:
    def checkpoint(self, folder):
        model = {"a.weight": torch.randn(2, 3), "b": torch.zeros(())}
        content = {"model": model, "optimizer": {"state": 1}, "iteration": 9, "class_names": ["ä"]}
        torch.save(content, folder / "in.pth")
        return model

    @pytest.mark.parametrize(("suffix", "logged"), [(".pth", 9), (".safetensors", 10)])
    def test_strips_and_records(self, suffix, logged, tmp_path):
        """A run's last evaluation is logged with the iteration after its last."""
        model = self.checkpoint(tmp_path)
        (tmp_path / "config.yaml").write_text((CONFIGS / "Base-RCNN-FPN.yaml").read_text())
        records = [(5, 11.0), (logged, 12.5), (15, 13.0)]
        lines = [{"iteration": i, "bbox/AP": ap, "x": 1} for i, ap in records]
        (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
        out = tmp_path / f"out{suffix}"
        result = run_tool("export_weights.py", tmp_path / "in.pth", out)
        assert result.returncode == 0, result.stderr
        content = read_weights(str(out))
        torch.testing.assert_close(content["model"], model)
        assert "optimizer" not in content
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
        assert record["metrics"] == {"iteration": logged, "bbox/AP": 12.5}
        assert record["class_names"] == ["ä"]
        for written in (out, out.with_suffix(".json"), out.with_suffix(".yaml")):
            assert written.stat().st_mode & 0o777 == 0o644
        assert "LibraROIHeads" in record["config"] and record["sha256"] in result.stdout

    def test_bad_input(self, tmp_path):
        self.checkpoint(tmp_path)
        (tmp_path / "bad.pth").write_text("no")
        tool = "export_weights.py"
        fails(tool, [tmp_path / "no.pth", tmp_path / "o.pth"], "no.pth' does not exist")
        fails(tool, [tmp_path / "bad.pth", tmp_path / "o.pth"], "is damaged or no file of weights")
        fails(tool, [tmp_path / "in.pth", tmp_path / "o.bin"], "must end in .pth or .safetensors")
        fails(tool, [tmp_path / "in.pth", tmp_path / "in.pth"], "exists; give --overwrite")
        args = [tmp_path / "in.pth", tmp_path / "in.pth", "--overwrite"]
        fails(tool, args, "would replace itself")
        assert sorted(f.name for f in tmp_path.iterdir()) == ["bad.pth", "in.pth"]

    def test_of_a_lazy_config_the_weights_alone(self, tmp_path):
        self.checkpoint(tmp_path)
        (tmp_path / "config.yaml").write_text("dataloader: {}\nmodel: {}\n")
        result = run_tool("export_weights.py", tmp_path / "in.pth", tmp_path / "out.pth")
        assert result.returncode == 0 and not (tmp_path / "out.yaml").exists()
        args = [tmp_path / "in.pth", tmp_path / "o.pth", "--config-file", tmp_path / "config.yaml"]
        fails("export_weights.py", args, "is a LazyConfig, which is code: publish the .py file")


def test_benchmark_loses_no_numbers(tmp_path):
    file = tmp_path / "old.json"
    file.write_text("old")
    if not torch.cuda.is_available():
        fails("benchmark.py", ["gpu", "--json", file], "gpu needs a GPU that torch finds")
        assert file.read_text() == "old"
    fails("benchmark.py", ["samplers", "--json", tmp_path / "no" / "x"], "in a folder that exists")


def test_benchmark_names_what_there_is():
    fails("benchmark.py", ["samples"], "there is samplers, bfp, matching")
    if not torch.cuda.is_available():
        fails("benchmark.py", ["gpu"], "gpu needs a GPU that torch finds")
