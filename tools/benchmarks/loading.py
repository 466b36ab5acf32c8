"""What a process that loads images takes for each."""

import tempfile
from collections.abc import Callable

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from PIL import Image

from libra_d2.data.resize import use_resize
from libra_d2.engine import load_config

from .measuring import CONFIGS, measure, show

_SIZE = 480, 640


def benchmark_loading(repeats: int) -> None:
    """In one thread, as a worker has it: of a JPEG file, at 800 pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/image.jpg"
            Image.fromarray(_make_image()).save(file, quality=90)
            seconds = measure(_ways_to_load(file), repeats, calls=5)
    finally:
        torch.set_num_threads(threads)
    whole = seconds["INPUT.RESIZE pil (detectron2)"]
    rows = [(name, 1000 * s, s / whole) for name, s in seconds.items()]
    show("Loading an image of 480x640, at 800x1067, in one process", rows, ("what", "ms", "ratio"))


def _make_image() -> np.ndarray:
    """Shapes, edges and noise, of which a JPEG file of some 100 KB comes."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[: _SIZE[0], : _SIZE[1]]
    waves = [np.sin(x / a) * np.cos(y / b) for a, b in ((40, 31), (23, 60), (70, 19))]
    edges = 30 * ((x + 2 * y) % 160 > 80)
    image = 120 + 60 * np.stack(waves, axis=2) + edges[:, :, None]
    return (image + generator.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def _ways_to_load(file: str) -> dict[str, Callable]:
    boxes = [[40.0 * i, 30.0 * i, 40.0 * i + 90, 30.0 * i + 70] for i in range(12)]
    annotations = [{"bbox": box, "bbox_mode": 0, "category_id": 0} for box in boxes]
    record = {"file_name": file, "height": _SIZE[0], "width": _SIZE[1], "annotations": annotations}
    ways = {}
    for resize in ("pil", "torch"):
        opts = ["INPUT.RESIZE", resize, "INPUT.MIN_SIZE_TRAIN", "(800,)"]
        cfg = load_config(str(CONFIGS / "Base-RCNN-FPN.yaml"), opts)
        mapper = use_resize(DatasetMapper(cfg, True), cfg)
        name = f"INPUT.RESIZE {resize}" + " (detectron2)" * (resize == "pil")
        ways[name] = lambda mapper=mapper: mapper(record)
    ways["of it, reading the file"] = lambda: read_image(file, "BGR")
    return ways
