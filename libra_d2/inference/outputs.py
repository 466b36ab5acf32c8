"""What is written of predictions: json, csv, labels, pictures, crops, a sheet, a video."""

import csv
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from detectron2.structures import BoxMode
from PIL import Image
from tqdm import tqdm

from libra_d2.checkpoint import write_whole
from libra_d2.drawing import draw, make_sheet
from libra_d2.engine.output_dir import is_run_file

from .inputs import Images, Item
from .result import Result

__all__ = ["Sink", "check_outputs", "open_sinks"]

_SHEET = 8  # images on a sheet, if it is not said
_PICTURES = (".jpg", ".jpeg", ".png")


class Sink(Protocol):
    """Something that is written of results."""

    path: Path | None  # where to

    def add(self, item: Item, result: Result) -> None:
        """Takes one image's."""

    def close(self) -> None:
        """Writes what is left, once all are there."""


_FILES = ("json", "json_images", "csv", "sheet", "video")
_FOLDERS = ("txt", "save_images", "crop")


def check_outputs(options: dict[str, Any], images: Images, model: str) -> None:
    """Checks that what is to be written can be, and takes the place of nothing unasked.

    Args:
        options: of the command line, by name.
        images: what is looked at.
        model: the run's folder, weights or config.

    Raises:
        ValueError: naming the option and what is wrong.
    """
    inputs = {Path(file).resolve() for file in images.files}
    inputs.add(Path(model).resolve())
    places: dict[Path, str] = {}
    for name in (*_FILES, *_FOLDERS):
        if not options.get(name):
            continue
        option, path = f"--{name.replace('_', '-')}", Path(options[name])
        if path.resolve() in places:
            raise ValueError(f"{option} and {places[path.resolve()]} are both '{path}'")
        places[path.resolve()] = option
        (_check_file if name in _FILES else _check_folder)(option, path, inputs)
        if (
            path.exists()
            and not options.get("overwrite")
            and (path.is_file() or any(path.iterdir()))
        ):
            raise ValueError(f"{option} '{path}' exists; give --overwrite to write there")
        _check_writable(path.parent if name in _FILES else path)
    if options.get("video") and images.fps is None:
        raise ValueError("--video needs a video or a camera as its source")


def _check_file(option: str, path: Path, inputs: set[Path]) -> None:
    if path.is_dir():
        raise ValueError(f"{option} '{path}' is a folder")
    if any(path.exists() and file.exists() and path.samefile(file) for file in inputs):
        raise ValueError(f"{option} '{path}' is read itself; it would be lost")
    if is_run_file(path):
        raise ValueError(f"{option} '{path}' is a file of a training run; it would be lost")
    endings = {"--sheet": _PICTURES, "--video": (".mp4",)}.get(option)
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{option} must end in {' or '.join(endings)}, got '{path}'")


def _check_folder(option: str, path: Path, inputs: set[Path]) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} '{path}' is not a folder")
    if any(path.resolve() in file.parents for file in inputs):
        raise ValueError(f"{option} '{path}' is a folder of what is read; give another")


def _check_writable(folder: Path) -> None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"folder '{folder}' cannot be written to: {error.strerror}") from error


def open_sinks(options: dict[str, Any], images: Images) -> list[Sink]:
    """What command-line options ask to be written; a line an image on the screen if nothing."""
    names = _unique_names(images.files)
    kinds: dict[str, Any] = {
        "json": lambda path: _Json(path, images, coco=True),
        "json_images": lambda path: _Json(path, images, coco=False),
        "csv": _Csv,
        "txt": lambda path: _Txt(path, names),
        "save_images": lambda path: _Pictures(path, names),
        "crop": lambda path: _Crops(path, names),
        "sheet": lambda path: _Sheet(
            path, options["columns"], options["num_images"] or _SHEET, images
        ),
        "video": lambda path: _Video(path, images.fps),
    }
    sinks = []
    for name, make in kinds.items():
        if options.get(name):
            path = Path(options[name])
            (path.parent if name in _FILES else path).mkdir(parents=True, exist_ok=True)
            sinks.append(make(path))
    return sinks or [_Screen()]


def _unique_names(files: Sequence[str]) -> dict[str, str]:
    """What to call what is written of a file: its name, with folders where names are the same."""
    stems = Counter(Path(file).stem for file in files)
    root = os.path.commonpath([Path(f).resolve().parent for f in files]) if files else ""
    names, taken = {}, set()
    for file in files:
        path = Path(file)
        if stems[path.stem] > 1:
            relative = os.path.relpath(path.resolve(), root)
            names[file] = relative.replace(os.sep, "_").replace(".", "_")
        else:
            names[file] = path.stem
        name = names[file]
        names[file] = next(
            n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken
        )
        taken.add(names[file])
    return names


class _Screen:
    path = None

    def add(self, item: Item, result: Result) -> None:
        counts = Counter(result.class_names)
        what = ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "nothing"
        tqdm.write(f"{item.name}: {what}")

    def close(self) -> None:
        pass


class _Json:
    def __init__(self, path: Path, images: Images, *, coco: bool):
        self.path, self.images, self.coco = path, images, coco
        self.records: list[dict] = []

    def add(self, item: Item, result: Result) -> None:
        if self.coco:
            records = result.to_coco(item.image_id, self.images.category_ids)
            if item.truth is None:  # there is no file that says which image has which id
                records = [{**record, "file_name": item.name} for record in records]
            self.records += records
            return
        height, width = result.image.shape[:2]
        self.records.append(
            {"file": item.name, "width": width, "height": height, "objects": result.to_dicts()}
        )

    def close(self) -> None:
        text = json.dumps(self.records, ensure_ascii=False, indent=None if self.coco else 1)
        write_whole(str(self.path), lambda file: Path(file).write_text(text, encoding="utf-8"))


class _Csv:
    HEADER = ("file", "class", "score", "x1", "y1", "x2", "y2")

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[tuple] = [self.HEADER]

    def add(self, item: Item, result: Result) -> None:
        self.rows += [(item.name, r["class"], r["score"], *r["box"]) for r in result.to_dicts()]

    def close(self) -> None:
        def write(file: str) -> None:
            with open(file, "w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(self.rows)

        write_whole(str(self.path), write)


class _Folder:
    """Files named like the images."""

    def __init__(self, folder: Path, names: dict[str, str]):
        self.path, self.names = folder, names

    def name(self, item: Item) -> str:
        return self.names.get(item.name, Path(item.name).name)

    def close(self) -> None:
        pass


class _Txt(_Folder):
    def add(self, item: Item, result: Result) -> None:
        text = "".join(f"{line}\n" for line in result.to_yolo())
        (self.path / f"{self.name(item)}.txt").write_text(text)


class _Pictures(_Folder):
    def add(self, item: Item, result: Result) -> None:
        _save(result.plot(), self.path / f"{self.name(item)}.jpg")


class _Crops(_Folder):
    def add(self, item: Item, result: Result) -> None:
        height, width = result.image.shape[:2]
        for i, (name, box) in enumerate(zip(result.class_names, result.boxes, strict=True), 1):
            x1, y1, x2, y2 = (int(x) for x in (*np.floor(box[:2]), *np.ceil(box[2:])))
            crop = result.image[max(y1, 0) : min(y2, height), max(x1, 0) : min(x2, width)]
            if crop.size:
                # A class may be called anything; a folder may not.
                safe = "".join(c if c.isalnum() or c in " -_." else "_" for c in name).strip(".")
                folder = self.path / (safe or "_")
                folder.mkdir(exist_ok=True)
                _save(crop, folder / f"{self.name(item)}_{i}.jpg")


class _Sheet:
    def __init__(self, path: Path, columns: int, most: int, images: Images):
        self.path, self.columns, self.most, self.names = path, columns, most, images.class_names
        self.tiles: list[list[np.ndarray]] = []

    def add(self, item: Item, result: Result) -> None:
        if len(self.tiles) < self.most:
            tiles = [result.plot()]
            if item.truth and "annotations" in item.truth:
                tiles.insert(0, _draw_truth(result.image, item.truth, self.names))
            self.tiles.append(tiles)

    def close(self) -> None:
        if self.tiles:
            _save(make_sheet(self.tiles, self.columns), self.path)


class _Video:
    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.writer = path, fps, None
        self.folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial_")
        self.partial = str(Path(self.folder.name) / path.name)

    def add(self, item: Item, result: Result) -> None:
        height, width = result.image.shape[:2]
        if self.writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(self.partial, code, self.fps, (width, height))
        self.writer.write(np.ascontiguousarray(result.plot()[:, :, ::-1]))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()
            os.replace(self.partial, self.path)
        self.folder.cleanup()


def _draw_truth(image: np.ndarray, record: dict, names: Sequence[str]) -> np.ndarray:
    objects = record["annotations"]
    boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
    ids = [o["category_id"] for o in objects]
    return draw(image, np.array(boxes), ids, [names[i] if names else str(i) for i in ids])


def _save(image: np.ndarray, path: Path) -> None:
    try:
        Image.fromarray(image).save(path, quality=92)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be written: {error}") from error
