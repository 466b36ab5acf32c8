"""Images kept at their size: a file is decoded and resized once, not in every epoch."""

import contextlib
import copy
import hashlib
import logging
import os
import shutil
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

__all__ = ["CachingMapper", "use_cache"]

_CHANNELS = {"BGR": 3, "RGB": 3, "L": 1}  # of the formats whose images are bytes
_HEADER = b"P%d\n%d %d\n255\n"  # of a PPM or PGM file
_SUFFIX = ".ppm"


class CachingMapper:
    """detectron2's mapper, which takes images that it has resized before from a folder.

    What it gives is the same to the bit. A file there is named by the image's path, date and length
    and by its size and kind of resizing: runs can share the folder.

    Args:
        mapper: it; its first augmentation brings images to one of several sizes.
        folder: of the files.

    Raises:
        ValueError: if it is a mapper of another kind.
    """

    def __init__(self, mapper: DatasetMapper, folder: str):
        augmentations = getattr(getattr(mapper, "augmentations", None), "augs", [])
        self.resize = next(iter(augmentations), None)
        is_known = type(mapper).__call__ is DatasetMapper.__call__
        if not is_known or not isinstance(self.resize, ResizeShortestEdge):
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
        self.image_format = mapper.image_format
        self.writes = True

    def __call__(self, record: dict) -> dict | None:
        """A model's input of an image's record, which has its height and width."""
        size = record["height"], record["width"]
        transform = self.resize.get_transform(np.broadcast_to(np.uint8(0), (*size, 1)))
        file = self._keep(record, transform) if isinstance(transform, ResizeTransform) else None
        if file is None:
            return self._after(transform)(record)
        height, width = transform.new_h, transform.new_w
        kept = {**record, "file_name": str(file), "height": height, "width": width}
        result = self._after(_ResizedBefore.like(transform))(kept)
        if result is not None:
            result.update(file_name=record["file_name"], height=size[0], width=size[1])
        return result

    def _after(self, resize: Transform) -> DatasetMapper:
        """The mapper in which the size is not drawn once more."""
        mapper = copy.copy(self.mapper)
        mapper.augmentations = AugmentationList([resize, *self.others])
        return mapper

    def _keep(self, record: dict, transform: ResizeTransform) -> Path | None:
        """The file of the resized image, made if it is not there; None if it can't be."""
        num_channels = _CHANNELS[self.image_format]
        size = transform.new_h, transform.new_w
        header = _HEADER % (6 if num_channels == 3 else 5, *reversed(size))
        file = self.folder / self._name(record["file_name"], transform)
        # One that lost its end, as files do when power fails, is made anew.
        if file.is_file() and file.stat().st_size == len(header) + size[0] * size[1] * num_channels:
            return file
        if not self.writes:
            return None
        image = read_image(record["file_name"], self.image_format)
        check_image_size(dict(record), image)
        image = transform.apply_image(image)
        if self.image_format == "BGR":
            image = image[:, :, ::-1]
        beside = file.with_suffix(f".{os.getpid()}")  # several processes may be at the same image
        try:
            beside.write_bytes(header + image.tobytes())
            beside.replace(file)
        except OSError as error:
            self.writes = False
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            logging.getLogger(__name__).warning(
                "DATALOADER.CACHE '%s' takes no more images (%s); loading goes on without",
                *(self.folder, error.strerror or error),
            )
            return None
        return file

    def _name(self, source: str, transform: ResizeTransform) -> str:
        path = os.path.abspath(PathManager.get_local_path(source))
        status = os.stat(path)
        image = path, status.st_mtime_ns, status.st_size, _CHANNELS[self.image_format]
        how = type(transform).__name__, transform.interp, transform.new_h, transform.new_w
        return hashlib.sha256(repr((image, how)).encode()).hexdigest()[:32] + _SUFFIX

    def prepare(self, records: Sequence[dict]) -> None:
        """Makes the folder if all images, which need a height and width, have room there.

        Raises:
            ValueError: if they have not, or the folder can't be made or written to.
        """
        if not all("height" in record and "width" in record for record in records):
            raise ValueError("DATALOADER.CACHE needs the height and width of all images")
        needed = {r["file_name"]: self._num_bytes(r["height"], r["width"]) for r in records}
        folder = self.folder.absolute()
        there = sum(file.stat().st_size for file in folder.glob(f"*{_SUFFIX}"))
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free
        if sum(needed.values()) > there + free:
            raise ValueError(
                f"DATALOADER.CACHE '{self.folder}' needs {sum(needed.values()) / 2**30:.1f} GiB "
                f"for {len(needed)} images, each at all its sizes (INPUT.MIN_SIZE_TRAIN), and "
                f"{free / 2**30:.1f} GiB are free there"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"DATALOADER.CACHE '{self.folder}' must be a folder: {error.strerror}"
            ) from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"DATALOADER.CACHE '{self.folder}' can't be written to")

    def _num_bytes(self, height: int, width: int) -> int:
        lengths, most = self.resize.short_edge_length, self.resize.max_size
        sizes = {self.resize.get_output_shape(height, width, x, most) for x in lengths if x}
        return sum(h * w for h, w in sizes) * _CHANNELS[self.image_format]


class _ResizedBefore(ResizeTransform):
    """Resizes boxes, masks and points of an image that has its size."""

    @classmethod
    def like(cls, transform: ResizeTransform) -> "_ResizedBefore":
        sizes = transform.h, transform.w, transform.new_h, transform.new_w
        return cls(*sizes, transform.interp)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """The image itself; of a mask, for which there is another interpolation, the resized."""
        return img if interp is None else super().apply_image(img, interp)


def use_cache(
    mapper: Callable[[dict], Any], cfg: CfgNode, records: Sequence[dict]
) -> Callable[[dict], Any]:
    """The mapper of a loader, with ``DATALOADER.CACHE`` if it is set.

    Args:
        mapper: it.
        cfg: the run's config.
        records: what is loaded.

    Raises:
        ValueError: as :class:`CachingMapper` and its ``prepare``.
    """
    if not cfg.DATALOADER.CACHE:
        return mapper
    caching = CachingMapper(mapper, cfg.DATALOADER.CACHE)
    caching.prepare(records)
    return caching
