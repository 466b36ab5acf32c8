"""The inspection of data sets as one html file that needs no other."""

import base64
import html
import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from libra_d2.drawing import draw

from .images import open_image
from .inspection import Inspection

__all__ = ["MARK", "make_report"]

_PICTURES = 8  # images shown of each data set
_SIDE = 640  # pixels of the longer side of an image that is shown
_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #222; line-height: 1.45 }
h1, h2 { font-weight: 600 } h2 { margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em }
li.fatal { color: #b00020; font-weight: 600 } li.harmless { color: #8a5a00 }
.ok { color: #1b6e2d; font-weight: 600 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 10px }
img { max-width: 100% } figure { margin: 0 } figcaption { font-size: 0.8em; color: #555 }
"""


MARK = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data sets</title>'


def make_report(
    inspections: Sequence[Inspection], shared: Sequence[str], anchors: Sequence[Sequence[str]]
) -> str:
    """The report's html.

    Args:
        inspections: of each data set.
        shared: sentences about what they have in common.
        anchors: lines about the anchors, of each data set.
    """
    parts = ["<h1>Data sets</h1>"]
    if shared:
        parts.append(_list([(sentence, "fatal") for sentence in shared]))
    for found, lines in zip(inspections, anchors, strict=True):
        parts.append(f"<h2>{html.escape(found.source.name)}</h2>")
        parts.append(_list([(line, "") for line in (*found.lines(), *lines)]))
        problems = [(p.what, "fatal" if p.is_fatal else "harmless") for p in found.problems]
        parts.append("<h3>Problems</h3>")
        parts.append(_list(problems) if problems else '<p class="ok">None found.</p>')
        if found.hints:
            parts.append("<h3>Good to know</h3>" + _list([(hint, "") for hint in found.hints]))
        if len(found.sides):
            parts.append("<h3>Objects</h3>" + _charts(found))
        parts.append("<h3>Images, with what is marked in them</h3>" + _pictures(found))
    return f"{MARK}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def _list(items: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f'<li class="{kind}">{html.escape(text)}</li>' for text, kind in items)
    return f"<ul>{rows}</ul>"


def _embed(image: np.ndarray | Figure, caption: str, alt: str) -> str:
    stream = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(stream, format="png", dpi=90)
        kind = "png"
    else:
        picture = Image.fromarray(image)
        picture.thumbnail((_SIDE, _SIDE))
        picture.save(stream, "JPEG", quality=85)
        kind = "jpeg"
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _charts(found: Inspection) -> str:
    def classes(axes) -> None:
        names = [name[:24] for name in found.counts][:40]
        axes.barh(range(len(names)), list(found.counts.values())[:40])
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title("objects of each class")

    def sides(axes) -> None:
        low, high = found.sides.min(), found.sides.max()
        axes.hist(found.sides, bins=np.geomspace(low * 0.9, high * 1.1, 40))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.set_title("box sides, square root of the area (pixels)")

    def ratios(axes) -> None:
        axes.hist(np.clip(found.ratios, 0.1, 10), bins=np.geomspace(0.1, 10, 40))
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.25, 0.5, 1, 2, 4, 10], ["0.1", "1/4", "1/2", "1", "2", "4", "10"])
        axes.set_title("height / width")

    def per_image(axes) -> None:
        axes.hist(found.per_image, bins=np.arange(found.per_image.max() + 2) - 0.5)
        axes.set_title("objects an image")

    charts: tuple[Callable, ...] = (classes, sides, ratios, per_image)
    figures = []
    for chart in charts:
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        chart(figure.add_subplot())
        figures.append(_embed(figure, "", chart.__name__.replace("_", " ")))
    return f'<div class="grid">{"".join(figures)}</div>'


def _pictures(found: Inspection) -> str:
    """Images with boxes: those with problems first, then from all over the data set."""
    images = {image.id: image for image in found.source.coco.images}
    annotations: dict = {}
    for annotation in found.source.coco.annotations or ():
        annotations.setdefault(annotation.image_id, []).append(annotation)
    bad = {i for problem in found.problems for i in problem.annotation_ids}
    wrong = [i for i, own in annotations.items() if any(a.id in bad for a in own)]
    spread = list(images)[:: max(1, len(images) // _PICTURES)]
    chosen = list(dict.fromkeys([*wrong[: _PICTURES // 2], *spread]))
    ids = sorted(c.id for c in found.source.coco.categories)
    names = {c.id: c.name for c in found.source.coco.categories}
    figures = []
    for image_id in chosen[:_PICTURES]:
        name = images[image_id].file_name or ""
        try:
            picture = np.asarray(open_image(found.source.image_root / name))
        except ValueError:
            continue
        own = annotations.get(image_id, [])
        boxes = np.array([a.bbox for a in own], dtype=float).reshape(-1, 4)
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 0)
        labels = [names[a.category_id] + ("!" if a.id in bad else "") for a in own]
        drawn = draw(picture, boxes, [ids.index(a.category_id) for a in own], labels)
        note = ", has a box with a problem (!)" if image_id in wrong else ""
        figures.append(_embed(drawn, f"{name}: {len(own)} objects{note}", name))
    return f'<div class="grid">{"".join(figures)}</div>'
