"""Reads data sets in Pascal VOC's layout: Annotations, JPEGImages and ImageSets/Main."""

from pathlib import Path
from xml.etree import ElementTree

from libra_d2.config import suggest

from .coco_json import Annotation, Category, Coco, make_image
from .images import IMAGE_SUFFIXES, examine

__all__ = ["read_voc"]


def read_voc(root: Path, split: str) -> Coco:
    """Reads one split.

    Boxes are taken as VOC defines them: corners are pixels counted from 1, both inside the box.
    Difficult objects become crowd regions, which are neither trained on nor scored. Sizes are the
    image files' own; an image that cannot be read has none, and no objects.

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
    files = {
        file.stem: file.name
        for file in sorted((root / "JPEGImages").iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    }
    files = {name: files.get(name, f"{name}.jpg") for name in names}
    objects = [_read_objects(root / "Annotations" / f"{name}.xml") for name in names]
    classes = {name: i for i, name in enumerate(sorted({o[0] for os in objects for o in os}), 1)}
    if not classes:
        raise ValueError(f"{root} has no object in split '{split}'")
    sizes = examine([root / "JPEGImages" / files[name] for name in names])
    images = [
        make_image(i, files[name], size)
        for i, (name, size) in enumerate(zip(names, sizes, strict=True), start=1)
    ]
    annotations = [
        Annotation(
            id=0, image_id=i, category_id=classes[name], bbox=box, area=box[2] * box[3], iscrowd=d
        )
        for i, (own, size) in enumerate(zip(objects, sizes, strict=True), start=1)
        for name, box, d in own
        if not isinstance(size, str)
    ]
    for i, annotation in enumerate(annotations, start=1):
        annotation.id = i
    categories = [Category(id=i, name=name) for name, i in classes.items()]
    return Coco(images=images, categories=categories, annotations=annotations)


def _read_names(root: Path, split: str) -> list[str]:
    """The names of a split's images. Lists of one class have a number behind each name."""
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    names, missing = [], []
    for line in filter(None, lines):
        found = [n for n in (line, line.split()[0]) if (root / f"Annotations/{n}.xml").is_file()]
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


def _read_objects(file: Path) -> list[tuple[str, tuple[float, float, float, float], int]]:
    """Class, box (x, y, width, height in pixels from 0) and whether difficult, of each object."""
    try:
        objects = ElementTree.parse(file).getroot().findall("object")
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is not valid xml ({error})") from None
    return [_read_object(file, i, element) for i, element in enumerate(objects, start=1)]


def _read_object(file: Path, number: int, element: ElementTree.Element):
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{file}: object {number} has no name")
    corners = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{corner}")
        try:
            corners.append(float(text))
        except (TypeError, ValueError):
            raise ValueError(f"{file}: object {number} has {corner} {text!r}, no number") from None
    x, y, right, bottom = corners
    # A box without extent stays one, though a pixel from corner to the same corner has some.
    width, height = (far - near + (far > near) for near, far in ((x, right), (y, bottom)))
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return name, (x - 1, y - 1, width, height), int(difficult)
