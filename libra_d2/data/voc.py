"""Reads data sets in Pascal VOC's layout: Annotations, JPEGImages and ImageSets/Main."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

from libra_d2.config import suggest

from .coco_json import Annotation, Category, Coco, make_image
from .images import IMAGE_SUFFIXES, examine, read_text

__all__ = ["read_voc"]


def read_voc(root: Path, split: str) -> Coco:
    """Reads one split.

    Boxes are taken as VOC defines them: corners are pixels counted from 1, both inside the box.
    Difficult objects become crowd regions, which are neither trained on nor scored. Sizes are those
    that annotations tell, or else the files' own; an image that cannot be read has no objects.

    Args:
        root: the folder of Annotations, JPEGImages and ImageSets.
        split: name of a file of ImageSets/Main.

    Returns:
        Its images, by names relative to JPEGImages, and objects; the classes in the order of the
        alphabet.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        if not (root / part).is_dir():
            raise ValueError(f"{root} must be a folder with {part}")
    splits = sorted(file.stem for file in (root / "ImageSets" / "Main").glob("*.txt"))
    if split not in splits:
        raise ValueError(
            f"{root} has no split '{split}'{suggest(split, splits)}; there is {', '.join(splits)}"
        )
    names = _read_names(root, split)
    files: dict[str, str] = {}
    wanted = set(names)
    for file in sorted((root / "JPEGImages").iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES and file.stem in wanted:
            if file.stem in files:
                raise ValueError(f"{root} has two images '{file.stem}' in JPEGImages")
            files[file.stem] = file.name
    files = {name: files.get(name, f"{name}.jpg") for name in names}
    read = [_read_annotations(root / "Annotations" / f"{name}.xml") for name in names]
    found = {name for _, objects in read for name, _, _ in objects}
    if not found:
        raise ValueError(f"{root} has no object in split '{split}'")
    classes = {name: i for i, name in enumerate(sorted(found), start=1)}
    corners = [corners for _, objects in read for _, corners, _ in objects]
    # Fractions of the image are no VOC; that is found where boxes are checked.
    in_pixels = max(max(c) for c in corners) > 1
    sizes = examine([root / "JPEGImages" / files[name] for name in names])
    images, annotations = [], []
    for i, (name, (said, objects), size) in enumerate(zip(names, read, sizes, strict=True), 1):
        # The size that the boxes belong to; that a file has another is found with the images.
        images.append(make_image(i, files[name], said or size))
        for class_name, own, difficult in objects if not isinstance(size, str) else ():
            box = _box(own) if in_pixels else (own[0], own[1], own[2] - own[0], own[3] - own[1])
            annotations.append(
                Annotation(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=classes[class_name],
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=difficult,
                )
            )
    categories = [Category(id=i, name=name) for name, i in classes.items()]
    return Coco(images=images, categories=categories, annotations=annotations)


def _read_names(root: Path, split: str) -> list[str]:
    """The names of a split's images. Lists of one class have a number behind each name."""
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    lines = [line.strip() for line in read_text(file).splitlines()]
    names, missing = [], []
    for line in filter(None, lines):
        flagged = re.fullmatch(r"(.*\S)\s+(-1|0|1)", line)
        candidates = (line, flagged[1]) if flagged else (line,)
        found = [n for n in candidates if (root / f"Annotations/{n}.xml").is_file()]
        names.append(found[0] if found else line)
        missing += [] if found else [line]
    if missing:
        raise ValueError(
            f"{file} names '{missing[0]}', which has no file in Annotations, nor have "
            f"{len(missing) - 1} others"
        )
    if not names:
        raise ValueError(f"{file} names no image")
    return list(dict.fromkeys(names))


Corners = tuple[float, float, float, float]


def _read_annotations(
    file: Path,
) -> tuple[tuple[int, int] | None, list[tuple[str, Corners, int]]]:
    """Height and width if they are told; class, corners and whether difficult of each object."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{file} is not valid xml ({error})") from None
    sizes = [root.findtext(f"size/{side}") or "" for side in ("height", "width")]
    is_told = all(size.strip().isdecimal() and int(size) > 0 for size in sizes)
    size = tuple(map(int, sizes)) if is_told else None
    elements = enumerate(root.findall("object"), start=1)
    return size, [_read_object(file, i, element) for i, element in elements]


def _read_object(file: Path, number: int, element: ElementTree.Element) -> tuple[str, Corners, int]:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{file}: object {number} has no name")
    corners = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{corner}")
        try:
            corners.append(float(text))
        except (TypeError, ValueError):
            corners.append(math.nan)
        if not abs(corners[-1]) < 1e7:
            raise ValueError(f"{file}: object {number} has {corner} {text!r}, no number")
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return name, tuple(corners), int(difficult)


def _box(corners: Corners) -> Corners:
    """x, y, width and height in pixels from 0."""
    x, y, right, bottom = corners
    # A box without extent stays one, though a pixel from corner to the same corner has some.
    width, height = (far - near + (far > near) for near, far in ((x, right), (y, bottom)))
    return x - 1, y - 1, width, height
