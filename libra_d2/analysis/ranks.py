"""PISA's prime samples on an image (section 3.2)."""

from pathlib import Path

import torch
from detectron2.structures import Boxes, pairwise_iou
from matplotlib.patches import Rectangle

from libra_d2.inference.detector import Detector
from libra_d2.modeling import ScoreHlrSampler
from libra_d2.ranking import hierarchical_local_rank

from .looking import annotated_images, candidates_of, picture_of
from .pictures import new_figure, save

__all__ = ["analyse_ranks"]

_SHOWN = 12


@torch.no_grad()
def analyse_ranks(detector: Detector, output: Path, image: int) -> list[str]:
    """Draws the positives of the first IoU ranks and the negatives of the first score ranks.

    Args:
        detector: two-stage.
        output: the picture.
        image: which of the data set, from 0.
    """
    (seen,) = annotated_images(detector, 1, image)
    candidates = candidates_of(detector, seen)
    matches, boxes = candidates.matches, candidates.boxes
    positives, negatives = (matches.labels == 1).nonzero()[:, 0], matches.labels == 0
    rows, shown = [], {"IoU-HLR: positives": [], "score-HLR: negatives": []}
    if len(positives):
        truths = candidates.truths
        regressed = Boxes(matches.predictions.boxes[positives])
        of = matches.gt_indices[positives]
        ious = pairwise_iou(truths.gt_boxes, regressed)[of, torch.arange(len(of), device=of.device)]
        ranks = hierarchical_local_rank(ious, of, truths.gt_classes[of])
        for i in ranks.argsort(stable=True).tolist():
            rows.append(_row("positive", int(ranks[i]), boxes[positives[i]], ious[i], of[i]))
    scores = matches.predictions.logits.softmax(dim=1)[:, :-1].amax(dim=1)
    torch.manual_seed(0)
    kept = ScoreHlrSampler()(matches, negatives, int(negatives.sum()))
    prime = (kept & (scores > ScoreHlrSampler().score_thresh)).nonzero()[:, 0]
    order = prime[matches.weights[prime].argsort(descending=True, stable=True)]
    for rank, i in enumerate(order.tolist()):
        rows.append(_row("negative", rank, boxes[i], scores[i], -1))
    if not rows:
        raise ValueError(f"image {image} has no positives, nor negatives with scores; give another")
    for row in rows:
        name = list(shown)[row["kind"] == "negative"]
        if row["rank"] < _SHOWN:
            shown[name].append(row)
    figure, (axes,) = new_figure(2, width=6, height=5)
    for axis, (title, chosen) in zip(axes, shown.items(), strict=True):
        axis.imshow(picture_of(detector, seen))
        for row in sorted(chosen, key=lambda row: -row["rank"]):
            share = 1 - row["rank"] / _SHOWN
            corner, size = (row["x1"], row["y1"]), (row["x2"] - row["x1"], row["y2"] - row["y1"])
            color = (1, 1 - share, 0)
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=1.6))
            axis.text(*corner, row["rank"], fontsize=7, color="black", backgroundcolor=color)
        axis.set(title=f"{title}, ranks below {_SHOWN}", xlabel="x (pixels)", ylabel="y (pixels)")
    save(figure, output, rows)
    counts = [sum(row["kind"] == kind for row in rows) for kind in ("positive", "negative")]
    return [f"{counts[0]} positives, {counts[1]} negatives that score above 0.05"]


def _row(kind: str, rank: int, box, value, truth) -> dict:
    corners = dict(zip(("x1", "y1", "x2", "y2"), box.tolist(), strict=True))
    # IoU of the predicted box for a positive, score for a negative.
    return {"kind": kind, "rank": rank, "value": float(value), "object": int(truth), **corners}
