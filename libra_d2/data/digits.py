"""``digits``: real handwritten digits on real photographs, for a first try and for tests.

The embedded data set is drawn from scikit-learn's two sample photographs and its 1,797 handwritten
digits (8x8 pixels), deterministically from a seed, into COCO format under ``$DETECTRON2_DATASETS``
(default ``datasets/``). Training and validation share neither digits nor parts of a photograph.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

from .scene import CLASSES, SceneMaker

__all__ = ["SPLITS", "Split", "make_digits", "register_digits"]


@dataclass(frozen=True)
class Split:
    """One split of the data set.

    Args:
        num_images: how many images it has.
        seed: of all its random choices.
        training: whether it draws from the training or the validation digits and photographs.
    """

    num_images: int
    seed: int
    training: bool


SPLITS = {
    "digits_train": Split(num_images=600, seed=1, training=True),
    "digits_val": Split(num_images=150, seed=2, training=False),
    "digits_train_large": Split(num_images=4000, seed=3, training=True),
    "digits_test": Split(num_images=600, seed=4, training=False),
}


def register_digits() -> None:
    """Registers the splits; each is generated when it is first loaded."""
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))) / "digits"
    for name, split in SPLITS.items():
        folder = root / name.removeprefix("digits_")
        DatasetCatalog.register(name, lambda n=name, s=split, f=folder: _load(n, s, f))
        MetadataCatalog.get(name).set(
            json_file=str(folder / "annotations.json"),
            image_root=str(folder / "images"),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
        )


def _load(name: str, split: Split, folder: Path) -> list[dict]:
    make_digits(split, folder)
    return load_coco_json(str(folder / "annotations.json"), str(folder / "images"), name)


def make_digits(split: Split, folder: Path) -> None:
    """Draws a split into ``folder``, which appears all at once or not at all.

    Args:
        split: what to draw.
        folder: where to; nothing happens if it holds a split. Its parent is made if missing.
    """
    if (folder / "annotations.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may want the data at once: one draws, the others wait.
    with file_lock(str(folder)):
        if (folder / "annotations.json").exists():
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        (partial / "images").mkdir(parents=True)
        try:
            annotations = _draw(split, partial / "images", title=f"drawing {folder}")
            (partial / "annotations.json").write_text(json.dumps(annotations))
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _draw(split: Split, images: Path, title: str) -> dict:
    maker = SceneMaker(split.training)
    coco = _Coco()
    for image_id in tqdm(range(1, split.num_images + 1), desc=title, unit="image", disable=None):
        # Each image has a seed of its own, so that it does not depend on those before it.
        scene = maker.make(np.random.default_rng((split.seed, image_id)))
        file_name = f"{image_id:06d}.jpg"
        path = str(images / file_name)
        if not cv2.imwrite(path, scene.image, [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f"{path} could not be written")
        coco.add(image_id, file_name, scene)
    return coco.as_dict()


@dataclass
class _Coco:
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)

    def add(self, image_id: int, file_name: str, scene) -> None:
        height, width = scene.image.shape[:2]
        self.images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width}
        )
        for label, box, mask in zip(scene.labels, scene.boxes, scene.masks, strict=True):
            polygons = [np.float32(polygon).reshape(-1, 2) for polygon in mask]
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": list(box),
                    "segmentation": mask,
                    "area": round(sum(map(cv2.contourArea, polygons)), 2),
                    "iscrowd": 0,
                }
            )

    def as_dict(self) -> dict:
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
        return {
            "info": {"description": "handwritten digits on photographs, from scikit-learn"},
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
