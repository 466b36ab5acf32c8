"""tools/inspect_dataset.py: what it tells, what it mends."""

import json
import shutil

import cv2
from own import (
    sources,
)
from toys import run_tool


class TestInspect:
    def test_tells_what_there_is_and_writes_a_report(self, data, tmp_path):
        train, val = sources(data, "voc")
        result = run_tool("inspect_dataset.py", train, val, "--report", tmp_path / "r.html")
        assert result.returncode == 0, result.stderr
        assert "6 images" in result.stdout and "classes: digit 0" in result.stdout
        report = (tmp_path / "r.html").read_text()
        assert report.count("data:image/jpeg") == 8 and report.count("data:image/png") == 8
        assert "src=" in report and 'src="http' not in report

    def test_the_same_image_in_both_splits(self, data, tmp_path):
        """Compressed again, and under another name."""
        mine = shutil.copytree(data / "yolo", tmp_path / "yolo")
        image = cv2.imread(str(mine / "images" / "train" / "000001.jpg"))
        cv2.imwrite(str(mine / "images" / "val" / "other.png"), image)
        names = (f"yolo:{mine}/data.yaml:train", f"yolo:{mine}/data.yaml:val")
        result = run_tool("inspect_dataset.py", *names, "--report", "")
        assert "share: 1, such as" in result.stdout and "other.png" in result.stdout

    def test_escapes_what_files_are_called(self, data, tmp_path):
        mine = shutil.copytree(data / "coco", tmp_path / "coco")
        content = json.loads((mine / "annotations.json").read_text())
        content["categories"][1]["name"] = "<script>alert(1)</script>"
        (mine / "annotations.json").write_text(json.dumps(content))
        name = f"coco:{mine}/annotations.json"
        result = run_tool("inspect_dataset.py", name, "--report", tmp_path / "r.html")
        assert result.returncode == 0, result.stderr
        report = (tmp_path / "r.html").read_text()
        assert "<script>" not in report and "&lt;script&gt;" in report

    def test_mended_data_lack_what_was_wrong(self, data, tmp_path):
        content = json.loads((data / "coco" / "annotations.json").read_text())
        first, width = content["annotations"][0], content["images"][0]["width"]
        extra = [
            {**first, "id": 1001, "bbox": [5, 5, 0, 9]},
            {**first, "id": 1002, "bbox": [width + 50, 5, 9, 9]},
            {**first, "id": 1003},
            {**first, "id": 1004, "bbox": [width - 20, 5, 90, 30]},
        ]
        content["images"].append({"id": 99, "file_name": "gone.jpg", "height": 9, "width": 9})
        content["images"][1]["width"] += 1
        content["annotations"] += extra
        file = tmp_path / "bad.json"
        file.write_text(json.dumps(content))
        args = (f"coco:{file}:{data}/coco/images", "--report", "", "--mend", tmp_path / "m.json")
        result = run_tool("inspect_dataset.py", *args)
        assert result.returncode == 1
        for what in ("without extent: 1", "outside of their image: 1", "marked twice: 1"):
            assert what in result.stdout
        for what in ("leave their image: 1", "cannot be used: 1", "have another size: 1"):
            assert what in result.stdout
        mended = json.loads((tmp_path / "m.json").read_text())
        ids = {a["id"]: a for a in mended["annotations"]}
        assert not {1001, 1002, 1003} & ids.keys() and ids[1004]["bbox"] == [width - 20, 5, 20, 30]
        assert len(mended["images"]) == 8 and ids[1]["segmentation"] == first["segmentation"]
        assert run_tool("inspect_dataset.py", *args).returncode == 2  # it exists

    def test_nothing_is_lost(self, data, tmp_path):
        file = tmp_path / "a.json"
        shutil.copy(data / "coco" / "annotations.json", file)
        name = f"coco:{file}:{data}/coco/images"
        before = file.read_bytes()
        mend = ("--mend", file)
        for args in (
            ("--report", file),
            mend,
            (*mend, "--overwrite"),
            ("--report", "x", "--mend", "x"),
        ):
            assert run_tool("inspect_dataset.py", name, *args).returncode == 2, args
        assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.json"]
        for _ in range(2):  # a report may be written again
            report = tmp_path / "r.html"
            assert run_tool("inspect_dataset.py", name, "--report", report).returncode == 0

    def test_a_mask_that_training_would_refuse(self, data, tmp_path):
        content = json.loads((data / "coco" / "annotations.json").read_text())
        content["annotations"][0]["segmentation"] = {"size": [5, 5], "counts": [25]}
        (tmp_path / "a.json").write_text(json.dumps(content))
        name = f"coco:{tmp_path}/a.json:{data}/coco/images"
        result = run_tool("inspect_dataset.py", name, "--report", "")
        assert result.returncode == 1
        assert "masks of another size than their image: 1, the first of (5, 5)" in result.stdout
        mended = tmp_path / "m.json"
        run_tool("inspect_dataset.py", name, "--report", "", "--mend", mended)
        name = f"coco:{mended}:{data}/coco/images"
        assert run_tool("inspect_dataset.py", name, "--report", "").returncode == 0

    def test_polygons_that_are_none(self, data, tmp_path):
        """detectron2 leaves such an object out; without its polygon it does not."""
        content = json.loads((data / "coco" / "annotations.json").read_text())
        content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
        (tmp_path / "a.json").write_text(json.dumps(content))
        name, mended = f"coco:{tmp_path}/a.json:{data}/coco/images", tmp_path / "m.json"
        result = run_tool("inspect_dataset.py", name, "--report", "", "--mend", mended)
        assert result.returncode == 0
        assert "polygons have fewer than three corners: 1, the first in image" in result.stdout
        written = {a["id"]: a for a in json.loads(mended.read_text())["annotations"]}
        assert "segmentation" not in written[content["annotations"][0]["id"]]

    def test_a_single_object(self, data, tmp_path):
        content = json.loads((data / "coco" / "annotations.json").read_text())
        content["annotations"] = content["annotations"][:1]
        (tmp_path / "a.json").write_text(json.dumps(content))
        name = f"coco:{tmp_path}/a.json:{data}/coco/images"
        result = run_tool("inspect_dataset.py", name, "--report", tmp_path / "r.html")
        assert result.returncode == 0, result.stderr

    def test_anchors_that_miss(self, data):
        sizes = "[[256], [512], [1024], [2048], [4096]]"
        args = (sources(data, "coco")[0], "--report", "", "--opts", "INPUT.MIN_SIZE_TEST", "800")
        result = run_tool("inspect_dataset.py", *args, "MODEL.ANCHOR_GENERATOR.SIZES", sizes)
        assert "than the smallest anchor of 256: multiply" in result.stdout
        result = run_tool("inspect_dataset.py", *args)
        assert "multiply" not in result.stdout
