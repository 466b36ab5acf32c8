"""The levels of a pyramid before and after it is balanced (Libra R-CNN, section 3.2)."""

from pathlib import Path

import torch

from libra_d2.inference.detector import Detector
from libra_d2.modeling import BalancedPyramid

from .looking import annotated_images, picture_of
from .pictures import new_figure, save

__all__ = ["analyse_features"]


@torch.no_grad()
def analyse_features(detector: Detector, output: Path, image: int) -> list[str]:
    """Draws each level's mean absolute activation, before and after BFP, and what BFP adds.

    Args:
        detector: with a :class:`BalancedPyramid`.
        output: the picture.
        image: which of the data set, from 0.
    """
    backbone = detector.model.backbone
    if not isinstance(backbone, BalancedPyramid):
        raise ValueError(f"the backbone is a {type(backbone).__name__}, and not balanced")
    (seen,) = annotated_images(detector, 1, image)
    inputs = detector.model.preprocess_image([seen])
    before, after = backbone.pyramid(inputs.tensor), backbone(inputs.tensor)
    names = backbone.in_features
    figure, axes = new_figure(len(names) + 1, 3, width=3, height=2.6)
    picture = picture_of(detector, seen)
    height, width = picture.shape[:2]
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("image")
    rows, stages = [], ("before", "after", "what BFP adds")
    for j, name in enumerate(names, 1):
        levels = (before[name], after[name], after[name] - before[name])
        # Without the padding.
        own_height, own_width = (
            max(1, round(side * own / padded))
            for side, own, padded in zip(
                after[name].shape[-2:], (height, width), inputs.tensor.shape[-2:], strict=True
            )
        )
        maps = [level[0].abs().mean(dim=0)[:own_height, :own_width].cpu() for level in levels]
        top = max(m.max().item() for m in maps[:2])
        for i, (stage, values) in enumerate(zip(stages, maps, strict=True)):
            shown = axes[i, j].imshow(values, vmin=0, vmax=top)
            axes[i, j].set_title(f"{name}, {stage}", fontsize=9)
            figure.colorbar(shown, ax=axes[i, j], shrink=0.7)
            mean, spread = values.mean().item(), values.std().item()
            rows.append({"level": name, "stage": stage, "mean": mean, "deviation": spread})
    for own in axes.ravel():
        own.set_xticks([])
        own.set_yticks([])
    for own in axes[1:, 0]:
        own.set_visible(False)
    figure.suptitle("Mean absolute activation of the pyramid's levels")
    save(figure, output, rows)
    return [
        f"{row['level']}: mean absolute activation {row['mean']:.4g} before, "
        f"{after_row['mean']:.4g} after"
        for row, after_row in zip(rows[::3], rows[1::3], strict=True)
    ]
