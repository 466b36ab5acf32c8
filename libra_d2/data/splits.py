"""Splits a data set into folds for cross-validation."""

from pathlib import Path

import msgspec
import numpy as np

from .coco_json import Coco
from .sources import Source

__all__ = ["make_folds"]


def make_folds(source: Source, num_folds: int, folder: Path) -> list[tuple[str, str]]:
    """Divides the images of a data set at random, the same way each time.

    Args:
        source: the data set.
        num_folds: into how many parts.
        folder: where annotation files are written.

    Returns:
        For each fold the names of two data sets: of all others, to train on, and of its own.

    Raises:
        ValueError: if there are fewer images than folds.
    """
    images = source.coco.images
    if len(images) < num_folds:
        raise ValueError(f"data set '{source.name}' has {len(images)} images for {num_folds} folds")
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(images))
    folds = []
    for i in range(num_folds):
        held_out = {images[j].id for j in order[i::num_folds]}
        names = []
        for part, wanted in (("train", False), ("test", True)):
            own = {image.id for image in images if (image.id in held_out) == wanted}
            coco = Coco(
                images=[image for image in images if image.id in own],
                categories=source.coco.categories,
                annotations=[a for a in source.coco.annotations or () if a.image_id in own],
            )
            file = folder / f"fold{i + 1}_{part}.json"
            file.write_bytes(msgspec.json.encode(coco))
            names.append(f"coco:{file.resolve()}:{source.image_root.resolve()}")
        folds.append(tuple(names))
    return folds
