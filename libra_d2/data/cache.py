"""Images kept at their size: a file is decoded and resized once, not in every epoch."""

import copy
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.data.transforms import (
    AugmentationList,
    ResizeShortestEdge,
    ResizeTransform,
    Transform,
)
from detectron2.utils.file_io import PathManager

from .resize import TorchResizeShortestEdge

__all__ = ["CachingMapper", "use_cache"]

_CHANNELS = {"BGR": 3, "RGB": 3, "L": 1}  # of the formats whose images are bytes


class CachingMapper:
    """detectron2's mapper, which takes images that it has resized before from a folder.

    What it gives is the same to the bit. A file there is named by the image's path, date and length
    and by its sizes and the kind of resizing: runs can share the folder.

    Args:
        mapper: it; its first augmentation brings images to one of several sizes.
        folder: of the files; made if it is not there.
        records: of the images, with their heights and widths.

    Raises:
        ValueError: if it is another mapper, resizes otherwise or gives no bytes; if records have no
            sizes; if the folder has no room for the images or can't be written to.
    """

    def __init__(self, mapper: DatasetMapper, folder: str | Path, records: Sequence[dict]):
        augmentations = getattr(getattr(mapper, "augmentations", None), "augs", [])
        self.resize = next(iter(augmentations), None)
        is_resize = type(self.resize) in (ResizeShortestEdge, TorchResizeShortestEdge)
        if type(mapper) is not DatasetMapper or not is_resize:
            raise ValueError(
                "DATALOADER.CACHE needs detectron2's DatasetMapper, with ResizeShortestEdge as its "
                f"first augmentation (no INPUT.CROP); this is {type(mapper).__name__} with "
                f"{self.resize}"
            )
        if self.resize.is_range and len(set(self.resize.short_edge_length)) > 1:
            raise ValueError(
                "DATALOADER.CACHE keeps an image at each of its sizes, which are too many with "
                "INPUT.MIN_SIZE_TRAIN_SAMPLING 'range'; 'choice' is right for it"
            )
        if mapper.image_format not in _CHANNELS:
            raise ValueError(
                f"DATALOADER.CACHE needs INPUT.FORMAT {', '.join(_CHANNELS)}; it is "
                f"{mapper.image_format}"
            )
        self.mapper, self.others, self.folder = mapper, augmentations[1:], Path(folder)
        self.num_channels = _CHANNELS[mapper.image_format]
        self.writes = True  # until it fails
        self._prepare(records)

    def __call__(self, record: dict) -> dict | None:
        """A model's input of an image's record."""
        height, width = record["height"], record["width"]
        transform = self.resize.get_transform(np.broadcast_to(np.uint8(0), (height, width, 1)))
        file = self._keep(record, transform) if isinstance(transform, ResizeTransform) else None
        if file is None:
            return self._after(transform)(record)
        size = {"height": transform.new_h, "width": transform.new_w}
        mapper = self._after(_ResizedBefore.like(transform))
        # The file has the channels in the mapper's order, whatever a viewer takes them for.
        mapper.image_format = "L" if self.num_channels == 1 else "RGB"
        result = mapper({**record, **size, "file_name": str(file)})
        if result is not None:
            result.update(file_name=record["file_name"], height=height, width=width)
        return result

    def _after(self, resize: Transform) -> DatasetMapper:
        """The mapper in which the size is not drawn once more."""
        mapper = copy.copy(self.mapper)
        mapper.augmentations = AugmentationList([resize, *self.others])
        return mapper

    def _keep(self, record: dict, transform: ResizeTransform) -> Path | None:
        """The file of the resized image, made if it is not there; None if it can't be."""
        sizes = _sizes(transform)
        file = self._file(record["file_name"], sizes)
        if self._is_whole(file, sizes):
            return file
        if not self.writes:
            return None
        image = read_image(record["file_name"], self.mapper.image_format)
        check_image_size(dict(record), image)
        image = transform.apply_image(image)
        # Several processes may be at the same image.
        beside = file.with_suffix(f".{uuid.uuid4().hex}")
        try:
            with open(beside, "wb") as stream:
                stream.write(self._header(sizes) + image.tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
        except OSError as error:
            self.writes = False
            logging.getLogger(__name__).warning(
                "DATALOADER.CACHE '%s' takes no more images (%s); loading goes on without",
                *(self.folder, error.strerror or error),
            )
            return None
        finally:
            beside.unlink(missing_ok=True)
        return file

    def _file(self, source: str, sizes: tuple[int, ...]) -> Path:
        path = os.path.abspath(PathManager.get_local_path(source))
        status = os.stat(path)
        image = path, status.st_mtime_ns, status.st_size, self.mapper.image_format
        how = type(self.resize).__name__, self.resize.interp
        return self.folder / f"{hashlib.sha256(repr((image, sizes, how)).encode()).hexdigest()}.ppm"

    def _header(self, sizes: tuple[int, ...]) -> bytes:
        """Of a PPM file, or PGM of one channel."""
        return b"P%d\n%d %d\n255\n" % (6 if self.num_channels == 3 else 5, sizes[3], sizes[2])

    def _num_bytes(self, sizes: tuple[int, ...]) -> int:
        return len(self._header(sizes)) + sizes[2] * sizes[3] * self.num_channels

    def _is_whole(self, file: Path, sizes: tuple[int, ...]) -> bool:
        try:
            return file.stat().st_size == self._num_bytes(sizes)
        except FileNotFoundError:
            return False

    def _prepare(self, records: Sequence[dict]) -> None:
        """Makes the folder, which has to have room for all images at all their sizes."""
        if not all("height" in record and "width" in record for record in records):
            raise ValueError("DATALOADER.CACHE needs the height and width of all images")
        folder = self.folder.absolute()
        above = next(place for place in (folder, *folder.parents) if place.is_dir())
        free, is_writable = shutil.disk_usage(above).free, os.access(above, os.W_OK)
        images = {r["file_name"]: self._all_sizes(r["height"], r["width"]) for r in records}
        missing = sum(self._num_bytes(x) for every in images.values() for x in every)
        if missing > free or not is_writable:  # look which are there, which takes longer
            missing = sum(
                self._num_bytes(x)
                for name, every in images.items()
                for x in every
                if not self._is_there(name, x)
            )
        if missing > free:
            raise ValueError(
                f"DATALOADER.CACHE '{self.folder}' needs {missing / 2**30:.1f} GiB more for "
                f"{len(images)} images, each at all its sizes (INPUT.MIN_SIZE_TRAIN), and "
                f"{free / 2**30:.1f} GiB are free there"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"DATALOADER.CACHE '{self.folder}' must be a folder: {error.strerror}"
            ) from error
        if missing and not is_writable:
            raise ValueError(f"DATALOADER.CACHE '{self.folder}' can't be written to")

    def _all_sizes(self, height: int, width: int) -> set[tuple[int, ...]]:
        """What an image of this size may be resized to, as :func:`_sizes` has it."""
        lengths = filter(None, self.resize.short_edge_length)  # 0 leaves an image as it is
        shapes = (
            self.resize.get_output_shape(height, width, length, self.resize.max_size)
            for length in lengths
        )
        return {(height, width, *shape) for shape in shapes}

    def _is_there(self, source: str, sizes: tuple[int, ...]) -> bool:
        try:
            return self._is_whole(self._file(source, sizes), sizes)
        except OSError:  # no such image, which is said when it is loaded
            return False


def _sizes(transform: ResizeTransform) -> tuple[int, ...]:
    """Height and width before and after."""
    return transform.h, transform.w, transform.new_h, transform.new_w


class _ResizedBefore(ResizeTransform):
    """Resizes boxes, masks and points of an image that has its size."""

    @classmethod
    def like(cls, transform: ResizeTransform) -> "_ResizedBefore":
        return cls(*_sizes(transform), transform.interp)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """The image itself; of a mask, for which there is another interpolation, the resized."""
        if interp is not None:
            return super().apply_image(img, interp)
        return np.require(img, requirements=["C", "W"])  # as resizing gives it


def use_cache(
    mapper: Callable[[dict], Any], cfg: CfgNode, records: Sequence[dict]
) -> Callable[[dict], Any]:
    """The mapper of a loader, with ``DATALOADER.CACHE`` if it is set.

    Args:
        mapper: it.
        cfg: the run's config.
        records: what is loaded.

    Raises:
        ValueError: as :class:`CachingMapper`.
    """
    if not cfg.DATALOADER.CACHE:
        return mapper
    return CachingMapper(mapper, cfg.DATALOADER.CACHE, records)
