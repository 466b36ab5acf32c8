"""Curves and images, as what a page holds in itself."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image as Picture

from libra_d2.analysis.pictures import plain_text
from libra_d2.data.images import open_image, to_rgb
from libra_d2.drawing import draw, shrink

from .scored import Image

__all__ = ["curve", "side_by_side"]

# Taken for what the page's text has, dark or light.
_TEXT = "#010203"
# Told apart on white and on black, and by those who see few colours.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c00", "#999999")
_LONGEST = 420
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "libra_d2",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.prop_cycle": matplotlib.cycler(color=_COLORS),
}


def curve(
    lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, *, log: bool = False
) -> str:
    """Lines by name, as an SVG; "" if there are none.

    Args:
        lines: points (x, y) of each.
        x: name and unit of the axis.
        y: the same.
        log: whether y is logarithmic.
    """
    lines = {name: points for name, points in lines.items() if len(points)}
    if not lines:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            marker = "o" if len(points) < 15 else ""
            axes.plot(
                *zip(*points, strict=True), marker=marker, markersize=3, label=plain_text(name)
            )
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            legend = axes.legend(fontsize=7, framealpha=0)
            legend.get_frame().set_linewidth(0)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    return svg.replace("<svg ", '<svg role="img" ', 1)


def side_by_side(image: Image, names: Sequence[str], minimum: float) -> str:
    """Ground truths on the left and what was found on the right, as a data: address of a JPEG.

    Args:
        image: which.
        names: of the classes.
        minimum: the lowest score that is drawn.
    """
    try:
        pixels = np.asarray(to_rgb(open_image(image.file)))
    except ValueError:
        pixels = np.full((120, 160, 3), 128, np.uint8)
    scale = min(1.0, _LONGEST / max(pixels.shape[:2]))
    pixels = shrink(pixels, _LONGEST)
    truths = [names[c] for c in image.truth_classes]
    left = draw(pixels, image.truth_boxes * scale, image.truth_classes, truths)
    seen = image.scores >= minimum
    pairs = zip(image.classes[seen], image.scores[seen], strict=True)
    found = [f"{names[c]} {s:.0%}" for c, s in pairs]
    right = draw(pixels, image.boxes[seen] * scale, image.classes[seen], found)
    stream = io.BytesIO()
    Picture.fromarray(np.concatenate([left, right], axis=1)).save(stream, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
