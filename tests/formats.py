"""The embedded digits in the three formats that people bring, as small as a test needs them."""

import json
import shutil
from pathlib import Path

import yaml

from libra_d2.data.digits import Split, make_digits

NAMES = [f"digit {i}" for i in range(10)]


def make_coco(folder: Path, num_images: int = 8, seed: int = 9) -> dict:
    """``annotations.json`` and ``images`` in ``folder``; the content of the former."""
    make_digits(Split(num_images=num_images, seed=seed, training=True), folder)
    content = json.loads((folder / "annotations.json").read_text())
    for category, name in zip(content["categories"], NAMES, strict=True):
        category["name"] = name
    (folder / "annotations.json").write_text(json.dumps(content))
    return content


def make_voc(folder: Path, content: dict, images: Path, splits: dict[str, list[int]]) -> None:
    """The same in Pascal VOC's layout, with the images of these ids in each split."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for image in content["images"]:
        shutil.copy(images / image["file_name"], folder / "JPEGImages")
        objects = ""
        for a in content["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = a["bbox"]  # VOC counts pixels from 1, and the last one is inside
                objects += (
                    f"<object><name>{names[a['category_id']]}</name><difficult>0</difficult>"
                    f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
                    f"<ymax>{y + h}</ymax></bndbox></object>"
                )
        file = folder / "Annotations" / Path(image["file_name"]).with_suffix(".xml")
        file.write_text(f"<annotation>{objects}</annotation>")
    stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    for split, ids in splits.items():
        text = "".join(f"{stems[i]}\n" for i in ids)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(text)


def make_yolo(folder: Path, content: dict, images: Path, splits: dict[str, list[int]]) -> None:
    """The same in YOLO's layout."""
    by_id = {image["id"]: image for image in content["images"]}
    for split, ids in splits.items():
        for part in ("images", "labels"):
            (folder / part / split).mkdir(parents=True)
        for i in ids:
            image = by_id[i]
            shutil.copy(images / image["file_name"], folder / "images" / split)
            lines = []
            for a in content["annotations"]:
                if a["image_id"] == i:
                    x, y, w, h = a["bbox"]
                    box = (x + w / 2) / image["width"], (y + h / 2) / image["height"]
                    box += w / image["width"], h / image["height"]
                    numbers = " ".join(f"{v:.8f}" for v in box)
                    lines.append(f"{a['category_id'] - 1} {numbers}\n")
            label = (folder / "labels" / split / image["file_name"]).with_suffix(".txt")
            label.write_text("".join(lines))
    data = {"names": dict(enumerate(NAMES)), **{s: f"images/{s}" for s in splits}}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
