"""Images to look at: files, folders, globs, a video, a camera or a data set."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from libra_d2.data.images import IMAGE_SUFFIXES, find_images, open_image
from libra_d2.data.sources import is_source, open_source, register_source

__all__ = ["Images", "Item", "open_images"]

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass
class Item:
    """One image to look at."""

    name: str  # a path, or a frame's
    image_id: int | str
    load: Callable[[], np.ndarray]  # (H, W, 3) uint8, RGB
    truth: dict | None = None  # detectron2's dataset dict


@dataclass
class Images:
    """What to look at.

    Args:
        items: the images, which can be gone through once.
        number: how many they are; None if that is unknown.
        fps: images a second of a video; None of what is none.
        category_ids: of the model's classes in a data set; empty for 1, 2, ...
        class_names: of a data set.
        files: that are read, and must not be overwritten.
        is_endless: whether they end when they are interrupted.
    """

    items: Iterable[Item]
    number: int | None
    fps: float | None = None
    category_ids: Sequence[int] = ()
    class_names: Sequence[str] = ()
    files: Sequence[str] = field(default=(), repr=False)
    is_endless: bool = False


def open_images(sources: Sequence[str], limit: int | None = None) -> Images:
    """Finds out what is meant: images, folders and globs; or a video, a camera, a data set.

    Args:
        sources: as they are given on a command line.
        limit: the largest number of images; None for all.

    Raises:
        ValueError: if there is no such thing.
    """
    first = sources[0]
    is_data = is_source(first) or first in DatasetCatalog.list()
    is_video = Path(first).suffix.lower() in VIDEO_SUFFIXES
    is_camera = first.isascii() and first.isdigit() and not Path(first).exists()
    if is_data or is_video or is_camera:
        if len(sources) > 1:
            raise ValueError(f"'{first}' must be the only source")
        images = _dataset(first) if is_data else _video(int(first) if is_camera else first)
    else:
        images = _files(sources)
    if limit is not None:
        number = limit if images.number is None else min(limit, images.number)
        images.items, images.number = islice(images.items, limit), number
    return images


def _files(sources: Sequence[str]) -> Images:
    files: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = [str(file) for file in find_images(path)]
        elif path.is_file():
            found = [source]
        else:
            found = sorted(
                file for file in glob.glob(source, recursive=True) if Path(file).is_file()
            )
            if not found and not glob.has_magic(source):
                raise ValueError(f"'{source}' does not exist, nor is it the name of a data set")
        if not found:
            raise ValueError(f"'{source}' has no images ({', '.join(IMAGE_SUFFIXES)})")
        files += found
    items = (
        Item(file, i, lambda file=file: np.asarray(open_image(file)))
        for i, file in enumerate(files, start=1)
    )
    return Images(items, len(files), files=files)


def _dataset(name: str) -> Images:
    if is_source(name):
        register_source(open_source(name))
    try:
        records = DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:
        raise ValueError(f"data set '{name}' cannot be read: {error}") from error
    metadata = MetadataCatalog.get(name)
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    items = (
        Item(r["file_name"], r["image_id"], lambda r=r: np.asarray(open_image(r["file_name"])), r)
        for r in records
    )
    files = [record["file_name"] for record in records]
    files += metadata.get("files", ()) or filter(None, [metadata.get("json_file")])
    category_ids = sorted(ids, key=ids.get)
    names = metadata.get("thing_classes", ())
    return Images(items, len(records), None, category_ids, names, files)


def _video(source: str | int) -> Images:
    try:
        capture = cv2.VideoCapture(source)
        is_read, _ = capture.read() if capture.isOpened() else (False, None)
        capture.release()
    except (cv2.error, OverflowError):
        is_read = False
    if not is_read:
        what = f"camera {source}" if isinstance(source, int) else f"'{source}'"
        raise ValueError(f"{what} cannot be opened as a video")
    capture = cv2.VideoCapture(source)
    fps = capture.get(cv2.CAP_PROP_FPS)

    def frames() -> Iterator[Item]:
        i = 0
        while (frame := capture.read())[0]:
            i += 1
            image = frame[1][:, :, ::-1]
            yield Item(f"{Path(str(source)).stem}_{i:06d}", i, lambda image=image: image)
        capture.release()

    fps = fps if 0 < fps < 1000 else 25.0
    if isinstance(source, int):
        return Images(frames(), None, fps, is_endless=True)
    number = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Images(frames(), number, fps, files=[source])
