"""Data sets named in place: ``coco:ANNOTATIONS[:IMAGES]``, ``voc:ROOT:SPLIT``, ``yolo:YAML:SPLIT``.

Such a name may stand in a config or on a command line wherever a registered one may. Behind it each
becomes what detectron2 knows best, a file in COCO's format, with the classes of the model in the
model's order: so all are read by its reader and scored by its COCO evaluator.
"""

import functools
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from libra_d2.config import suggest

from .coco_json import BOM, Coco, is_usual_id, read_coco
from .digits import SPLITS
from .problems import is_useful
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["Source", "check_registered", "is_source", "open_data", "open_source", "register_source"]

FORMS = {
    "coco": "coco:ANNOTATIONS.json or coco:ANNOTATIONS.json:IMAGES",
    "voc": "voc:ROOT:SPLIT",
    "yolo": "yolo:DATA.yaml:SPLIT",
}


@dataclass(frozen=True)
class Source:
    """A data set that has been read."""

    name: str
    coco: Coco
    image_root: Path
    json_file: Path | None = None  # if it is in COCO's format itself
    files: tuple[Path, ...] = ()  # that describe it

    @property
    def classes(self) -> list[str]:
        return self.coco.class_names()


def is_source(name: object) -> bool:
    """Whether a data set's name is of one of the forms."""
    return isinstance(name, str) and name.partition(":")[0] in FORMS and ":" in name


def open_source(name: str) -> Source:
    """Reads a data set named in place.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    kind, _, rest = name.partition(":")
    try:
        if kind == "coco":
            file, root = _coco_parts(rest)
            try:
                coco = read_coco(str(file))
            except ValueError as error:
                raise ValueError(f"{file} {error}") from None
            return Source(name, coco, root or _guess_images(file, coco), file, (file,))
        place, _, split = rest.rpartition(":")
        if not place or not split:
            raise ValueError(f"must be {FORMS[kind]}")
        if kind == "voc":
            root = Path(place).expanduser()
            return Source(name, read_voc(root, split), root / "JPEGImages")
        file = Path(place).expanduser()
        return Source(name, *read_yolo(file, split), files=(file,))
    except (ValueError, OSError) as error:
        raise ValueError(f"data set '{name}': {error}") from None


def open_data(name: str) -> Source:
    """Reads a data set named in place, or registered with a file in COCO's format.

    Raises:
        ValueError: naming the data set or file and what is wrong.
    """
    if is_source(name):
        return open_source(name)
    check_registered(name)
    metadata = MetadataCatalog.get(name)
    if not metadata.get("json_file"):
        raise ValueError(f"data set '{name}' has no file in COCO's format to look at")
    if name in SPLITS:
        DatasetCatalog.get(name)  # draws it
    source = open_source(f"coco:{metadata.json_file}:{metadata.image_root}")
    return replace(source, name=name)


def check_registered(name: str) -> None:
    """Raises ``ValueError`` if a name is none that detectron2 knows."""
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"data set '{name}' is not registered{suggest(str(name), DatasetCatalog.list())}; "
            f"name your own in place: {'; '.join(FORMS.values())}"
        )


def _coco_parts(rest: str) -> tuple[Path, Path | None]:
    """The annotation file and, if it is named, the folder of images; both may have colons."""
    if not rest:
        raise ValueError(f"must be {FORMS['coco']}")
    colons = [i for i, letter in enumerate(rest) if letter == ":"]
    for i in (len(rest), *reversed(colons)):
        file, images = Path(rest[:i]).expanduser(), rest[i + 1 :]
        if file.is_file():
            break
    else:
        file = Path(rest[: colons[-1]] if colons else rest)
        raise ValueError(f"{file} does not exist or is not a file")
    if images:
        if not Path(images).expanduser().is_dir():
            raise ValueError(f"{images} does not exist or is not a folder")
        return file, Path(images).expanduser()
    return file, None


def _guess_images(file: Path, coco: Coco) -> Path:
    """The folder of images, where it is not said: in the places where people put it."""
    here, name = file.resolve().parent, file.stem.removeprefix("instances_")
    places = [here, here / "images", here.parent / "images", here / name, here.parent / name]
    places += [here / "images" / name, here.parent / "images" / name, here.parent]
    first = coco.images[0].file_name or ""
    for place in places:
        if (place / first).is_file():
            return place
    raise ValueError(
        f"image '{first}' is neither beside {file} nor in an images folder near it; name the "
        f"folder: {FORMS['coco']}"
    )


def register_source(
    source: Source, classes: Sequence[str] = (), drop_bad_boxes: bool = False
) -> None:
    """Registers a data set with detectron2 under its name, in place of what has this name.

    Args:
        source: the data set.
        classes: those of the model, in its order, of which the data set may lack some; empty for
            its own.
        drop_bad_boxes: whether boxes that make no sense are left out, not left to the checks.

    Raises:
        ValueError: if the data set has a class that is not among them.
    """
    classes = list(classes) or source.classes
    check_classes(source.name, source.classes, classes)
    is_as_wanted = source.classes == classes and not drop_bad_boxes
    if source.json_file and is_as_wanted and _suits_pycocotools(source):
        file = source.json_file
    else:
        file = Path(_scratch().name) / f"{len(list(Path(_scratch().name).iterdir()))}.json"
        file.write_bytes(_with_classes(source, classes, drop_bad_boxes))
    for catalog in (DatasetCatalog, MetadataCatalog):
        if source.name in catalog.list():
            catalog.remove(source.name)
    root = str(source.image_root)
    DatasetCatalog.register(source.name, lambda: load_coco_json(str(file), root, source.name))
    MetadataCatalog.get(source.name).set(
        json_file=str(file), image_root=root, evaluator_type="coco", thing_classes=classes
    )
    MetadataCatalog.get(source.name).files = [str(f) for f in source.files]


def check_classes(name: str, own: Sequence[str], classes: Sequence[str]) -> None:
    """Raises ``ValueError`` if a data set has a class that a model has not."""
    for other in own:
        if other not in classes:
            raise ValueError(
                f"data set '{name}' has the class '{other}', which is not among those trained on"
                f"{suggest(other, classes)}: {', '.join(classes)}; DATASETS.CLASS_NAMES may name "
                "them all"
            )


def _suits_pycocotools(source: Source) -> bool:
    """Whether it and detectron2 read the file, and take no object's id for that of none."""
    with open(source.json_file, "rb") as file:
        if file.read(len(BOM)) == BOM:
            return False
    images, annotations = source.coco.images, source.coco.annotations or ()
    return all(isinstance(x, int) for i in images for x in (i.height, i.width)) and all(
        is_usual_id(a)
        and a.area is not None
        and a.iscrowd is not msgspec.UNSET
        and a.ignore in (msgspec.UNSET, 0)
        for a in annotations
    )


def _with_classes(source: Source, classes: list[str], drop_bad_boxes: bool) -> bytes:
    """The annotations as json, counted from 1, with all that pycocotools reads.

    Classes are the model's, counted from 1 too, unless the source has just these.
    """
    ids = {name: i for i, name in enumerate(classes, start=1)}
    if source.classes == classes:
        ids = {category.name: category.id for category in source.coco.categories}
    new = {category.id: ids[category.name] for category in source.coco.categories}
    # Whatever else a file has is kept.
    coco = source.json_file.read_bytes() if source.json_file else msgspec.json.encode(source.coco)
    content = json.loads(coco)  # with NaN, as Python writes it
    content["categories"] = [{"id": i, "name": name} for name, i in ids.items()]
    for image in content["images"]:
        image |= {side: round(image[side]) for side in ("height", "width")}
    annotations = content["annotations"] = content.get("annotations") or []
    if not source.json_file or drop_bad_boxes:
        sizes = {image.id: (image.width, image.height) for image in source.coco.images}
        # Of a negative size they are wrong, which is for the checks to say.
        useful = [
            a
            for a in annotations
            if (min(a["bbox"][2:]) < 0 and not drop_bad_boxes)
            or is_useful(a["bbox"], *sizes[a["image_id"]])
        ]
        if len(useful) < len(annotations):
            logging.getLogger(__name__).warning(
                "%s: left out, as without extent or outside of the image: %d of %d boxes",
                source.name,
                len(annotations) - len(useful),
                len(annotations),
            )
        annotations = content["annotations"] = useful
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation["category_id"] = new[annotation["category_id"]]
        annotation.setdefault("iscrowd", 0)
        if annotation.pop("ignore", 0):
            annotation["iscrowd"] = 1
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    return json.dumps(content).encode()


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """A folder that goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="libra_d2_")
