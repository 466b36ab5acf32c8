"""The command-line tools, and what they refuse in one sentence."""

import json
import subprocess
import sys

import cv2
import pytest
from toys import CONFIGS

TOOLS = CONFIGS.parent / "tools"


def run(tool, *args):
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *map(str, args)], capture_output=True, text=True
    )


def fails(tool, args, match):
    result = run(tool, *args)
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
        result = run("analyse.py", tmp_path / "metrics.json", tmp_path / "plots" / "out.png")
        assert result.returncode == 0, result.stderr
        assert cv2.imread(str(tmp_path / "plots" / "out.png")).shape[1] > 1000

    @pytest.mark.parametrize(
        ("content", "output", "match"),
        [
            (None, "out.png", "does not exist; give the metrics.json"),
            ("{", "out.png", "one object a line"),
            ("[1]", "out.png", "holds no metrics"),
            ("", "out.png", "holds no metrics"),
            ('{"iteration": 1}', "out.gif", "must end in .png"),
        ],
    )
    def test_bad_input(self, content, output, match, tmp_path):
        if content is not None:
            (tmp_path / "metrics.json").write_text(content)
        fails("analyse.py", [tmp_path / "metrics.json", tmp_path / output], match)
        assert not (tmp_path / output).exists()


class TestPredict:
    CONFIG = ("--config-file", CONFIGS / "Demo" / "libra_faster_rcnn.yaml")

    @pytest.mark.parametrize(
        ("args", "match"),
        [
            (("--images", "nowhere.jpg"), "MODEL.WEIGHTS is empty"),
            (("--images", "a.jpg", "--score-threshold", "2"), "--score-threshold must be in"),
            (("--dataset", "digit_val"), "did you mean 'digits_val'"),
            (("--dataset", "digits_val", "--num-images", "0"), "--num-images must be at least 1"),
        ],
    )
    def test_bad_input(self, args, match, tmp_path):
        fails("predict.py", [*self.CONFIG, "--output", tmp_path / "out.jpg", *args], match)

    def test_output_must_be_a_picture(self, tmp_path):
        args = [*self.CONFIG, "--output", tmp_path / "out.txt", "--images", "a.jpg"]
        fails("predict.py", args, "must end in .jpg or .png")


def test_benchmark_names_what_there_is():
    fails("benchmark.py", ["samples"], "there is samplers, bfp, matching")
