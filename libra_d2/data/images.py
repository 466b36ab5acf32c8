"""Image files: which there are, their sizes, and whether they can be read."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps

__all__ = ["IMAGE_SUFFIXES", "examine", "find_images", "open_image", "read_text", "to_rgb"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_ROTATING = (5, 6, 7, 8)  # values of EXIF's orientation that exchange width and height
_ORIENTATION = 274
# What whole files of these formats end in, but for what editors append.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 4096  # bytes in which to look for it
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes that RGB would cut off


def find_images(folder: Path) -> list[Path]:
    """All image files in a folder and below, by name."""
    places = os.walk(folder, followlinks=True)
    files = (Path(place) / name for place, _, names in places for name in names)
    return sorted(
        file
        for file in files
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )


def open_image(path: str | Path) -> Image.Image:
    """An image as it is seen, turned as its EXIF data says, in RGB.

    Raises:
        ValueError: if there is no such file or it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"'{path}' does not exist") from None
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as an image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as it is seen, turned as its EXIF data says, in RGB.

    Raises:
        ValueError: if it has more than 8 bits a channel, which would be cut off.
    """
    if image.mode in _DEEP:
        raise ValueError("it has more than 8 bits a channel; convert it to 8")
    return ImageOps.exif_transpose(image).convert("RGB")


def examine(paths: Iterable[Path]) -> list[tuple[int, int] | str]:
    """Height and width of each image in pixels, as it is seen; or what is wrong with the file.

    Headers are read, and a whole file only where its end looks cut off.
    """
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_examine, paths))


def _examine(path: Path) -> tuple[int, int] | str:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.mode in _DEEP:
                return "has more than 8 bits a channel; convert it to 8"
            if image.format == "TIFF" and image.getexif().get(_ORIENTATION) in range(2, 9):
                # Pillow turns it as it is read, and detectron2 would once more.
                return "is a TIFF that its EXIF data turn; save it upright"
            end = _ENDS.get(image.format)
            if not end or end not in _tail(path):
                image.load()
            if image.getexif().get(_ORIENTATION) in _ROTATING:
                width, height = height, width
        return height, width
    except FileNotFoundError:
        return "does not exist"
    except Exception as error:
        return f"cannot be read as an image ({type(error).__name__})"


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read()


def read_text(path: Path) -> str:
    """The content of a text file beside images.

    Raises:
        ValueError: if it is none in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
