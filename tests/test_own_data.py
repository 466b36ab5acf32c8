"""From a folder of images and labels to a trained detector, by commands alone."""

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
from formats import NAMES
from own import (
    FINETUNE,
    SPLITS,
    command,
    sources,
)
from PIL import Image
from tiny import fails, metrics, registered
from toys import CONFIGS, run_tool

from libra_d2.checkpoint import read_weights
from libra_d2.engine import load_config, main
from libra_d2.engine.weights import class_names_of


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


def test_a_folder_may_be_called_by_a_number(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(command(*sources(data, "coco"), "2024"))
    assert (tmp_path / "2024" / "model_final.pth").is_file()


@pytest.mark.parametrize("end", [".pth", ".safetensors"])
def test_exported_weights_bring_their_classes(end, tmp_path):
    names = ["b", "a"]
    torch.save({"model": {"w": torch.ones(1)}, "class_names": names}, tmp_path / "in.pth")
    result = run_tool("export_weights.py", tmp_path / "in.pth", tmp_path / f"out{end}")
    assert result.returncode == 0, result.stderr
    assert class_names_of(str(tmp_path / f"out{end}")) == names


def test_a_damaged_file_of_annotations_is_named(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations.json").write_text('{"images": [')
    with registered("bad", tmp_path):
        argv = command("bad", "bad", tmp_path / "run", "SOLVER.MAX_EPOCHS", 2)
        fails(capsys, argv, "annotations.json is not valid json")


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
        own = content["annotations"]
        for mask, match in (
            ([1, 2, 3, 4, 5, 6], "segmentation.*expected array, got int"),
            ([[1, 2, 3, 4]], "has no polygon of three corners"),
            ({"size": [9, 9], "counts": "abc"}, "INPUT.MASK_FORMAT bitmask reads it"),
            ([], "without segmentation"),
        ):
            content["annotations"] = [{**a, "segmentation": mask} for a in own]
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

    def test_iterations_beside_epochs(self, data, tmp_path, capsys):
        argv = command(*sources(data, "yolo"), tmp_path / "out", "SOLVER.MAX_ITER", 2)
        fails(capsys, argv, "SOLVER.MAX_ITER has no effect beside SOLVER.MAX_EPOCHS 1.0")
        argv = command(*sources(data, "yolo"), tmp_path / "out", "SOLVER.WARMUP_EPOCHS", 1)
        fails(capsys, argv, "WARMUP_EPOCHS must be below SOLVER.MAX_EPOCHS 1, got 1")

    def test_weights_that_cannot_be_fetched(self, data, tmp_path, capsys):
        weights = ("MODEL.WEIGHTS", "http://127.0.0.1:9/model.pkl")
        argv = command(*sources(data, "yolo"), tmp_path / "out", *weights)
        with pytest.raises(SystemExit) as error:
            main(argv)
        last = capsys.readouterr().err.strip().splitlines()[-1]  # after the progress bar
        assert (
            error.value.code == 2 and "'http://127.0.0.1:9/model.pkl' cannot be fetched: " in last
        )
        assert not (tmp_path / "out").exists()

    def test_names_given_by_hand(self, data, tmp_path, capsys):
        for names in (["a", "a"], [1, 2], [""]):
            argv = command(*sources(data, "yolo"), tmp_path / "out", "DATASETS.CLASS_NAMES", names)
            fails(capsys, argv, "CLASS_NAMES must be names, each once")

    def test_what_a_new_run_reads_is_not_overwritten(self, data, trained, tmp_path, capsys):
        run = shutil.copytree(trained, tmp_path / "run")
        val = run / "inference" / "val_results.json"
        shutil.copy(data / "coco" / "annotations.json", val)
        names = (sources(data, "coco")[0], f"coco:{val}:{data}/coco/images")
        match = "--overwrite would remove '.*val_results.json', which this run reads"
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
            at = toy.index("MODEL.WEIGHTS")
            main([*args, *(toy[:at] + toy[at + 2 :] if "MODEL.WEIGHTS" in args else toy)])
        elif program:
            result = run_tool(Path(program).name, *args)
            assert result.returncode == 0, (line, result.stderr)
    assert seen >= {"train_net.py", "tools/inspect_dataset.py", "tools/predict.py"}
    (python,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(python, {})
