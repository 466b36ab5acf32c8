"""From a folder of images and labels to predictions, by commands alone."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from formats import NAMES, make_coco, make_voc, make_yolo
from PIL import Image
from test_run import fails, fresh_loggers, metrics  # noqa: F401  (a fixture)
from toys import CONFIGS, TOY, run_tool

from libra_d2 import Detector
from libra_d2.checkpoint import read_weights
from libra_d2.data.sources import is_source
from libra_d2.drawing import color_of
from libra_d2.engine import load_config, main
from libra_d2.inference import Result

SPLITS = {"train": [1, 2, 3, 4, 5, 6], "val": [7, 8]}
FINETUNE = sorted(path.name for path in (CONFIGS / "Finetune").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with masks, in all three formats."""
    folder = tmp_path_factory.mktemp("own")
    content = make_coco(folder / "coco")
    make_voc(folder / "voc", content, folder / "coco" / "images", SPLITS)
    make_yolo(folder / "yolo", content, folder / "coco" / "images", SPLITS)
    return folder


@pytest.fixture(autouse=True)
def forget():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in filter(is_source, catalog.list()):
            catalog.remove(name)


def sources(data, form):
    if form == "coco":
        return (f"coco:{data}/coco/annotations.json",) * 2
    place = data / "voc" if form == "voc" else data / "yolo" / "data.yaml"
    return f"{form}:{place}:train", f"{form}:{place}:val"


def command(train, val, output, *opts, config="libra_faster_rcnn_small_cpu.yaml", flags=()):
    """A toy run of a config of configs/Finetune; the number of classes is left to the data."""
    toy = list(TOY)
    for key in ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"):
        at = toy.index(key)
        del toy[at : at + 2]
    epochs = [("SOLVER.MAX_EPOCHS", 1), ("SOLVER.STEP_EPOCHS", ()), ("SOLVER.WARMUP_EPOCHS", 0)]
    # Untrained models find something too, that there be something to score.
    epochs += [(f"MODEL.{head}.SCORE_THRESH_TEST", 0.0) for head in ("ROI_HEADS", "RETINANET")]
    toy += [part for pair in epochs for part in pair]
    return [
        *("--config-file", str(CONFIGS / "Finetune" / config), *flags),
        *("--train", train, "--val", val, "--output", str(output), *map(str, [*toy, *opts])),
    ]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run on VOC's format that has seen each image twice."""
    output = tmp_path_factory.mktemp("run") / "mine"
    names = sources(data, "voc")
    main(command(*names, output, "SOLVER.MAX_EPOCHS", 2, "SOLVER.BASE_LR", 0.001))
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in filter(is_source, catalog.list()):
            catalog.remove(name)
    return output


@pytest.mark.parametrize("form", ["coco", "voc", "yolo"])
@pytest.mark.parametrize("config", FINETUNE)
def test_every_config_trains_on_every_format(config, form, data, tmp_path):
    if "mask" in config and form != "coco":
        pytest.skip("without masks")
    main(command(*sources(data, form), tmp_path / "run", config=config))
    cfg = load_config(str(tmp_path / "run" / "config.yaml"))
    used = NAMES if form != "voc" else sorted(cfg.DATASETS.CLASS_NAMES)
    assert used == cfg.DATASETS.CLASS_NAMES and len(used) > 5
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == len(used)
    assert read_weights(str(tmp_path / "run" / "model_final.pth"))["class_names"] == used
    assert f"bbox/AP-{used[0]}" in metrics(tmp_path / "run")[-1]


def test_epochs_are_of_the_data(data, tmp_path, capsys):
    """Six images, two at once: three iterations an epoch."""
    opts = ("SOLVER.MAX_EPOCHS", 4, "SOLVER.STEP_EPOCHS", "(2, 3)", "SOLVER.WARMUP_EPOCHS", 0.5)
    opts += ("SOLVER.CHECKPOINT_EPOCHS", 2, "TEST.EVAL_EPOCHS", 1)
    opts += ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
    main(command(*sources(data, "yolo"), tmp_path, *opts))
    cfg = load_config(str(tmp_path / "config.yaml"))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (12, (6, 9), 2)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (6, 3)
    assert {f.name for f in tmp_path.glob("model*")} >= {"model_0000005.pth", "model_final.pth"}
    assert [r["iteration"] for r in metrics(tmp_path) if "bbox/AP" in r] == [2, 5, 8, 12]
    assert " epoch: 4.00/4  " in (tmp_path / "log.txt").read_text()


def test_a_run_is_resumed_and_evaluated_without_the_training_data(data, tmp_path, capsys):
    mine = shutil.copytree(data, tmp_path / "data")
    names = sources(mine, "voc")
    argv = command(*names, tmp_path / "run")
    main(argv)
    main([*command(*names, tmp_path / "run", "SOLVER.MAX_EPOCHS", 2, flags=["--resume"])])
    assert metrics(tmp_path / "run")[-1]["iteration"] == 6
    (mine / "voc" / "ImageSets" / "Main" / "train.txt").unlink()
    config = str(tmp_path / "run" / "config.yaml")
    weights = str(tmp_path / "run" / "model_final.pth")
    capsys.readouterr()
    main(["--eval-only", "--config-file", config, "MODEL.WEIGHTS", weights])
    assert "AP" in capsys.readouterr().out


def test_permuted_ids_in_validation_change_nothing(data, trained, tmp_path, capsys):
    content = json.loads((data / "coco" / "annotations.json").read_text())
    names = load_config(str(trained / "config.yaml")).DATASETS.CLASS_NAMES
    content["categories"] = [c for c in content["categories"] if c["name"] in names]
    numbers = []
    for order in (1, -1):
        ids = {c["id"]: i for i, c in enumerate(content["categories"][::order], start=1)}
        permuted = {
            "images": content["images"],
            "categories": [{**c, "id": ids[c["id"]]} for c in content["categories"]],
            "annotations": [
                {**a, "category_id": ids[a["category_id"]]} for a in content["annotations"]
            ],
        }
        file = tmp_path / f"{order}.json"
        file.write_text(json.dumps(permuted))
        spec = f"coco:{file}:{data}/coco/images"
        argv = ["--eval-only", "--config-file", str(trained / "config.yaml"), "--val", spec]
        capsys.readouterr()
        main([*argv, "MODEL.WEIGHTS", str(trained / "model_final.pth")])
        out = capsys.readouterr().out
        numbers.append([line.split(": ")[-1] for line in out.splitlines() if "copypaste" in line])
    assert numbers[0] == numbers[1] and len(numbers[0]) == 3


class TestBadData:
    def test_another_number_of_classes(self, data, tmp_path, capsys):
        argv = command(*sources(data, "yolo"), tmp_path / "out", "MODEL.ROI_HEADS.NUM_CLASSES", 80)
        fails(capsys, argv, "NUM_CLASSES is 80 but the data have 10 classes; leave it out")
        assert not (tmp_path / "out").exists()

    def test_a_class_that_validation_has_alone(self, data, tmp_path, capsys):
        mine = shutil.copytree(data / "yolo", tmp_path / "yolo")
        content = yaml.safe_load((mine / "data.yaml").read_text())
        content["names"][3] = "digit3"
        (mine / "other.yaml").write_text(yaml.safe_dump(content))
        names = (sources(data, "yolo")[0], f"yolo:{mine}/other.yaml:val")
        fails(capsys, command(*names, tmp_path / "out"), "'digit3'.*did you mean 'digit 3'")

    def test_no_data(self, capsys, tmp_path):
        config = str(CONFIGS / "Finetune" / FINETUNE[0])
        fails(capsys, ["--config-file", config], "DATASETS.TRAIN is empty; name a data set")

    def test_epochs_below_zero(self, data, tmp_path, capsys):
        argv = command(*sources(data, "yolo"), tmp_path, "SOLVER.MAX_EPOCHS", -1)
        fails(capsys, argv, r"SOLVER.MAX_EPOCHS must be in \[0, .* got -1")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda b, w, h: [b[0], b[1], b[0] + b[2], b[1] + b[3]], "look like x1, y1, x2, y2"),
            (lambda b, w, h: [b[0] / w, b[1] / h, b[2] / w, b[3] / h], r"has boxes in \[0, 1\]"),
            (lambda b, w, h: [b[0], b[1], -b[2], b[3]], "has boxes of negative size"),
        ],
    )
    def test_boxes_in_another_format(self, change, match, data, tmp_path, capsys):
        content = json.loads((data / "coco" / "annotations.json").read_text())
        sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
        for a in content["annotations"]:
            a["bbox"] = change(a["bbox"], *sizes[a["image_id"]])
        file = tmp_path / "bad.json"
        file.write_text(json.dumps(content))
        name = f"coco:{file}:{data}/coco/images"
        fails(capsys, command(name, sources(data, "coco")[0], tmp_path / "out"), match)
        result = run_tool("inspect_dataset.py", name, "--report", "", "--mend", tmp_path / "m.json")
        assert result.returncode == 1 and "PROBLEM: " in result.stdout, result.stderr
        mended = f"coco:{tmp_path}/m.json:{data}/coco/images"
        assert run_tool("inspect_dataset.py", mended, "--report", "").returncode == 0
        boxes = [a["bbox"] for a in json.loads((tmp_path / "m.json").read_text())["annotations"]]
        good = json.loads((data / "coco" / "annotations.json").read_text())["annotations"]
        if "negative" not in match:
            np.testing.assert_allclose(boxes, [a["bbox"] for a in good], atol=1e-6)

    def test_images_that_cannot_be_used(self, data, tmp_path, capsys):
        mine = shutil.copytree(data, tmp_path / "data")
        file = mine / "yolo" / "images" / "train" / "000002.jpg"
        file.write_bytes(file.read_bytes()[:2000])
        names = sources(mine, "yolo")
        match = "images that cannot be used: 1, the first '.*000002.jpg', which cannot be read"
        fails(capsys, command(*names, tmp_path / "out"), match)
        result = run_tool("inspect_dataset.py", *names, "--report", "")
        assert result.returncode == 1 and "000002.jpg" in result.stdout
        (mine / "voc" / "JPEGImages" / "000001.jpg").unlink()
        (mine / "voc" / "JPEGImages" / "000003.jpg").unlink()
        match = "images that cannot be used: 2, the first '.*000001.jpg', which does not exist"
        fails(capsys, command(*sources(mine, "voc"), tmp_path / "out"), match)

    def test_masks_that_cannot_be_read(self, data, tmp_path, capsys):
        content = json.loads((data / "coco" / "annotations.json").read_text())
        good = f"coco:{data}/coco/annotations.json"
        for mask, match in (
            ([1, 2, 3, 4, 5, 6], "segmentation.*expected array, got int"),
            ([[1, 2, 3, 4]], "without a polygon of three corners"),
            ({"size": [9, 9], "counts": "abc"}, "INPUT.MASK_FORMAT bitmask reads it"),
            ([], "without segmentation"),
        ):
            content["annotations"][0]["segmentation"] = mask
            (tmp_path / "bad.json").write_text(json.dumps(content))
            name = f"coco:{tmp_path}/bad.json:{data}/coco/images"
            config = "libra_mask_rcnn_R_50_FPN.yaml"
            fails(capsys, command(name, good, tmp_path / "out", config=config), match)
        fails(capsys, command(good, name, tmp_path / "out", config=config), "without segmentation")

    def test_crowd_alone(self, data, tmp_path, capsys):
        content = json.loads((data / "coco" / "annotations.json").read_text())
        for crowd, match in ((1, "has no annotations, but for crowd"), (None, "iscrowd: expected")):
            for annotation in content["annotations"]:
                annotation["iscrowd"] = crowd
            (tmp_path / "bad.json").write_text(json.dumps(content))
            name = f"coco:{tmp_path}/bad.json:{data}/coco/images"
            fails(capsys, command(name, name, tmp_path / "out"), match)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda x, y, w, h: (x, y, w, h), "boxes of negative size"),
            (lambda x, y, w, h: (x / 400, y / 400, (x + w) / 400, (y + h) / 400), r"in \[0, 1\]"),
        ],
    )
    def test_voc_boxes_in_another_format(self, change, match, data, tmp_path, capsys):
        mine = shutil.copytree(data / "voc", tmp_path / "voc")
        for file in (mine / "Annotations").iterdir():
            tree = ElementTree.parse(file)
            for box in tree.iter("bndbox"):
                left, top, right, bottom = (float(corner.text) for corner in box)
                values = change(left, top, right - left, bottom - top)
                for corner, value in zip(box, values, strict=True):
                    corner.text = str(value)
            tree.write(file)
        name = f"voc:{mine}:train"
        fails(capsys, command(name, name, tmp_path / "out"), match)
        assert run_tool("inspect_dataset.py", name, "--report", "").returncode == 1

    def test_yolo_boxes_from_their_corner(self, data, tmp_path, capsys):
        mine = shutil.copytree(data / "yolo", tmp_path / "yolo")
        for file in (mine / "labels" / "train").iterdir():
            rows = [list(map(float, line.split())) for line in file.read_text().splitlines()]
            rows = [(int(c), x - w / 2, y - h / 2, w * 2, h * 2) for c, x, y, w, h in rows]
            file.write_text("\n".join(" ".join(f"{abs(v):.6g}" for v in row) for row in rows))
        name = f"yolo:{mine}/data.yaml:train"
        fails(capsys, command(name, name, tmp_path / "out"), "leave their image: .*another format")

    def test_images_that_were_resized(self, data, tmp_path, capsys):
        """What annotations say of sizes counts; mended, the boxes go with their image."""
        mine = shutil.copytree(data / "coco", tmp_path / "coco")
        for file in (mine / "images").iterdir():
            image = Image.open(file)
            image.resize((image.width // 2, image.height // 2)).save(file)
        name = f"coco:{mine}/annotations.json"
        fails(capsys, command(name, name, tmp_path / "out"), "images that have another size: 8")
        out = tmp_path / "m.json"
        assert run_tool("inspect_dataset.py", name, "--report", "", "--mend", out).returncode == 1
        boxes = [a["bbox"] for a in json.loads(out.read_text())["annotations"]]
        good = json.loads((data / "coco" / "annotations.json").read_text())["annotations"]
        np.testing.assert_allclose(boxes, np.array([a["bbox"] for a in good]) / 2, atol=1e-6)
        voc = shutil.copytree(data / "voc", tmp_path / "voc")
        xml = voc / "Annotations" / "000001.xml"
        size = "<size><width>640</width><height>640</height></size></annotation>"
        xml.write_text(xml.read_text().replace("</annotation>", size))
        match = "another size: 1, .*000001.jpg', which is .* not 640x640 as annotated"
        fails(capsys, command(*sources(tmp_path, "voc"), tmp_path / "out"), match)

    def test_images_of_16_bits(self, data, tmp_path, capsys):
        mine = shutil.copytree(data, tmp_path / "data")
        file = mine / "yolo" / "images" / "train" / "000002.jpg"
        gray = np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 256
        Image.fromarray(gray).save(file.with_suffix(".png"))
        file.unlink()
        match = "000002.png', which has more than 8 bits a channel; convert it to 8"
        fails(capsys, command(*sources(mine, "yolo"), tmp_path / "out"), match)

    @pytest.mark.parametrize("value", ['("a",)', "(None,)", "((1, 2),)", "(1e400,)"])
    def test_steps_that_are_no_epochs(self, value, data, tmp_path, capsys):
        argv = command(*sources(data, "yolo"), tmp_path / "out", "SOLVER.STEP_EPOCHS", value)
        fails(capsys, argv, "SOLVER.STEP_EPOCHS must be in")

    def test_names_given_by_hand(self, data, tmp_path, capsys):
        for names in (["a", "a"], [1, 2], [""]):
            argv = command(*sources(data, "yolo"), tmp_path / "out", "DATASETS.CLASS_NAMES", names)
            fails(capsys, argv, "CLASS_NAMES must be names, each once")

    def test_what_a_new_run_reads_is_not_overwritten(self, data, trained, tmp_path, capsys):
        run = shutil.copytree(trained, tmp_path / "run")
        val = run / "inference" / "val.json"
        shutil.copy(data / "coco" / "annotations.json", val)
        names = (sources(data, "coco")[0], f"coco:{val}:{data}/coco/images")
        match = "--overwrite would remove '.*val.json', which this run reads"
        fails(capsys, command(*names, run, flags=["--overwrite"]), match)
        assert val.exists()

    def test_weights_of_other_classes(self, data, trained, tmp_path, capsys):
        """They go on only with the classes that they were trained for, in their order."""
        names = load_config(str(trained / "config.yaml")).DATASETS.CLASS_NAMES
        run = shutil.copytree(trained, tmp_path / "run")
        opts = ("DATASETS.CLASS_NAMES", names[::-1], "SOLVER.MAX_EPOCHS", 3)
        argv = command(*sources(data, "voc"), run, *opts, flags=["--resume"])
        fails(capsys, argv, "the last checkpoint '.*' was trained for the classes digit 0, digit 1")
        weights = ("MODEL.WEIGHTS", str(run / "model_final.pth"))
        argv = command(*sources(data, "voc"), tmp_path / "out", *opts, *weights)
        fails(capsys, ["--eval-only", *argv], "was trained for the classes")
        # Not given, they are those of the weights.
        main(command(*sources(data, "voc"), tmp_path / "again", *weights))
        assert load_config(str(tmp_path / "again" / "config.yaml")).DATASETS.CLASS_NAMES == names


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
        for args in (("--report", file), ("--mend", file), ("--report", "x", "--mend", "x")):
            assert run_tool("inspect_dataset.py", name, *args).returncode == 2, args
        assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.json"]
        for _ in range(2):  # a report may be written again
            report = tmp_path / "r.html"
            assert run_tool("inspect_dataset.py", name, "--report", report).returncode == 0

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


@pytest.fixture(scope="module")
def detector(trained):
    return Detector(trained, threshold=0.0)


@pytest.fixture(scope="module")
def image(data):
    return data / "voc" / "JPEGImages" / "000007.jpg"


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
            ({"path": CONFIGS}, "holds no config.yaml|holds neither model_final.pth"),
            ({"threshold": 2}, r"threshold must be in \[0, 1\]"),
            ({"classes": ["digit0"]}, r"no class 'digit0' \(did you mean 'digit"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"device": "gpu"}, "a device of torch such as cuda"),
        ],
    )
    def test_bad_arguments(self, arguments, match, trained):
        with pytest.raises(ValueError, match=match):
            Detector(**{"path": trained, **arguments})

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
        detector = Detector(trained, threshold=0.0)
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
        args = ("--overwrite", "--csv", trained / "config.yaml")
        result = self.predict(trained, name, *args)
        assert result.returncode == 2 and "a file of a training run" in result.stderr

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


def test_the_commands_of_the_docs(data, tmp_path, monkeypatch):
    """Each line of docs/own_data.md, on toys that are called what they are called there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    (tmp_path / "weights").mkdir()
    shutil.copytree(data / "voc", "mine")
    shutil.copytree(data / "yolo", "mine_yolo")
    shutil.copytree(data / "coco", "mine_coco")
    for split in SPLITS:
        shutil.copy("mine_coco/annotations.json", f"mine_coco/{split}.json")
    shutil.copytree(data / "coco" / "images", "photos")
    writer = cv2.VideoWriter("clip.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    writer.write(np.zeros((64, 96, 3), np.uint8))
    writer.release()
    toy = command("", "", "")[8:]
    text = (CONFIGS.parent / "docs" / "own_data.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    seen = set()
    for line in lines:
        program, *args = shlex.split(line, comments=True)[1:] or [""]
        seen.add(program)
        if program == "train_net.py":
            main([*args, *toy])
        elif program:
            result = run_tool(Path(program).name, *args)
            assert result.returncode == 0, (line, result.stderr)
    assert seen >= {"train_net.py", "tools/inspect_dataset.py", "tools/predict.py"}
    (python,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(python, {})
