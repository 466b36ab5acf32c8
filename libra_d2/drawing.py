"""Draws boxes, masks and class names on images, quickly, with Pillow and a font of matplotlib."""

import colorsys
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["color_of", "draw", "draw_groups", "make_sheet", "shrink"]

_GAP = 6  # pixels between the tiles of a sheet
_GOLDEN = 0.618034  # of the circle of hues: neighbours differ the most


@functools.cache
def color_of(class_id: int) -> tuple[int, int, int]:
    """The colour of a class, RGB; the same wherever it is drawn."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + class_id * _GOLDEN) % 1, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # It has more alphabets than Pillow's own.
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size)


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    class_ids: Sequence[int],
    labels: Sequence[str],
    masks: np.ndarray | None = None,
) -> np.ndarray:
    """Draws objects on a copy of an image, the largest first so that small ones stay visible.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4), corners x1, y1, x2, y2 in pixels.
        class_ids: which decide the colours, (N,).
        labels: what to write, (N,).
        masks: (N, H, W) bool, or None.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    boxes = np.concatenate(
        [np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1
    )
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
    if masks is not None and len(masks):
        image = image.copy()
        for i in order:
            color = np.array(color_of(int(class_ids[i])))
            image[masks[i]] = (0.6 * image[masks[i]] + 0.4 * color).astype(np.uint8)
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    side = max(image.shape[:2])
    width, font = max(1, round(side / 400)), _font(max(11, round(side / 55)))
    for i in order:
        pen.rectangle(boxes[i].tolist(), outline=color_of(int(class_ids[i])), width=width)
    for i in order:  # above all boxes, to be read
        color = color_of(int(class_ids[i]))
        _write(pen, labels[i], boxes[i, 0], boxes[i, 1], color, font, picture.size)
    return np.asarray(picture)


def draw_groups(
    image: np.ndarray, groups: Sequence[tuple[str, tuple[int, int, int], np.ndarray]]
) -> np.ndarray:
    """Draws groups of boxes on a copy of an image, the last above the others, with a legend below.

    Args:
        image: (H, W, 3) uint8, RGB.
        groups: of each its name, its colour, RGB, and its boxes (N, 4), corners in pixels.

    Returns:
        (H + legend, W, 3) uint8, RGB.
    """
    side = max(image.shape[:2])
    font, width = _font(max(11, round(side / 55))), max(1, round(side / 500))
    line = font.size + 6
    ground = np.full((line * len(groups) + 6, image.shape[1], 3), 40, np.uint8)
    picture = Image.fromarray(np.concatenate([image, ground]))
    pen = ImageDraw.Draw(picture)
    for i, (name, color, boxes) in enumerate(groups):
        for box in np.asarray(boxes).tolist():
            pen.rectangle(box, outline=color, width=width)
        y = image.shape[0] + 4 + i * line
        pen.rectangle((4, y, 4 + font.size, y + font.size), fill=color)
        pen.text((10 + font.size, y), name, fill="white", font=font)
    return np.asarray(picture)


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """An image (H, W, 3) uint8 whose longer side is at most so many pixels."""
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _write(pen, text: str, x: float, y: float, color: tuple, font, size: tuple[int, int]) -> None:
    """A label on a ground of its colour above a box, or where there is room for it."""
    if not text:
        return
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(x, 0), max(size[0] - width, 0))
    y = y - height if y >= height else max(y, 0)
    pen.rectangle((x, y, x + width, y + height), fill=color)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    pen.text((x + 2 - left, y + 2 - top), text, fill="black" if bright else "white", font=font)


def make_sheet(images: list[list[np.ndarray]], columns: int) -> np.ndarray:
    """Puts the tiles of all images on one white sheet, with those of an image side by side.

    Args:
        images: tiles (H, W, 3) uint8 of each image.
        columns: how many images stand side by side.
    """
    height, width = (max(t.shape[i] for tiles in images for t in tiles) for i in (0, 1))
    per_image = max(len(tiles) for tiles in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = np.full(
        (rows * (height + _GAP) + _GAP, columns * per_image * (width + _GAP) + _GAP, 3),
        255,
        np.uint8,
    )
    for i, tiles in enumerate(images):
        for j, tile in enumerate(tiles):
            y = _GAP + i // columns * (height + _GAP)
            x = _GAP + (i % columns * per_image + j) * (width + _GAP)
            sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return sheet
