"""A file to deploy, what is to be known of it, and a script that runs it, side by side."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor
from torch.nn import functional as F

from libra_d2.checkpoint import write_whole
from libra_d2.engine.own_data import register_data
from libra_d2.inference.detector import Detector
from libra_d2.modeling.half import tf32

from .agreement import EXACT, HALF, check_agreement
from .export import FORMATS, check_exportable, export_model, open_exported, smallest_side
from .exportable import Exportable

__all__ = ["bundle_files", "export_detector"]

# Of the size that the config tests at: three images are compared at.
_SCALES = ((1.0, 1.0), (0.75, 0.6), (0.55, 0.85))


def bundle_files(file: str | Path) -> tuple[Path, Path, Path]:
    """The exported file, its json and its script."""
    file = Path(file)
    return file, Path(f"{file}.json"), Path(f"{file}.py")


def export_detector(
    detector: Detector,
    file: str | Path,
    *,
    format: str,
    batch: int = 1,
    half: bool = False,
    images: Sequence[str | Path] = (),
) -> dict:
    """Writes a detector to a file that agrees with it, a json and a script that runs it.

    Args:
        detector: whose ``threshold`` is in the file.
        file: to write, ending as its format asks for.
        format: one of ``FORMATS``.
        batch: how many images go in at once; a scripted model takes any number.
        half: whether backbone and heads compute in half precision.
        images: to compare the two on; none for the first of the config's test data.

    Returns:
        What the json says.

    Raises:
        ValueError: if the detector can't be exported, or the two do not agree; nothing is written.
    """
    file, about, script = bundle_files(file)
    check_exportable(detector.model, format, half)
    if file.suffix != FORMATS[format]:
        raise ValueError(f"a file of format {format} must end in {FORMATS[format]}, got '{file}'")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    record = _describe(detector, format, batch, half)
    samples = _samples(detector, images or _test_images(detector), batch, format)

    def write(path: str) -> None:
        # A GPU would round convolutions to TF32, which a file that runs on a CPU does not; a traced
        # one keeps what it was traced with.
        with torch.no_grad(), tf32(False):
            export_model(detector.model, path, format=format, image=samples[0], half=half)
            record["agreed_at"] = check_agreement(
                Exportable(detector.model).eval(),
                open_exported(path, format),
                samples,
                HALF if half else EXACT,
                detector.threshold,
                detector.cfg.TEST.DETECTIONS_PER_IMAGE,
            )

    write_whole(str(file), write)
    record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_whole(str(about), lambda path: Path(path).write_text(json.dumps(record, indent=1)))
    script_of = "run_onnx.py" if format == "onnx" else "run_torch.py"
    text = (Path(__file__).parent / script_of).read_text().replace("MODEL", file.name, 2)
    write_whole(str(script), lambda path: Path(path).write_text(text))
    return record


def _describe(detector: Detector, format: str, batch: int, half: bool) -> dict:
    """What there is to know of a file before it is made."""
    return {
        "format": format,
        "precision": "half" if half else "float32",
        "classes": detector.names,
        "score_threshold": detector.threshold,
        "device": str(detector.model.device),
        "input": {
            "name": "images",
            "shape": ["any" if format == "script" else batch, 3, "height", "width"],
            "dtype": "float32",
            "range": [0, 255],
            "channels": detector.cfg.INPUT.FORMAT,
            "batch": batch,
            "smallest_side": smallest_side(detector.model, format),
            **_sides(detector),
        },
        "outputs": Exportable(detector.model).outputs,
        "made_with": {p: importlib.metadata.version(p) for p in ("torch", "torchvision")},
    }


def _sides(detector: Detector) -> dict[str, int]:
    """To what size an image is brought before the model."""
    resize, *others = detector.augmentations
    if isinstance(resize, ResizeShortestEdge) and not others:
        shorter = resize.short_edge_length
        lengths = set(shorter) if isinstance(shorter, (list, tuple)) else {shorter}
        if len(lengths) == 1 and min(lengths) > 0:
            return {"shorter_side": int(*lengths), "longer_side": int(resize.max_size)}
    raise ValueError(
        "test images must be resized by ResizeShortestEdge to one length, and nothing else done to "
        f"them, for a script to do the same; got {detector.augmentations}"
    )


def _test_images(detector: Detector) -> list[str]:
    """The first of the config's test data."""
    try:
        register_data(detector.cfg, eval_only=True)
        records = get_detection_dataset_dicts(list(detector.cfg.DATASETS.TEST))
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise ValueError(
            "the config's test data cannot be read here; name images to compare the exported model "
            "on with --images"
        ) from error
    return [record["file_name"] for record in records[: len(_SCALES)]]


def _samples(
    detector: Detector, images: Sequence[str | Path], batch: int, format: str
) -> list[Tensor]:
    """Batches (N, 3, H, W) of three sizes, on the detector's device."""
    device, samples = detector.model.device, []
    least = max(32, smallest_side(detector.model, format))
    for i, (tall, wide) in enumerate(_SCALES):
        own = [detector.preprocess(images[(i + j) % len(images)])["image"] for j in range(batch)]
        height, width = own[0].shape[1:]
        size = (max(least, int(height * tall)), max(least, int(width * wide)))
        samples.append(
            torch.cat([F.interpolate(x[None], size=size, mode="bilinear") for x in own]).to(device)
        )
    return samples
