"""What a detector finds in one image, in the forms that people use."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["Result"]


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The objects found in one image, by falling score.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4) float32, corners x1, y1, x2, y2 in pixels.
        scores: (N,) float32, in [0, 1].
        class_ids: (N,) int64, in the order of ``names``.
        names: of all classes of the model.
        masks: (N, H, W) bool, or None of a model without.
        keypoints: (N, K, 3) float32 of x, y in pixels and score, or None of a model without.
        path: where the image comes from, if that is known.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    names: Sequence[str]
    masks: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    path: str | None = None

    def __repr__(self) -> str:
        counts = Counter(self.class_names).most_common()
        what = ", ".join(f"{number} {name}" for name, number in counts)
        return f"Result({what or 'nothing'}{f' in {self.path}' if self.path else ''})"

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def class_names(self) -> list[str]:
        """The class of each object."""
        return [self.names[i] for i in self.class_ids]

    def filter(self, keep: np.ndarray) -> "Result":
        """The objects that a mask or indices choose."""
        parts = {name: getattr(self, name) for name in ("masks", "keypoints")}
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            class_ids=self.class_ids[keep],
            **{name: None if part is None else part[keep] for name, part in parts.items()},
        )

    def plot(self) -> np.ndarray:
        """The image with what was found, (H, W, 3) uint8, RGB."""
        from libra_d2.drawing import draw

        labels = [f"{n} {s:.0%}" for n, s in zip(self.class_names, self.scores, strict=True)]
        return draw(self.image, self.boxes, self.class_ids, labels, self.masks)

    def save(self, path: str) -> None:
        """Writes :meth:`plot` to an image file."""
        from PIL import Image

        Image.fromarray(self.plot()).save(path)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Each object: class, class_id, score, box (x1, y1, x2, y2), and if any, keypoints, mask.

        A mask is COCO's run-length encoding.
        """
        records = [
            {
                "class": self.names[c],
                "class_id": int(c),
                "score": round(float(s), 5),
                "box": [round(float(x), 2) for x in box],
            }
            for c, s, box in zip(self.class_ids, self.scores, self.boxes, strict=True)
        ]
        for i, record in enumerate(records):
            if self.keypoints is not None:
                record["keypoints"] = [round(float(x), 3) for x in self.keypoints[i].ravel()]
            if self.masks is not None:
                from pycocotools import mask as mask_util

                rle = mask_util.encode(np.asfortranarray(self.masks[i].astype(np.uint8)))
                record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        return records

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] = ()) -> list[dict]:
        """Each object as COCO's results have it, boxes as x, y, width, height.

        Args:
            image_id: of the image.
            category_ids: of the classes; empty to count them from 1.
        """
        records = self.to_dicts()
        for record in records:
            x1, y1, x2, y2 = record.pop("box")
            class_id = record.pop("class_id")
            del record["class"]
            record["image_id"] = image_id
            record["category_id"] = category_ids[class_id] if category_ids else class_id + 1
            record["bbox"] = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
        return records

    def to_yolo(self) -> list[str]:
        """Each object as a line: class, centre x and y, width, height as fractions, and score."""
        height, width = self.image.shape[:2]
        lines = []
        for (x1, y1, x2, y2), c, s in zip(self.boxes, self.class_ids, self.scores, strict=True):
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
            box += ((x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{c} {' '.join(f'{x:.6f}' for x in box)} {s:.5f}")
        return lines

    def to_supervision(self) -> Any:
        """supervision's ``Detections``, where that package is installed."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.class_ids,
            mask=self.masks,
            data={"class_name": np.array(self.class_names)},
        )
