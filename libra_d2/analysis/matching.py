"""Which anchors an object gets, by IoU and by Mutual Guidance."""

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from matplotlib.patches import Rectangle

from libra_d2.inference.detector import Detector
from libra_d2.modeling import MutualGuidanceMatcher

from .looking import annotated_images, dense_predictions, picture_of
from .pictures import new_figure, plain_text, save

__all__ = ["analyse_matching"]

_COLUMNS = ("IoU", "guided: to classify", "guided: to localize")


@torch.no_grad()
def analyse_matching(
    detectors: dict[str, Detector], output: Path, image: int, truth: int | None = None
) -> list[str]:
    """Draws the centres of an object's positive anchors; a row for each model.

    Args:
        detectors: RetinaNets, such as checkpoints of one run, by name.
        output: the picture.
        image: which of the data set, from 0.
        truth: which of its objects, from 0; None for the largest.
    """
    figure, axes = new_figure(3, len(detectors), width=3.6, height=3.4)
    rows = []
    for name, detector, own in zip(detectors, detectors.values(), axes, strict=True):
        (seen,) = annotated_images(detector, 1, image)
        gt = seen["instances"].to(detector.model.device)
        if len(gt) == 0:
            raise ValueError(f"image {image} has no objects; name another with --image")
        chosen = int(gt.gt_boxes.area().argmax()) if truth is None else truth
        if not 0 <= chosen < len(gt):
            raise ValueError(f"--object must be in [0, {len(gt) - 1}] for this image, got {chosen}")
        anchors, logits, deltas = dense_predictions(detector, seen)
        matched = _positives_of(detector, gt, chosen, anchors, logits, deltas)
        box = gt.gt_boxes.tensor[chosen].tolist()
        for axis, column, positives in zip(own, _COLUMNS, matched, strict=True):
            _draw(axis, picture_of(detector, seen), box, anchors.tensor[positives].cpu())
            axis.set_title(
                f"{plain_text(name)}\n{column}: {int(positives.sum())} anchors", fontsize=9
            )
        agreed = int((matched[1] & matched[2]).sum())
        rows.append(
            {
                "model": name,
                "image": image,
                "object": chosen,
                **{c: int(p.sum()) for c, p in zip(_COLUMNS, matched, strict=True)},
                "both guided": agreed,
                "IoU and guided to classify": int((matched[0] & matched[1]).sum()),
            }
        )
    save(figure, output, rows)
    return [
        f"{row['model']}: {row[_COLUMNS[0]]} anchors by IoU, {row[_COLUMNS[1]]} to classify, "
        f"{row[_COLUMNS[2]]} to localize, {row['both guided']} for both"
        for row in rows
    ]


def _positives_of(
    detector: Detector, gt, chosen: int, anchors, logits, deltas: Sequence
) -> list[torch.Tensor]:
    """Masks of the anchors that the object gets, by each way to match."""
    model = detector.model
    index, labels = model.anchor_matcher(pairwise_iou(gt.gt_boxes, anchors))
    by_iou = (labels == 1) & (index == chosen)
    matcher = getattr(model, "prediction_matcher", None) or MutualGuidanceMatcher()
    with EventStorage():
        (classes,), (boxes,), ((box_classes,), (box_boxes,)) = matcher(
            anchors, logits[None], deltas[None], [gt], model.box2box_transform
        )
    own = gt.gt_boxes.tensor[chosen]
    guided = [
        (c >= 0) & (c < model.num_classes) & (b == own).all(dim=1)
        for c, b in ((classes, boxes), (box_classes, box_boxes))
    ]
    return [by_iou, *guided]


def _draw(axis, picture, box: list[float], anchors: torch.Tensor) -> None:
    x1, y1, x2, y2 = box
    axis.imshow(picture)
    size = {"width": x2 - x1, "height": y2 - y1}
    axis.add_patch(Rectangle((x1, y1), **size, fill=False, edgecolor="white", linewidth=2))
    for left, top, right, bottom in anchors.tolist():
        shape = {"width": right - left, "height": bottom - top}
        line = {"fill": False, "edgecolor": "yellow", "linewidth": 0.6, "alpha": 0.5}
        axis.add_patch(Rectangle((left, top), **shape, **line))
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    axis.scatter(centers[:, 0], centers[:, 1], s=10, color="red", zorder=3)
    margin = 0.6 * max(x2 - x1, y2 - y1)
    axis.set_xlim(max(0, x1 - margin), min(picture.shape[1], x2 + margin))
    axis.set_ylim(min(picture.shape[0], y2 + margin), max(0, y1 - margin))
    axis.set_xlabel("x (pixels)")
    axis.set_ylabel("y (pixels)")
