"""Puts the page together."""

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import numpy as np
from detectron2.config import get_cfg

from libra_d2.checkpoint import write_whole
from libra_d2.config import add_libra_config, list_keys
from libra_d2.metrics import split_score

from .errors import confusion_matrix, error_kinds
from .figures import curve, side_by_side
from .run import Run, read_run
from .scored import Image, match, precision_recall

__all__ = ["write_report"]

_SHOWN_SCORE = 0.5
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
_NOT_SHOWN = ("OUTPUT_DIR", "train.output_dir", "VERSION")


def write_report(
    folders: Sequence[Path], output: Path, *, dataset: str = "", number: int = 4
) -> None:
    """Writes one page about runs, which needs nothing beside it.

    Args:
        folders: OUTPUT_DIR of each.
        output: the page, .html.
        dataset: what the predictions are of; "" for the last of each run's test data.
        number: how many images of each kind are shown.

    Raises:
        ValueError: if a folder is none of a run, or the page can't be written.
    """
    parts = [folder.resolve().parts for folder in folders]
    names = [p[-1] for p in parts]
    if len(set(names)) < len(names):
        names = ["/".join(p[-2:]) for p in parts]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(*pair, dataset) for pair in zip(folders, names, strict=True)]
    scored = [run for run in runs if run.images]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        runs=runs,
        summary=_summary(runs),
        curves=_curves(runs),
        classes=_by_class(runs),
        precision_recall=_precision_recall(scored),
        errors=_errors(scored),
        confusions=[(run.name, _confusion(run)) for run in scored],
        galleries=[(run.name, _galleries(run, number)) for run in scored],
        differences=_differences(runs),
        commands=[(run.name, _command(run)) for run in runs],
        shown_score=_SHOWN_SCORE,
    )
    write_whole(str(output), lambda path: Path(path).write_text(page, encoding="utf-8"))


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def _summary(runs: Sequence[Run]) -> dict:
    """A row for each metric that any run has, with differences to the first run."""
    names = dict.fromkeys(n for run in runs for n in run.results)
    wanted = [name for name in names if not split_score(name)[2].startswith("AP-")]
    rows = []
    for name in wanted:
        values = [run.results.get(name) for run in runs]
        first = values[0]
        cells = []
        for i, value in enumerate(values):
            is_apart = i and None not in (first, value) and math.isfinite(value - first)
            cells.append((_number(value), f"{value - first:+.1f}" if is_apart else ""))
        rows.append((name, cells))
    trained = [[r["iteration"] for r in run.records if "lr" in r] for run in runs]
    lengths = [str(max(own) + 1) if own else "-" for own in trained]
    return {"rows": rows, "lengths": lengths}


def _curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    names = sorted({name for run in runs for record in run.records for name in record})

    def lines(wanted: Sequence[str], scale: float = 1.0) -> dict:
        found = {}
        for run in runs:
            for name in wanted:
                label = " ".join(
                    [run.name] * (len(runs) > 1) + [name] * (len(wanted) > 1 or len(runs) == 1)
                )
                found[label] = [
                    (r["iteration"], r[name] * scale)
                    for r in run.records
                    if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])
                ]
        return found

    parts = [n for n in names if n.startswith("loss_")]
    bins = [n for n in names if n.startswith("roi_head/negative_iou_bin")]
    aps = [n for n in names if (split := split_score(n)) and split[2] in ("AP", "AP50", "AR@100")]
    tested = [n for n in names if n.endswith("validation/total_loss")]
    charts = [
        ("Loss", lines(["total_loss"]), "loss", True),
        ("Parts of the loss", lines(parts), "loss", True),
        ("Loss on the test data", lines(tested), "loss", True),
        ("AP", lines(aps), "AP (%)", False),
        ("Sampled negatives, by bin of IoU", lines(bins, 100), "share (%)", False),
        ("Learning rate", lines(["lr"]), "learning rate", False),
        ("Norm of the gradients", lines(["grad_norm"]), "norm", True),
    ]
    drawn = [(title, curve(own, "iteration", y, log=log)) for title, own, y, log in charts]
    return [(title, svg) for title, svg in drawn if svg]


def _by_class(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Rows of AP by size and by class, each a number and the width of a bar for each run."""
    rows = []
    names = dict.fromkeys(n for run in runs for n in run.results)
    for name in names:
        dataset, task, metric = split_score(name)
        if metric not in _SIZES and not metric.startswith("AP-"):
            continue
        label = f"{_SIZES[metric]} objects" if metric in _SIZES else metric.removeprefix("AP-")
        label += f" ({task}{f', {dataset}' if dataset else ''})"
        values = [run.results.get(name, math.nan) for run in runs]
        rows.append((label, [(_number(v), 0.0 if math.isnan(v) else v) for v in values]))
    return rows


def _precision_recall(runs: Sequence[Run]) -> str:
    lines = {}
    for run in runs:
        curves = precision_recall(run.images, len(run.class_names))
        if np.isfinite(curves).any():
            mean = 100 * np.nanmean(curves, axis=0)
            lines[run.name] = list(zip(range(101), mean, strict=True))
    return curve(lines, "recall (%)", "precision (%), mean of classes")


def _errors(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[int, str]]]]:
    """Rows of a kind, what it means, and each run's number and cost."""
    kinds = [error_kinds(run.images, len(run.class_names)) for run in runs]
    return [
        (of[0].name, of[0].meaning, [(kind.number, f"{kind.cost:+.1f}") for kind in of])
        for of in zip(*kinds, strict=True)
    ]


def _confusion(run: Run) -> dict:
    matrix = confusion_matrix(run.images, len(run.class_names), _SHOWN_SCORE)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [*run.class_names, "background"]
    cells = [
        (name, list(zip(row.tolist(), own.round(3).tolist(), strict=True)))
        for name, row, own in zip(names, matrix, shares, strict=True)
    ]
    return {"names": [*run.class_names, "missed"], "rows": cells}


def _galleries(run: Run, number: int) -> list[tuple[str, list[dict]]]:
    """Images that are right, wrong, and confidently wrong, each with what there is to say."""
    quality = [_quality(image) for image in run.images]
    with_objects = [i for i, image in enumerate(run.images) if len(image.truth_classes)]
    best = sorted(with_objects, key=lambda i: (-quality[i], -len(run.images[i].truth_classes)))
    wrong = [(_highest_wrong(image), i) for i, image in enumerate(run.images)]
    wrong = sorted((pair for pair in wrong if pair[0] > 0), reverse=True)

    def show(chosen: Sequence[int], say: Callable[[int], str]) -> list[dict]:
        return [
            {
                "picture": side_by_side(run.images[i], run.class_names, _SHOWN_SCORE),
                "caption": f"{Path(run.images[i].file).name}: {say(i)}",
            }
            for i in chosen[:number]
        ]

    def say_quality(i: int) -> str:
        image = run.images[i]
        found = int((match(image, _SHOWN_SCORE) >= 0).sum())
        return f"{found} of {len(image.truth_classes)} objects found, F1 {quality[i]:.2f}"

    highest = {i: score for score, i in wrong}
    return [
        ("Best", show(best, say_quality)),
        ("Worst", show(best[::-1], say_quality)),
        (
            "Most confidently wrong",
            show([i for _, i in wrong], lambda i: f"wrong with a score of {highest[i]:.2f}"),
        ),
    ]


def _quality(image: Image) -> float:
    """F1 of what scores enough to be shown."""
    found = int((match(image, _SHOWN_SCORE) >= 0).sum())
    shown = int((image.scores >= _SHOWN_SCORE).sum())
    return 2 * found / max(shown + int((~image.crowds).sum()), 1)


def _highest_wrong(image: Image) -> float:
    return float(image.scores[image.truth_of == -1].max(initial=0.0))


def _differences(runs: Sequence[Run]) -> dict:
    """Keys in which runs differ; of a single one, those that are not detectron2's defaults."""
    columns, names = [run.config for run in runs], [run.name for run in runs]
    if len(runs) == 1:
        cfg = get_cfg()
        add_libra_config(cfg)
        defaults = {k: v for k, v in list_keys(cfg) if not isinstance(v, dict)}
        if not set(defaults) & set(columns[0]):  # a LazyConfig has no defaults
            return {"names": names, "rows": []}
        columns, names = [defaults, *columns], ["default", *names]
    rows = [
        (key, [_shown(own.get(key)) for own in columns])
        for key in dict.fromkeys(k for own in columns for k in own)
        if len({_shown(own.get(key)) for own in columns}) > 1 and key not in _NOT_SHOWN
    ]
    return {"names": names, "rows": rows}


def _shown(value: object) -> str:
    """As text; of a yaml file a tuple comes back as a list."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return repr(value)


def _command(run: Run) -> str:
    """What repeats a run; "" of a LazyConfig, whose file alone can be run."""
    if "dataloader.test.dataset.names" in run.config:
        return ""
    folder = run.folder.resolve()
    config, output = folder / "config.yaml", folder.with_name(f"{folder.name}-again")
    return shlex.join(
        ["python", "train_net.py", "--config-file", str(config), "--output", str(output)]
    )
