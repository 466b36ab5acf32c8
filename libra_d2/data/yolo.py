"""Reads data sets in YOLO's layout: a yaml file, images, and a text file of labels beside each."""

import math
import os
import reprlib
from collections import Counter
from pathlib import Path

import yaml
from detectron2.structures.masks import polygon_area

from libra_d2.config import suggest

from .coco_json import Annotation, Category, Coco, Image, make_image
from .images import examine, find_images, read_text

__all__ = ["read_yolo"]

_NO_SPLITS = ("path", "names", "nc", "download", "kpt_shape", "flip_idx", "channels", "yaml_file")
_SLACK = 0.01  # how far beyond 0 and 1 coordinates may be by rounding


def read_yolo(file: Path, split: str) -> tuple[Coco, Path]:
    """Reads one split: boxes, or polygons with the boxes around them; of poses the boxes.

    Args:
        file: the yaml file, with ``names``, the splits and maybe ``path``.
        split: one of them, such as "train".

    Returns:
        Its images and objects, the classes in the yaml's order; and the folder that the names of
        images are relative to. An image without a file of labels is one without objects, and so is
        one that cannot be read.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    content, classes = _read_yaml(file)
    splits = [
        str(key)
        for key, value in content.items()
        if key not in _NO_SPLITS and isinstance(value, (str, list)) and value
    ]
    if split not in splits:
        raise ValueError(
            f"{file} has no split '{split}'{suggest(split, splits)}; there is {', '.join(splits)}"
        )
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    paths = []
    for entry in entries:
        place = _find(file, content, str(entry))
        paths += _listed(place) if place.is_file() else find_images(place)
        if place.is_dir():
            _check_no_stray_labels(paths)
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise ValueError(f"{file}: split '{split}' has no images in {', '.join(map(str, entries))}")
    labels = [_label_file(path) for path in paths]
    shared = [path for path, n in Counter(labels).items() if n > 1 and path.is_file()]
    if shared:
        raise ValueError(f"{shared[0]} belongs to two images of the same name")
    if not any(label.is_file() for label in labels):
        raise ValueError(
            f"{file}: no image of split '{split}' has a file of labels; that of {paths[0]} would "
            f"be {labels[0]}"
        )
    sizes = examine(paths)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    coco = Coco(
        images=[
            make_image(i, str(path.relative_to(root)), size)
            for i, (path, size) in enumerate(zip(paths, sizes, strict=True), start=1)
        ],
        categories=[Category(id=i, name=name) for i, name in enumerate(classes, start=1)],
        annotations=[],
    )
    num_keypoints = math.prod(content.get("kpt_shape") or (0,))  # numbers of them
    for image, label, size in zip(coco.images, labels, sizes, strict=True):
        for annotation in _read_labels(label, image, len(classes), num_keypoints):
            annotation.id = len(coco.annotations) + 1
            if not isinstance(size, str):
                coco.annotations.append(annotation)
    return coco, root


def _read_yaml(file: Path) -> tuple[dict, list[str]]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist or is not a file")
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError:
        raise ValueError(f"{file} is not valid yaml") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{file} must have names, a list of the classes or a mapping 0: name, ...")
    if str(content.get("nc", len(names))) != str(len(names)):
        raise ValueError(f"{file} has nc {content['nc']} but {len(names)} names")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, int, float)) or name == "":
            raise ValueError(
                f"{file} has {reprlib.repr(name)} among its names; they must be text, and such as "
                "yes, no and null in quotation marks"
            )
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"{file} has two names that are the same")
    return content, names


def _find(file: Path, content: dict, entry: str) -> Path:
    """Where the images of a split are: relative to ``path``, which is to the yaml's folder."""
    here = file.resolve().parent
    bases = [here / str(content.get("path") or "."), Path(str(content.get("path") or ".")), here]
    # Some exporters write ../train/images for the train/images beside the yaml file.
    places = [base / e for base in bases for e in (entry, entry.removeprefix("../"))]
    for place in places:
        if place.exists():
            return Path(os.path.abspath(place))
    raise ValueError(f"{file}: '{entry}' does not exist; looked for it at {places[0]}")


def _listed(file: Path) -> list[Path]:
    """The images that a text file lists, relative to its folder."""
    lines = [line.strip() for line in read_text(file).splitlines()]
    return [Path(os.path.abspath(file.parent / line)) for line in lines if line]


def _label_file(image: Path) -> Path:
    """images/a.jpg has its labels in labels/a.txt; one in no such folder, beside itself."""
    parts = list(image.with_suffix(".txt").parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    file = Path(*parts)
    upper = file.with_suffix(".TXT")
    return upper if upper.is_file() and not file.is_file() else file


def _check_no_stray_labels(images: list[Path]) -> None:
    known = {_label_file(image) for image in images}
    folders = {label.parent for label in known}
    there = {file for folder in folders if folder.name != "images" for file in folder.glob("*.txt")}
    stray = sorted(
        file
        for file in there - known
        if file.name not in ("classes.txt", "labels.txt") and not file.name.startswith(".")
    )
    if stray:
        raise ValueError(f"{stray[0]} has no image, nor have {len(stray) - 1} others")


def _read_labels(
    file: Path, image: Image, num_classes: int, num_keypoints: int
) -> list[Annotation]:
    if not file.is_file():
        return []
    annotations = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            annotations.append(_read_label(line, where, image, num_classes, num_keypoints))
    return annotations


def _read_label(
    line: str, where: str, image: Image, num_classes: int, num_keypoints: int
) -> Annotation:
    try:
        index, *values = map(float, line.split())
    except ValueError:
        raise ValueError(f"{where}: '{line.strip()}' must be numbers") from None
    if index not in range(num_classes):
        raise ValueError(f"{where}: class {index:g} must be in 0 to {num_classes - 1}")
    if num_keypoints and len(values) != 4 + num_keypoints:
        raise ValueError(
            f"{where}: must be a class, x y width height and, as kpt_shape says, {num_keypoints} "
            f"numbers of keypoints; got {1 + len(values)} numbers"
        )
    values = values[:4] if num_keypoints else values  # keypoints are not read
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(
            f"{where}: must be a class and x y width height, or a class and the x y of three or "
            f"more corners; got {1 + len(values)} numbers"
        )
    if not all(math.isfinite(v) and -_SLACK <= v <= 1 + _SLACK for v in values):
        raise ValueError(f"{where}: coordinates must be fractions of the image, in [0, 1]")
    size = (image.width, image.height)
    if len(values) == 4:
        (x, y, w, h), polygon = values, None
        box = ((x - w / 2) * size[0], (y - h / 2) * size[1], w * size[0], h * size[1])
    else:
        polygon = [value * size[i % 2] for i, value in enumerate(values)]
        xs, ys = polygon[::2], polygon[1::2]
        box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
    return Annotation(
        id=0,
        image_id=image.id,
        category_id=int(index) + 1,
        bbox=box,
        area=float(polygon_area(xs, ys)) if polygon else box[2] * box[3],
        iscrowd=0,
        segmentation=[polygon] if polygon else None,
    )
