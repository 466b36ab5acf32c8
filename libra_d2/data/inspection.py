"""Looks a data set over before it is trained on: what it has, and what is wrong with it."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image as PilImage
from torchvision.ops import box_iou

from .coco_json import Annotation, Coco, Image, is_crowd
from .images import open_image
from .problems import (
    Problem,
    find_box_problems,
    find_image_problems,
    find_mask_problems,
    is_useful,
)
from .sources import Source

__all__ = ["Inspection", "find_shared_images", "inspect", "mend"]

# COCO's bounds of small and large, sides in pixels.
SIZES = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, float("inf"))}
_SAME = 0.95  # IoU of two boxes of one class that are one object marked twice
_NO_MASKS = "run-length encoded masks|polygons have fewer"  # problems that a mask less mends
_CROWDED = 0.3  # IoU with a neighbour
_RARE = 100  # objects below which a class is hardly learnt
_IMBALANCE = 20  # ratio of the most frequent to the rarest class


@dataclass
class Inspection:
    """What was found.

    Args:
        source: the data set.
        problems: what is wrong, the fatal first.
        hints: what to know, though nothing is wrong.
        counts: objects of each class.
        sides: square roots of the boxes' areas in pixels, (N,).
        ratios: heights over widths, (N,).
        per_image: objects of each image.
        crowded: share of objects that overlap another with an IoU above 0.3.
        hashes: of each readable image's content, to its name.
    """

    source: Source
    problems: list[Problem]
    hints: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    sides: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ratios: np.ndarray = field(default_factory=lambda: np.zeros(0))
    per_image: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    crowded: float = 0.0
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def would_fail(self) -> bool:
        """Whether training on it would."""
        return any(problem.is_fatal for problem in self.problems)

    def lines(self) -> list[str]:
        """A summary, a line a fact."""
        coco = self.source.coco
        widths, heights = ([getattr(i, k) for i in coco.images] for k in ("width", "height"))
        lines = [
            f"{len(coco.images)} images, {min(widths):g}x{min(heights):g} to "
            f"{max(widths):g}x{max(heights):g} pixels; {sum(self.counts.values())} objects",
            "classes: " + ", ".join(f"{name} {n}" for name, n in self.counts.items()),
        ]
        if len(self.sides):
            shares = [
                f"{((self.sides >= low) & (self.sides < high)).mean():.0%} {name}"
                for name, (low, high) in SIZES.items()
            ]
            low, middle, high = np.quantile(self.sides, (0.01, 0.5, 0.99))
            lines.append(
                f"box sides: {low:.0f} to {high:.0f} pixels (1 % to 99 %), median {middle:.0f}; "
                + ", ".join(shares)
            )
            low, high = np.quantile(self.ratios, (0.01, 0.99))
            lines.append(f"height / width: {low:.2g} to {high:.2g} (1 % to 99 %)")
            lines.append(
                f"objects an image: {self.per_image.min()} to {self.per_image.max()}, median "
                f"{np.median(self.per_image):g}; {self.crowded:.0%} overlap a neighbour by more "
                f"than {_CROWDED}"
            )
        return lines


def inspect(source: Source) -> Inspection:
    """Reads every image of a data set, and looks at every box."""
    coco, root = source.coco, source.image_root
    problems = find_box_problems(coco) + find_mask_problems(coco) + find_image_problems(coco, root)
    hashes, broken = _hash_images(coco, root)
    known = {i for problem in problems for i in problem.image_ids}
    unread = [(i, why) for i, why in broken.items() if i not in known]
    if unread:
        what = f"has images that break off: {len(unread)}, the first {unread[0][1]}"
        problems.append(Problem(what, True, image_ids=tuple(i for i, _ in unread)))
    problems += _find_duplicates(coco)
    objects = [a for a in coco.annotations or () if not is_crowd(a)]
    sizes = {image.id: (image.width, image.height) for image in coco.images}
    useful = [a for a in objects if is_useful(a.bbox, *sizes[a.image_id])]
    if not useful:
        problems.append(Problem("has no objects that can be trained on", is_fatal=True))
    extents = np.array([a.bbox[2:] for a in useful]).reshape(-1, 2)
    counts = Counter(a.image_id for a in objects)
    classes = Counter(a.category_id for a in objects)
    found = Inspection(
        source,
        sorted(problems, key=lambda problem: not problem.is_fatal),
        counts={c.name: classes[c.id] for c in sorted(coco.categories, key=lambda c: c.id)},
        sides=np.sqrt(extents.prod(axis=1)),
        ratios=extents[:, 1] / extents[:, 0],
        per_image=np.array([counts[image.id] for image in coco.images]),
        crowded=_share_of_crowded(useful),
        hashes=hashes,
    )
    found.hints = _hints(found)
    return found


def _hints(found: Inspection) -> list[str]:
    hints = []
    empty = int((found.per_image == 0).sum())
    if empty:
        hints.append(
            f"images without objects: {empty}; they are left out of training unless "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
        )
    present = {name: n for name, n in found.counts.items() if n}
    if len(present) < len(found.counts):
        absent = [name for name, n in found.counts.items() if not n]
        hints.append(f"classes without objects here: {', '.join(absent)}")
    rare = [f"{name} ({n})" for name, n in present.items() if n < _RARE]
    if rare:
        hints.append(
            f"classes with fewer than {_RARE} objects are hardly learnt: {', '.join(rare)}"
        )
    if present and max(present.values()) > _IMBALANCE * min(present.values()):
        ratio = max(present.values()) / min(present.values())
        hints.append(
            f"the most frequent class has {ratio:.0f} times the objects of the rarest; "
            "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler shows rare ones more often"
        )
    return hints


def find_shared_images(inspections: Sequence[Inspection]) -> list[str]:
    """What data sets have in common: images of the same content, which spoil an evaluation."""
    sentences = []
    for i, one in enumerate(inspections):
        for other in inspections[:i]:
            same = [name for name in one.hashes if name in other.hashes]
            if same:
                pair = f"'{other.hashes[same[0]]}' and '{one.hashes[same[0]]}'"
                sentences.append(
                    f"images that {other.source.name} and {one.source.name} share: {len(same)}, "
                    f"such as {pair}"
                )
    return sentences


def mend(found: Inspection) -> Coco:
    """A clean copy of the annotations.

    Boxes in another format are turned into COCO's, those of images that have been resized go with
    them, and all are clipped to their image. Boxes without extent, outside, or marked twice, masks
    of another size than their image, and images that cannot be used, are left out.
    """
    coco, root = found.source.coco, found.source.image_root
    kinds = " ".join(problem.what for problem in found.problems if problem.is_fatal)
    turn = _identity
    if "in [0, 1]" in kinds:
        boxes = [a.bbox for a in coco.annotations or ()]
        are_corners = any(max(x + w, y + h) > 1.01 for x, y, w, h in boxes)
        turn = _from_corner_fractions if are_corners else _from_fractions
    elif "x1, y1, x2, y2" in kinds:
        turn = _from_corners
    twice, unmasked = (
        {i for p in found.problems if re.search(kind, p.what) for i in p.annotation_ids}
        for kind in ("marked twice", _NO_MASKS)
    )
    images, annotations = [], []
    objects = _by_image(coco.annotations or ())
    for image in coco.images:
        try:
            width, height = open_image(root / (image.file_name or "")).size
        except ValueError:
            continue
        scale = width / image.width, height / image.height
        if not 0.98 < scale[0] / scale[1] < 1.02:  # turned or cropped: nobody knows how
            continue
        own = msgspec.structs.replace(image, height=height, width=width)
        images.append(own)
        for annotation in objects.get(image.id, ()):
            x, y, w, h = turn(annotation.bbox, image)
            x, y, w, h = min(x, x + w), min(y, y + h), abs(w), abs(h)
            x, w, y, h = x * scale[0], w * scale[0], y * scale[1], h * scale[1]
            if annotation.id not in twice and is_useful((x, y, w, h), width, height):
                left, top = max(x, 0.0), max(y, 0.0)
                box = (left, top, min(x + w, width) - left, min(y + h, height) - top)
                if annotation.id in unmasked:
                    annotation = msgspec.structs.replace(annotation, segmentation=None)
                annotations.append(_mended(annotation, box, scale))
    return Coco(images=images, categories=coco.categories, annotations=annotations)


def _identity(box: Sequence[float], image: Image) -> Sequence[float]:
    return box


def _from_corners(box: Sequence[float], image: Image) -> Sequence[float]:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def _from_fractions(box: Sequence[float], image: Image) -> Sequence[float]:
    sides = (image.width, image.height) * 2
    return [value * side for value, side in zip(box, sides, strict=True)]


def _from_corner_fractions(box: Sequence[float], image: Image) -> Sequence[float]:
    return _from_fractions(_from_corners(box, image), image)


def _mended(annotation: Annotation, box: tuple, scale: tuple[float, float]) -> Annotation:
    """A copy with another box; area and polygons stay, or go with it where it changed."""
    is_scaled = scale != (1.0, 1.0)
    mask, area = annotation.segmentation, annotation.area
    if is_scaled and isinstance(mask, list):
        mask = [[value * scale[i % 2] for i, value in enumerate(polygon)] for polygon in mask]
    elif is_scaled:
        mask = None
    if area is None or is_scaled or not area <= 1.01 * box[2] * box[3] or area < 1:
        area = box[2] * box[3]
    return msgspec.structs.replace(
        annotation,
        bbox=box,
        area=area,
        segmentation=mask,
        iscrowd=int(is_crowd(annotation)),
        ignore=msgspec.UNSET,
    )


def _hash_images(coco: Coco, root: Path) -> tuple[dict[str, str], dict]:
    """A hash of what each image shows, to its name; and ids of those that cannot be read."""
    with ThreadPoolExecutor(4) as pool:
        names = [str(root / (image.file_name or "")) for image in coco.images]
        results = list(pool.map(_hash_image, names))
    hashes, broken = {}, {}
    for image, name, (value, error) in zip(coco.images, names, results, strict=True):
        if error:
            broken[image.id] = error
        else:
            hashes[value] = name
    return hashes, broken


def _hash_image(path: str) -> tuple[str, str]:
    """The pixels' hash at a small size, which survives another compression; or an error."""
    try:
        image = open_image(path)
    except ValueError as error:
        return "", str(error)
    small = np.asarray(image.convert("L").resize((17, 16), PilImage.Resampling.BOX), dtype=int)
    # Which neighbour is brighter, by more than compression changes.
    signs = np.sign(np.diff(small, axis=1)) * (np.abs(np.diff(small, axis=1)) > 8)
    # Where that says little, as of an empty sky, what it shows to the pixel.
    content = signs.tolist() if np.abs(signs).mean() > 0.1 else image.tobytes()
    return hashlib.sha256(f"{image.size}{content}".encode()).hexdigest(), ""


def _by_image(annotations: Sequence[Annotation]) -> dict[int | str, list[Annotation]]:
    groups = defaultdict(list)
    for annotation in annotations:
        groups[annotation.image_id].append(annotation)
    return groups


def _overlaps(annotations: Sequence[Annotation]) -> torch.Tensor:
    boxes = torch.tensor([a.bbox for a in annotations], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return box_iou(boxes, boxes).nan_to_num().fill_diagonal_(0)


def _find_duplicates(coco: Coco) -> list[Problem]:
    images = {image.id: image for image in coco.images}
    twice = []
    for annotations in _by_image(coco.annotations or ()).values():
        ious = _overlaps(annotations)
        for i, j in (ious > _SAME).triu().nonzero().tolist():
            if annotations[i].category_id == annotations[j].category_id:
                twice.append(annotations[j])
    if not twice:
        return []
    name = images[twice[0].image_id].file_name
    what = f"has objects that are marked twice: {len(twice)}, the first in image '{name}'"
    return [Problem(what, annotation_ids=tuple(a.id for a in twice))]


def _share_of_crowded(annotations: Sequence[Annotation]) -> float:
    crowded = sum(
        int((_overlaps(own).amax(dim=1) > _CROWDED).sum())
        for own in _by_image(annotations).values()
    )
    return crowded / max(len(annotations), 1)
