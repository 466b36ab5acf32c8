"""Detector, its results, and tools/predict.py."""

import csv
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from formats import NAMES
from PIL import Image
from toys import CONFIGS, run_tool

from libra_d2 import Detector
from libra_d2.drawing import color_of
from libra_d2.engine import load_config
from libra_d2.inference import Result
from libra_d2.inference.inputs import open_images
from libra_d2.inference.outputs import open_sinks
from libra_d2.inference.predict import predict


@pytest.fixture(scope="module")
def detector(trained):
    return Detector(trained, threshold=0.0, device="cpu")


@pytest.fixture(scope="module")
def image(data):
    return data / "voc" / "JPEGImages" / "000007.jpg"


def has_weights(detector):
    return any(value.any() for value in detector.model.state_dict().values())


class TestDetector:
    def test_takes_images_of_every_kind(self, detector, image):
        expected = detector(image)
        assert len(expected) > 0 and set(expected.class_names) <= set(detector.names)
        array = np.asarray(Image.open(image))
        kinds = [str(image), Image.open(image), array, torch.tensor(array).permute(2, 0, 1)]
        kinds += [array / 255.0]
        for kind in kinds:
            np.testing.assert_allclose(detector(kind).boxes, expected.boxes, atol=1e-3)
        bgr = detector(cv2.imread(str(image)), channels="BGR")
        np.testing.assert_allclose(bgr.scores, expected.scores, atol=1e-5)
        assert [len(r) for r in detector([image, array])] == [len(expected)] * 2
        assert detector(array[:, :, 0]).image.shape == array.shape

    def test_agrees_with_detectron2s_predictor(self, detector, image):
        from detectron2.engine import DefaultPredictor

        predictor = DefaultPredictor(detector.cfg.clone())
        predictor.model = detector.model
        instances = predictor(cv2.imread(str(image)))["instances"]
        np.testing.assert_allclose(detector(image).boxes, instances.pred_boxes.tensor, atol=1e-3)

    def test_images_of_one_size_go_together(self, trained, image, monkeypatch):
        array = np.asarray(Image.open(image))
        images = [
            array,
            array[:-30],
            np.ascontiguousarray(array[::-1]),
            array[:, :-40],
            array[:-30],
        ]
        expected = Detector(trained, threshold=0.0, device="cpu")(images)
        detector, sizes = Detector(trained, threshold=0.0, device="cpu", batch_size=2), []
        forward = detector.model.forward
        monkeypatch.setattr(
            detector.model, "forward", lambda x: (sizes.append(len(x)), forward(x))[1]
        )
        results = detector(images)
        assert sizes == [2, 2, 1]
        for result, other, own in zip(results, expected, images, strict=True):
            assert result.image.shape == own.shape and len(result) == len(other) > 0
            np.testing.assert_allclose(result.boxes, other.boxes, atol=1e-3)
            np.testing.assert_allclose(result.scores, other.scores, atol=1e-5)

    def test_half_precision(self, trained, detector, image):
        half = Detector(trained, threshold=0.0, device="cpu", half=True)
        dtypes = set()
        for module in half.model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
        result, expected = half(image), detector(image)
        assert torch.bfloat16 in dtypes
        assert result.scores[0] == pytest.approx(expected.scores[0], abs=0.05)
        assert result.scores.dtype == np.float32 and not np.array_equal(
            result.scores, expected.scores
        )

    def test_only_some_classes(self, trained, image):
        name = load_config(str(trained / "config.yaml")).DATASETS.CLASS_NAMES[1]
        result = Detector(trained, threshold=0.0, classes=[name])(image)
        assert set(result.class_names) <= {name}

    @pytest.mark.parametrize(
        ("image", "match"),
        [
            ("nowhere.jpg", "'nowhere.jpg' does not exist"),
            (__file__, "cannot be read as an image"),
            (np.zeros((4, 4, 4), np.uint8), r"must be \(H, W, 3\)"),
            (np.zeros((4, 4, 3), np.int64), "must be of uint8, or floats"),
            (np.full((4, 4, 3), 2.0), r"floats must be in \[0, 1\]"),
        ],
    )
    def test_what_is_no_image(self, image, match, detector):
        with pytest.raises(ValueError, match=match):
            detector(image)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"path": "nowhere"}, "'nowhere' does not exist; give a run's folder"),
            ({"path": CONFIGS}, "holds no checkpoint that is whole"),
            ({"threshold": 2}, r"threshold must be in \[0, 1\]"),
            ({"classes": ["digit0"]}, r"no class 'digit0' \(did you mean 'digit"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"device": "gpu"}, "a device of torch such as cuda"),
        ],
    )
    def test_bad_arguments(self, arguments, match, trained):
        with pytest.raises(ValueError, match=match):
            Detector(**{"path": trained, **arguments})

    def test_the_last_checkpoint_of_a_run(self, trained, tmp_path):
        """Of one that was extended it is no longer ``model_final.pth``."""
        run = shutil.copytree(trained, tmp_path / "run")
        later = torch.load(run / "model_final.pth")
        for value in later["model"].values():
            value *= 0
        torch.save(later, run / "model_0000999.pth")
        assert has_weights(Detector(run))
        (run / "last_checkpoint").write_text("model_0000999.pth")
        assert not has_weights(Detector(run))
        (run / "last_checkpoint").write_text("../run/model_0000999.pth")
        with pytest.raises(ValueError, match=r"must name a \.pth file of its folder"):
            Detector(run)
        (run / "last_checkpoint").unlink()
        assert has_weights(Detector(run))

    def test_exported_weights(self, trained, image, detector, tmp_path):
        out = tmp_path / "out.safetensors"
        assert run_tool("export_weights.py", trained / "model_final.pth", out).returncode == 0
        again = Detector(out, threshold=0.0)
        assert again.names == detector.names
        np.testing.assert_array_equal(again(image).boxes, detector(image).boxes)


def test_results_in_other_forms():
    mask = np.zeros((1, 100, 200), bool)
    mask[:, 20:60, 40:80] = True
    result = Result(
        image=np.zeros((100, 200, 3), np.uint8),
        boxes=np.float32([[40, 20, 80, 60]]),
        scores=np.float32([0.75]),
        class_ids=np.array([1]),
        names=["a", "b"],
        masks=mask,
    )
    assert repr(result) == "Result(1 b)" and result.class_names == ["b"]
    (record,) = result.to_coco(7, [10, 20])
    assert (record["category_id"], record["image_id"], record["bbox"]) == (20, 7, [40, 20, 40, 40])
    assert record["segmentation"]["size"] == [100, 200]
    assert result.to_yolo() == ["1 0.300000 0.400000 0.200000 0.400000 0.75000"]
    plot = result.plot()
    assert plot.shape == (100, 200, 3) and tuple(plot[60, 60]) == color_of(1)  # the box's edge
    assert (plot[40, 60] == (0.4 * np.array(color_of(1))).astype(int)).all()
    assert len(result.filter(result.scores > 0.8)) == 0


class TestPredict:
    def predict(self, trained, *args):
        return run_tool("predict.py", "--threshold", "0.0", trained, *args)

    def test_writes_every_form(self, trained, data, tmp_path):
        folder = shutil.copytree(data / "yolo" / "images", tmp_path / "photos")
        (folder / "val" / "000001.jpg").write_bytes((folder / "train" / "000001.jpg").read_bytes())
        (folder / "broken.jpg").write_text("no")
        out = tmp_path / "out"
        args = ("--json", out / "a.json", "--json-images", out / "b.json", "--csv", out / "c.csv")
        args += ("--txt", out / "txt", "--save-images", out / "images", "--crop", out / "crops")
        result = self.predict(trained, folder, *args, "--sheet", out / "sheet.jpg")
        assert result.returncode == 1  # one could not be read
        assert "skipped: '" in result.stderr and "9 images, " in result.stderr
        coco = json.loads((out / "a.json").read_text())
        images = json.loads((out / "b.json").read_text())
        assert len(images) == 9 and len(coco) == sum(len(image["objects"]) for image in images)
        assert images[0]["objects"][0]["class"] in NAMES and coco[0]["file_name"]
        rows = list(csv.DictReader((out / "c.csv").open()))
        assert len(rows) == len(coco) and rows[0]["class"] in NAMES
        # Names that two folders share are kept apart.
        names = {file.stem for file in (out / "images").iterdir()}
        assert names == {f.stem for f in (out / "txt").iterdir()} and len(names) == 9
        assert (out / "txt" / "000007.txt").read_text().count("\n") > 0
        assert len(list((out / "crops").rglob("*.jpg"))) > 0
        assert cv2.imread(str(out / "sheet.jpg")) is not None

    def test_a_data_set_keeps_its_ids(self, trained, data, tmp_path):
        name = f"coco:{data}/coco/annotations.json"
        args = ("--json", tmp_path / "a.json", "--sheet", tmp_path / "sheet.png")
        result = self.predict(trained, name, *args)
        assert result.returncode == 0, result.stderr
        records = json.loads((tmp_path / "a.json").read_text())
        content = json.loads((data / "coco" / "annotations.json").read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        detector = Detector(trained, threshold=0.0, device="cpu")
        first = content["images"][0]
        expected = detector(data / "coco" / "images" / first["file_name"]).class_names
        got = [names[r["category_id"]] for r in records if r["image_id"] == first["id"]]
        assert got == expected and "file_name" not in records[0]

    def test_a_video(self, trained, tmp_path):
        clip, out = str(tmp_path / "clip.mp4"), str(tmp_path / "out.mp4")
        writer = cv2.VideoWriter(clip, cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
        for i in range(5):
            writer.write(np.full((64, 96, 3), i * 40, np.uint8))
        writer.release()
        result = self.predict(trained, clip, "--video", out, "--json-images", tmp_path / "a.json")
        assert result.returncode == 0, result.stderr
        capture = cv2.VideoCapture(out)
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
        files = [r["file"] for r in json.loads((tmp_path / "a.json").read_text())]
        assert files[0] == "clip_000001" and len(files) == 5
        assert sorted(f.name for f in tmp_path.iterdir()) == ["a.json", "clip.mp4", "out.mp4"]

    def test_what_is_read_is_never_written(self, trained, data, tmp_path):
        mine = shutil.copytree(data, tmp_path / "data")
        name = f"coco:{mine}/coco/annotations.json"
        args = ("--overwrite", "--json", mine / "coco" / "annotations.json")
        result = self.predict(trained, name, *args)
        assert result.returncode == 2 and "is read itself" in result.stderr
        for file in ("config.yaml", "inference/coco_instances_results.json"):
            result = self.predict(trained, name, "--overwrite", "--csv", trained / file)
            assert result.returncode == 2 and "a file of a training run" in result.stderr

    def test_a_picture_in_the_folder_of_a_run_is_replaced(self, trained, image):
        sheet = trained / "sheet.jpg"
        for flags, code in (((), 0), ((), 2), (("--overwrite",), 0)):
            result = self.predict(trained, image, "--sheet", sheet, *flags)
            assert result.returncode == code, result.stderr
        sheet.unlink()

    @pytest.mark.parametrize("limit", [None, 9])
    def test_a_camera_ends_when_it_is_interrupted(self, detector, tmp_path, monkeypatch, limit):
        class Camera:
            def __init__(self, source):
                self.number = 0

            def isOpened(self):
                return True

            def read(self):
                self.number += 1
                if self.number > 2:
                    raise KeyboardInterrupt
                return True, np.zeros((40, 40, 3), np.uint8)

            def get(self, what):
                return 25.0

            def release(self):
                pass

        monkeypatch.setattr(cv2, "VideoCapture", Camera)
        images = open_images(["0"], limit)
        options = {"json_images": str(tmp_path / "a.json")}
        predict(detector, images, lambda: open_sinks(options, images))
        assert len(json.loads((tmp_path / "a.json").read_text())) == 2

    def test_no_two_images_share_a_name(self, trained, image, tmp_path):
        files = [tmp_path / name / "img.jpg" for name in ("day/1", "day_1")]
        for file in files:
            file.parent.mkdir(parents=True)
            shutil.copy(image, file)
        result = self.predict(trained, *files, "--txt", tmp_path / "txt")
        assert result.returncode == 0 and len(list((tmp_path / "txt").iterdir())) == 2

    def test_what_cannot_be_written_is_a_sentence(self, detector, image, tmp_path):
        (tmp_path / "txt" / f"{image.stem}.txt").mkdir(parents=True)
        images = open_images([str(image)])
        with pytest.raises(ValueError, match=r"000007.txt' cannot be written: Is a directory"):
            predict(detector, images, lambda: open_sinks({"txt": tmp_path / "txt"}, images))

    def test_images_too_narrow_are_skipped(self, trained, tmp_path):
        Image.new("RGB", (3000, 1)).save(tmp_path / "a.png")
        Image.new("RGB", (60, 40)).save(tmp_path / "b.png")
        for size in ("1", "2"):
            result = self.predict(trained, tmp_path, "--batch-size", size)
            assert result.returncode == 1 and "a.png': an image of 3000x1" in result.stderr
            assert "1 images, " in result.stderr

    def test_lines_on_the_screen(self, trained, data):
        result = self.predict(trained, f"{data}/voc/JPEGImages/00000[12].jpg")
        assert result.stdout.count("\n") == 2 and "000002.jpg: " in result.stdout

    @pytest.mark.parametrize(
        ("args", "match"),
        [
            (("nowhere.jpg",), "'nowhere.jpg' does not exist"),
            (("*.nothing",), "'*.nothing' has no images"),
            (("digit_val",), "does not exist, nor is it the name of a data set"),
            (("voc:nowhere:train",), "must be a folder with Annotations"),
            (("{}/bad.mp4",), "cannot be opened as a video"),
            (("77",), "camera 77 cannot be opened"),
            (("{}/a.jpg", "--num-images", "0"), "--num-images must be at least 1"),
            (("{}/a.jpg", "--sheet", "{}/a.jpg"), "is read itself; it would be lost"),
            (("{}/a.jpg", "--sheet", "{}/a.gif"), "--sheet must end in .jpg or .jpeg or .png"),
            (("{}/a.jpg", "--video", "{}/a.mp4"), "--video needs a video or a camera"),
            (("{}/a.jpg", "--save-images", "{}"), "is a folder of what is read"),
            (("{}/a.jpg", "--json", "{}"), "is a folder"),
            (("{}/a.jpg", "--classes", "cat"), "there is no class 'cat'"),
            (("{}/a.jpg", "--csv", "{}/bad.mp4"), "exists; give --overwrite"),
            (("{}/a.jpg", "--csv", "{}/x", "--json", "{}/x"), "are both"),
            (("99999999999999",), "camera 99999999999999 cannot be opened"),
            (("{}/a.jpg", "--opts", "MODEL.ROI_HEADS.NUM_CLASSES", "80"), "CLASS_NAMES has "),
        ],
    )
    def test_bad_input(self, args, match, trained, tmp_path):
        Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
        (tmp_path / "bad.mp4").write_text("no")
        before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
        result = self.predict(trained, *(arg.format(tmp_path) for arg in args))
        assert result.returncode == 2 and match in result.stderr.splitlines()[-1], result.stderr
        assert "Traceback" not in result.stderr
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
