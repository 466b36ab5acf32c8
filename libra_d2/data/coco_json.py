"""COCO annotations: what a file of them has to hold, and reading it with an error to act on."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import msgspec

__all__ = [
    "Annotation",
    "Category",
    "Coco",
    "Image",
    "has_polygon",
    "is_crowd",
    "is_usual_id",
    "need",
    "need_masks",
    "need_polygons",
    "read_coco",
]

Number = int | float  # whole numbers, which some tools write as 1.0
Length = Annotated[int, msgspec.Meta(gt=0)] | Annotated[float, msgspec.Meta(gt=0)]
BOM = b"\xef\xbb\xbf"  # that some editors begin a file with
_FAR = 1e7  # pixels; no image is so large
Name = Annotated[str, msgspec.Meta(min_length=1)]


class Image(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One image; height and width in pixels."""

    id: Number | str
    height: Length
    width: Length
    file_name: Name | None = None
    coco_url: Name | None = None  # what LVIS names its images by


def make_image(image_id: int, file_name: str, size: tuple[int, int] | str) -> Image:
    """One whose height and width are known; or 1 and 1 if ``size`` says what is wrong with it."""
    height, width = (1, 1) if isinstance(size, str) else size
    return Image(id=image_id, file_name=file_name, height=height, width=width)


class Category(msgspec.Struct, kw_only=True):
    """One class."""

    id: Number
    name: Name


class Rle(msgspec.Struct, kw_only=True):
    """A mask, run-length encoded."""

    size: tuple[int, int]
    counts: str | list[int]


class Annotation(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One object; its box is x, y, width and height in pixels."""

    id: Number | str
    image_id: Number | str
    category_id: Number
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: Number | bool | msgspec.UnsetType = msgspec.UNSET  # 0 or 1
    ignore: Number | bool | msgspec.UnsetType = msgspec.UNSET  # some tools' word for the same
    segmentation: list[list[float]] | Rle | None = None
    keypoints: list[float] | None = None


class Coco(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The content of an annotation file."""

    images: Annotated[list[Image], msgspec.Meta(min_length=1)]
    categories: Annotated[list[Category], msgspec.Meta(min_length=1)]
    annotations: list[Annotation] | None = None

    def class_names(self) -> list[str]:
        """By category id, as detectron2 counts classes."""
        return [c.name for c in sorted(self.categories, key=lambda c: c.id)]


def read_coco(path: str) -> Coco:
    """Reads an annotation file: 450 MB in seconds.

    Raises:
        ValueError: naming what is not as it must be, and where.
    """
    content = Path(path).read_bytes().removeprefix(BOM)
    try:
        try:
            coco = msgspec.json.decode(content, type=Coco)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # Python writes NaN, which is no json
            coco = msgspec.convert(json.loads(content.decode()), type=Coco)
    except msgspec.ValidationError as error:
        raise ValueError(f"is not COCO json: {_plain(str(error))}") from None
    except (ValueError, RecursionError):
        raise ValueError("is not valid json") from None
    images, categories = (_ids(coco, kind) for kind in ("images", "categories"))
    _ids(coco, "annotations")
    names = Counter(c.name for c in coco.categories)
    if len(names) < len(coco.categories):
        raise ValueError(f"has two categories of the same name, '{names.most_common(1)[0][0]}'")
    for annotation in coco.annotations or ():
        polygons = annotation.segmentation if isinstance(annotation.segmentation, list) else []
        for name, values in (("bbox", annotation.bbox), *(("segmentation", p) for p in polygons)):
            if not all(abs(value) <= _FAR for value in values):  # nor is NaN
                raise ValueError(f"has annotation {annotation.id} whose {name} is not finite")
        if annotation.iscrowd not in (msgspec.UNSET, 0, 1):
            raise ValueError(
                f"has annotation {annotation.id} whose iscrowd is {annotation.iscrowd}, not 0 or 1"
            )
        for key, known in (("image_id", images), ("category_id", categories)):
            value = getattr(annotation, key)
            if value not in known:
                raise ValueError(f"has annotation {annotation.id} of the unknown {key} {value!r}")
    return coco


def is_crowd(annotation: Annotation) -> bool:
    """Whether it is a region of many objects, or a difficult one: not trained on, not scored."""
    marks = (annotation.iscrowd, annotation.ignore)
    return any(mark is not msgspec.UNSET and bool(mark) for mark in marks)


def has_polygon(annotation: Annotation) -> bool:
    """Whether its mask is of polygons of which one has three corners."""
    mask = annotation.segmentation
    return isinstance(mask, list) and any(len(p) >= 6 and len(p) % 2 == 0 for p in mask)


def is_usual_id(annotation: Annotation) -> bool:
    """Whether its id is a positive whole number."""
    return not isinstance(annotation.id, str) and annotation.id > 0 and annotation.id % 1 == 0


def need(annotations: list[Annotation], fields: tuple[str, ...]) -> None:
    """Raises ``ValueError`` if an annotation lacks a field, or has it empty."""
    for annotation in annotations:
        for field in fields:
            if getattr(annotation, field) in (None, [], msgspec.UNSET):
                raise ValueError(f"has annotation {annotation.id} without {field}")


def need_masks(annotations: list[Annotation]) -> None:
    """Raises ``ValueError`` if pycocotools could not score a mask."""
    need(annotations, ("segmentation",))
    for annotation in annotations:
        mask = annotation.segmentation
        if isinstance(mask, list) and (len(mask[0]) <= 4 or any(len(p) % 2 for p in mask)):
            raise ValueError(f"has annotation {annotation.id} with a polygon of too few corners")


def need_polygons(annotations: list[Annotation]) -> None:
    """Raises ``ValueError`` if masks are no polygons, where they are read as such.

    Single ones of fewer than three corners detectron2 leaves out; COCO has some.
    """
    need(annotations, ("segmentation",))
    is_usable = False
    for annotation in annotations:
        mask = annotation.segmentation
        if isinstance(mask, Rle) and not is_crowd(annotation):
            raise ValueError(
                f"has annotation {annotation.id} with a run-length encoded mask; INPUT.MASK_FORMAT "
                "bitmask reads it"
            )
        if isinstance(mask, list):
            is_usable |= has_polygon(annotation)
    if not is_usable:
        raise ValueError("has no polygon of three corners")


def _plain(message: str) -> str:
    """msgspec's message without its marks: what is wrong where."""
    what, _, where = message.replace("`", "").partition(" - at ")
    where = where.removeprefix("$").removeprefix(".")
    return f"{where}: {what[0].lower()}{what[1:]}" if where else what[0].lower() + what[1:]


def _ids(coco: Coco, kind: str) -> set:
    records = getattr(coco, kind) or ()
    ids = Counter(record.id for record in records)
    if len(ids) < len(records):
        raise ValueError(f"has two {kind} of the same id, {ids.most_common(1)[0][0]!r}")
    return set(ids)
