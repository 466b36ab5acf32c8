"""Draws the scenes of the ``digits`` data set: digits and look-alikes pasted on photographs."""

from dataclasses import dataclass, field

import cv2
import numpy as np

__all__ = ["CLASSES", "Scene", "SceneMaker"]

CLASSES = tuple(str(digit) for digit in range(10))

# The long tail: from the most to the least frequent digit, each is this much rarer than the one
# before, so that the last has a third of the first. The hardest to tell are the most frequent.
_BY_FREQUENCY = (1, 9, 8, 4, 7, 2, 5, 3, 0, 6)
_TAIL = 0.88
_CLASS_PROBABILITIES = _TAIL ** np.argsort(_BY_FREQUENCY)
_CLASS_PROBABILITIES /= _CLASS_PROBABILITIES.sum()
_MIN_SIZE, _MAX_SIZE = 14, 150  # height of a digit before it is turned, in pixels
_MAX_OBJECTS = 20
_MAX_COVERED = 0.35  # of an object's box by any other's
_INK = 90  # a pixel of a stencil belongs to the digit if it is brighter
# Mirrored, the other digits look like digits.
_MIRRORED = (3, 4, 6, 7, 9)
# Letters that don't look like digits.
_GLYPHS = "ACEFHJKLMNPRTUVWXY"


@dataclass
class Scene:
    """An image (H, W, 3) uint8 BGR, and its objects: labels in [0, 10), boxes (x, y, w, h), masks.

    A mask is a list of polygons, each x0, y0, x1, y1, ... in pixels.
    """

    image: np.ndarray
    labels: list[int] = field(default_factory=list)
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    masks: list[list[list[float]]] = field(default_factory=list)


class SceneMaker:
    """Makes scenes from the digits and photographs of the training or the validation split.

    Args:
        training: whether to use the training split's 80 % of the digits and left 65 % of the
            photographs, or the rest of both.
    """

    def __init__(self, training: bool):
        # Takes a second, which programs on other data need not wait for.
        from sklearn.datasets import load_digits, load_sample_images

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        cut = int(0.8 * len(order))
        chosen = order[:cut] if training else order[cut:]
        ink = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.ink = [ink[digits.target[chosen] == label] for label in range(10)]
        self.photos = []
        for photo in load_sample_images().images:
            split = int(0.65 * photo.shape[1])
            part = photo[:, :split] if training else photo[:, split:]
            self.photos.append(np.ascontiguousarray(part[:, :, ::-1]))

    def make(self, rng: np.random.Generator) -> Scene:
        """Draws one scene."""
        scene = Scene(self._background(rng))
        # Few objects are as usual as many; a crowd gathers round one point.
        num_objects = round(np.exp(rng.uniform(0, np.log(_MAX_OBJECTS))))
        height, width = scene.image.shape[:2]
        center = rng.uniform((0.3 * width, 0.3 * height), (0.7 * width, 0.7 * height))
        crowd = center if rng.random() < 0.3 else None
        taken: list[tuple[int, int, int, int]] = []
        for i in range(num_objects + rng.integers(0, 3)):
            label = int(rng.choice(10, p=_CLASS_PROBABILITIES)) if i < num_objects else None
            stencil = self._digit(label, rng) if label is not None else self._look_alike(rng)
            stencil = _turn(_resize(stencil, _size(num_objects, rng)), rng)
            box = _find_place(stencil, (height, width), taken, crowd, rng)
            if box is None:
                continue
            _paint(scene.image, stencil, box, rng)
            taken.append(box)
            if label is not None:
                scene.labels.append(label)
                scene.boxes.append(box)
                scene.masks.append(_outline(stencil, box))
        noise = rng.normal(0, rng.uniform(0, 6), scene.image.shape)
        scene.image = np.clip(scene.image + noise, 0, 255).astype(np.uint8)
        return scene

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        photo = self.photos[rng.integers(len(self.photos))]
        height, width = ((320, 320), (256, 320), (320, 256))[rng.integers(3)]
        # A crop of the same shape, enlarged by up to 2.
        scale = rng.uniform(0.5, min(1.0, photo.shape[0] / height, photo.shape[1] / width))
        crop_height, crop_width = int(height * scale), int(width * scale)
        y = rng.integers(photo.shape[0] - crop_height + 1)
        x = rng.integers(photo.shape[1] - crop_width + 1)
        crop = photo[y : y + crop_height, x : x + crop_width]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.clip(crop * rng.uniform(0.6, 1.2), 0, 255).astype(np.uint8)

    def _digit(self, label: int, rng: np.random.Generator) -> np.ndarray:
        return self.ink[label][rng.integers(len(self.ink[label]))]

    def _look_alike(self, rng: np.random.Generator) -> np.ndarray:
        """Something like a digit that is none: a cut, mirrored or merged one, or a letter."""
        kind = rng.choice(4, p=(0.25, 0.25, 0.1, 0.4))
        if kind == 0:
            stencil = self._digit(rng.integers(10), rng).copy()
            half = (slice(0, 4), slice(4, 8))[rng.integers(2)]
            stencil[half] = 0
            return stencil
        if kind == 1:
            return self._digit(_MIRRORED[rng.integers(len(_MIRRORED))], rng)[:, ::-1]
        if kind == 2:
            first, second = (self._digit(rng.integers(10), rng) for _ in range(2))
            return np.maximum(first, np.roll(second, rng.integers(2, 4), axis=rng.integers(2)))
        canvas = np.zeros((64, 64), np.uint8)
        glyph = _GLYPHS[rng.integers(len(_GLYPHS))]
        cv2.putText(canvas, glyph, (10, 52), cv2.FONT_HERSHEY_DUPLEX, 1.8, 255, 6, cv2.LINE_AA)
        return cv2.resize(canvas, (8, 8), interpolation=cv2.INTER_AREA)


def _size(num_objects: int, rng: np.random.Generator) -> float:
    """Height of an object in pixels; the more there are, the smaller the largest."""
    largest = _MAX_SIZE / max(1.0, np.sqrt(num_objects / 2.5))
    return float(_MIN_SIZE * (largest / _MIN_SIZE) ** rng.uniform() ** 0.7)


def _resize(stencil: np.ndarray, height: float) -> np.ndarray:
    """Enlarges an 8x8 stencil smoothly so that its ink gets this height."""
    rows = np.flatnonzero(stencil.max(axis=1) > 80)
    side = max(8, round(8 * height / max(1, np.ptp(rows) + 1 if len(rows) else 8)))
    return cv2.resize(stencil, (side, side), interpolation=cv2.INTER_CUBIC)


def _turn(stencil: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turns and shears a stencil a little and crops it to its ink."""
    side = len(stencil)
    pad = side // 4
    stencil = cv2.copyMakeBorder(stencil, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    center = (side / 2 + pad, side / 2 + pad)
    matrix = cv2.getRotationMatrix2D(center, rng.uniform(-15, 15), 1.0)
    shear = rng.uniform(-0.2, 0.2)
    matrix[0] += (0, shear, -shear * center[1])
    stencil = cv2.warpAffine(stencil, matrix, stencil.shape[::-1], flags=cv2.INTER_LINEAR)
    ys, xs = np.nonzero(stencil > _INK)
    if len(ys) == 0:
        return stencil
    return stencil[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _outline(stencil: np.ndarray, box: tuple[int, int, int, int]) -> list[list[float]]:
    """Polygons, in the image, round the ink of a stencil that is painted into a box."""
    # Enlarged, so that the outline runs along the edges of pixels, not through their centers.
    scale = 4
    ink = np.kron((stencil > _INK).astype(np.uint8), np.ones((scale, scale), np.uint8))
    contours, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    contours = [cv2.approxPolyDP(contour, 0.4 * scale, closed=True) for contour in contours]
    polygons = [(c.reshape(-1, 2) + 0.5) / scale + box[:2] for c in contours if len(c) >= 3]
    return [polygon.round(2).flatten().tolist() for polygon in polygons]


def _find_place(
    stencil: np.ndarray,
    image_size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
    crowd: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[int, int, int, int] | None:
    """A box (x, y, w, h) for a stencil that covers no other too much, or None if none is found."""
    height, width = stencil.shape
    room = np.array([image_size[1] - width, image_size[0] - height])
    if (room < 0).any():
        return None
    for _ in range(30):
        corner = rng.uniform(0, room + 1)
        if crowd is not None:
            corner = rng.normal(crowd - (width / 2, height / 2), 55).clip(0, room)
        box = (int(corner[0]), int(corner[1]), width, height)
        if all(_covered(box, other) <= _MAX_COVERED for other in taken):
            return box
    return None


def _covered(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """The share of the smaller box's area in which two boxes overlap."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _paint(
    image: np.ndarray,
    stencil: np.ndarray,
    box: tuple[int, int, int, int],
    rng: np.random.Generator,
) -> None:
    """Paints a stencil in a colour that stands out from what is below it, in place."""
    x, y, width, height = box
    patch = image[y : y + height, x : x + width]
    brightness = patch.mean()
    low, high = (0, 110) if brightness > 150 else (180, 256) if brightness < 80 else (0, 256)
    color = rng.integers(low, high, size=3).astype(np.float32)
    if abs(color.mean() - brightness) < 60:
        color = color * 0.3 if brightness > 110 else 255 - (255 - color) * 0.3
    alpha = (stencil[..., None] / np.float32(255)) ** 0.7
    patch[:] = np.clip(patch * (1 - alpha) + color * alpha, 0, 255).astype(np.uint8)
