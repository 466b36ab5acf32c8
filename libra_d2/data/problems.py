"""What is wrong with the boxes and images of a data set, found before a run."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .coco_json import Annotation, Coco, Image, Rle, has_polygon
from .images import examine, open_image

__all__ = ["Problem", "find_box_problems", "find_image_problems", "find_mask_problems", "is_useful"]

_SLACK = 2.0  # pixels a box may be beyond its image by rounding
_MANY = 0.2  # share of boxes that tells a format from a slip
_MOST_BOXES = 10_000  # of one image: each is compared with some 100,000 anchors
_NUM_DECODED = 8  # images that are read whole, of a data set


@dataclass(frozen=True)
class Problem:
    """Something wrong, and whether training on it would fail or teach nonsense.

    Args:
        what: a clause to follow the data set's name.
        is_fatal: whether a run must not start.
        annotation_ids: those concerned.
        image_ids: those concerned.
    """

    what: str
    is_fatal: bool = False
    annotation_ids: tuple[int, ...] = ()
    image_ids: tuple[int | str, ...] = ()


def is_useful(box: Sequence[float], width: int, height: int) -> bool:
    """Whether a box (x, y, width, height in pixels) has extent and meets its image."""
    x, y, w, h = box
    return w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0


def find_box_problems(coco: Coco, drop: bool = False) -> list[Problem]:
    """What is wrong with the boxes: another format, negative, without extent, outside.

    Args:
        coco: annotations.
        drop: whether single boxes that make no sense will be left out, and so are not fatal.
    """
    images = {image.id: image for image in coco.images}
    pairs = [(a, images[a.image_id]) for a in coco.annotations or ()]
    if not pairs:
        return []
    crowded, number = Counter(a.image_id for a, _ in pairs).most_common(1)[0]
    if number > _MOST_BOXES:
        name = _name(images[crowded])
        return [Problem(f"has {number} boxes in image '{name}'; {_MOST_BOXES} can be", True)]
    # A whole data set in another format is one problem, not one a box.
    if all(max(a.bbox) <= 1.0 for a, _ in pairs):
        return [Problem("has boxes in [0, 1]; COCO's are in pixels", is_fatal=True)]
    beyond = [(a, image) for a, image in pairs if _is_beyond(a, image)]
    corners = all(
        a.bbox[2] >= a.bbox[0]
        and a.bbox[3] >= a.bbox[1]
        and a.bbox[2] <= image.width + _SLACK
        and a.bbox[3] <= image.height + _SLACK
        for a, image in pairs
    )
    if corners and len(beyond) > _MANY * len(pairs):
        what = f"has boxes that look like x1, y1, x2, y2 ({len(beyond)} of {len(pairs)} leave their"
        return [Problem(f"{what} image); COCO's are x, y, width, height", is_fatal=True)]
    kinds: tuple[tuple[str, bool, Callable[[Annotation, Image], bool]], ...] = (
        ("boxes of negative size", not drop, lambda a, _: min(a.bbox[2:]) < 0),
        ("boxes without extent", False, lambda a, _: min(a.bbox[2:]) == 0),
        (
            "boxes outside of their image",
            False,
            lambda a, i: min(a.bbox[2:]) > 0 and not is_useful(a.bbox, i.width, i.height),
        ),
        (
            "boxes that leave their image",
            False,
            lambda a, i: is_useful(a.bbox, i.width, i.height) and _is_beyond(a, i),
        ),
    )
    found = []
    if len(beyond) > _MANY * len(pairs):
        what = f"has boxes that leave their image: {len(beyond)} of {len(pairs)}, as boxes in "
        return [Problem(f"{what}another format do; COCO's are x, y, width, height", is_fatal=True)]
    for kind, is_fatal, holds in kinds:
        bad = [(a, image) for a, image in pairs if holds(a, image)]
        if bad:
            first, image = bad[0]
            box = ", ".join(f"{x:g}" for x in first.bbox)
            what = f"has {kind}: {len(bad)}, the first {box} in image '{_name(image)}'"
            found.append(Problem(what, is_fatal, tuple(a.id for a, _ in bad)))
    return found


def find_image_problems(coco: Coco, root: Path, allow_outside: bool = True) -> list[Problem]:
    """What is wrong with the image files: missing, unreadable, of another size, not in the folder.

    Of a few the pixels are read too.
    """
    for image in coco.images if not allow_outside else ():
        place = os.path.relpath(os.path.join(root, _name(image)), root)
        if Path(place).parts[0] == os.pardir:
            return [
                Problem(
                    f"names image '{_name(image)}', which is not in '{root}'; "
                    "DATASETS.ALLOW_OUTSIDE True reads such files",
                    is_fatal=True,
                )
            ]
    results = examine([root / _name(image) for image in coco.images])
    step = max(1, len(results) // _NUM_DECODED)
    for i in range(0, len(results), step):
        if not isinstance(results[i], str):
            results[i] = _decode(root / _name(coco.images[i])) or results[i]
    bad: dict[str, list[tuple[Image, str]]] = {"cannot be used": [], "have another size": []}
    for image, result in zip(coco.images, results, strict=True):
        if isinstance(result, str):
            bad["cannot be used"].append((image, result))
        elif result != (image.height, image.width):
            what = f"is {result[1]}x{result[0]}, not {image.width:g}x{image.height:g} as annotated"
            bad["have another size"].append((image, what))
    return [
        Problem(
            f"has images that {kind}: {len(images)}, the first '{root / _name(images[0][0])}', "
            f"which {images[0][1]}",
            is_fatal=True,
            image_ids=tuple(image.id for image, _ in images),
        )
        for kind, images in bad.items()
        if images
    ]


def _decode(path: Path) -> str:
    """What keeps an image's pixels from being read; empty if nothing does."""
    try:
        open_image(path)
    except Exception as error:
        return f"cannot be read: {error}"
    return ""


def find_mask_problems(coco: Coco) -> list[Problem]:
    """Run-length encoded masks of another size than their image, and polygons that are none."""
    return _find_wrong_sizes(coco) + _find_useless_polygons(coco)


def _find_wrong_sizes(coco: Coco) -> list[Problem]:
    """Run-length encoded masks not of their image's size, which could take any memory."""
    images = {image.id: image for image in coco.images}
    bad = [
        (a, images[a.image_id])
        for a in coco.annotations or ()
        if isinstance(a.segmentation, Rle) and not _covers(a.segmentation, images[a.image_id])
    ]
    if not bad:
        return []
    annotation, image = bad[0]
    mask, size = annotation.segmentation, (int(image.height), int(image.width))
    what = (
        f"has run-length encoded masks of another size than their image: {len(bad)}, the first of "
        f"{mask.size} and {_rle_length(mask.counts)} pixels in image '{_name(image)}' of {size}"
    )
    return [Problem(what, is_fatal=True, annotation_ids=tuple(a.id for a, _ in bad))]


def _find_useless_polygons(coco: Coco) -> list[Problem]:
    """Objects that detectron2 leaves out as a whole, though their box may be right."""
    bad = [
        a
        for a in coco.annotations or ()
        if isinstance(a.segmentation, list) and a.segmentation and not has_polygon(a)
    ]
    if not bad:
        return []
    names = {image.id: _name(image) for image in coco.images}
    what = (
        f"has objects whose polygons have fewer than three corners: {len(bad)}, the first in image "
        f"'{names[bad[0].image_id]}'; training leaves them out, without the polygons it would not"
    )
    return [Problem(what, annotation_ids=tuple(a.id for a in bad))]


def _covers(mask: Rle, image: Image) -> bool:
    size = int(image.height), int(image.width)
    return tuple(mask.size) == size and _rle_length(mask.counts) == size[0] * size[1]


def _rle_length(counts: str | list[int]) -> int:
    """How many pixels the runs of a mask cover; -1 if they are none.

    Text is COCO's: six bits a character from "0" on, of which the sixth says that more follow and
    the fifth of the last is the sign; from the third run on they are differences to two before.
    """
    if isinstance(counts, list):
        return sum(counts) if all(run >= 0 for run in counts) else -1
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            run = value + (runs[-2] if len(runs) > 2 else 0)
            if run < 0:
                return -1
            runs.append(run)
            value = shift = 0
    return -1 if shift else sum(runs)


def raise_fatal(problems: Iterable[Problem]) -> None:
    """Raises ``ValueError`` with the first problem that is fatal."""
    for problem in problems:
        if problem.is_fatal:
            raise ValueError(problem.what)


def _is_beyond(annotation: Annotation, image: Image) -> bool:
    x, y, w, h = annotation.bbox
    slack = _SLACK
    return min(x, y) < -slack or x + w > image.width + slack or y + h > image.height + slack


def _name(image: Image) -> str:
    return image.file_name or str(image.id)
