"""What a process that loads images takes for each, and one that trains to receive them."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from PIL import Image
from torch.utils.data import DataLoader

from libra_d2.data.cache import CachingMapper
from libra_d2.data.packing import pack
from libra_d2.data.resize import use_resize
from libra_d2.engine import load_config

from .measuring import CONFIGS, make_inputs, measure, show

_SIZES = (480, 640), (3000, 4000)  # COCO's, and a telephone's
_LOAD_AHEAD = 0.4  # seconds, in which the next batch is made


def benchmark_loading(repeats: int) -> None:
    """In one thread, as a worker has it: of JPEG files, at 800 pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in _SIZES:
            with tempfile.TemporaryDirectory() as folder:
                _measure_image(size, folder, repeats)
        for size, num_images in (((320, 416), 4), ((800, 1216), 16)):
            _measure_passing(size, num_images, repeats)
    finally:
        torch.set_num_threads(threads)


def _measure_passing(size: tuple[int, int], num_images: int, repeats: int) -> None:
    """Batches that wait, made of images in memory by one process."""
    # Copies: those are in pinned memory, which is not for another process.
    images = [{**x, "image": x["image"].clone()} for x in make_inputs(size, num_images)]
    loaders = [
        iter(DataLoader(images * (repeats + 3), num_images, num_workers=1, collate_fn=collate))
        for collate in (list, pack)
    ]
    seconds = {"by torch, each tensor by itself": [], "packed": []}
    for _ in range(repeats):
        for loader, taken in zip(loaders, seconds.values(), strict=True):
            time.sleep(_LOAD_AHEAD)
            start = time.perf_counter()
            batch = _take(loader)
            taken.append(time.perf_counter() - start)
            del batch  # not while the next is timed
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    whole = next(iter(medians.values()))
    rows = [(name, 1000 * s, s / whole) for name, s in medians.items()]
    title = f"Taking a batch of {num_images} images of {size[0]}x{size[1]} from a loading process"
    show(title, rows, ("what", "ms", "ratio"))


def _take(loader: Iterator) -> list[Any]:
    batch = next(loader)
    return batch if isinstance(batch, list) else batch.unpack()


def _measure_image(size: tuple[int, int], folder: str, repeats: int) -> None:
    file = f"{folder}/image.jpg"
    Image.fromarray(_make_image(*size)).save(file, quality=90)
    seconds = measure(_ways_to_load(file, size), repeats, calls=5)
    whole = next(iter(seconds.values()))
    rows = [(name, 1000 * s, s / whole) for name, s in seconds.items()]
    title = f"Loading an image of {size[0]}x{size[1]}, at 800x1067, in one process"
    show(title, rows, ("what", "ms", "ratio"))


def _make_image(height: int, width: int) -> np.ndarray:
    """Shapes, edges and noise, of which at 480x640 a JPEG file of some 100 KB comes."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a) * np.cos(y / b) for a, b in ((40, 31), (23, 60), (70, 19))]
    edges = 30 * ((x + 2 * y) % 160 > 80)
    image = 120 + 60 * np.stack(waves, axis=2) + edges[:, :, None]
    return (image + generator.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def _ways_to_load(file: str, size: tuple[int, int]) -> dict[str, Callable]:
    boxes = [[40.0 * i, 30.0 * i, 40.0 * i + 90, 30.0 * i + 70] for i in range(12)]
    annotations = [{"bbox": box, "bbox_mode": 0, "category_id": 0} for box in boxes]
    record = {"file_name": file, "height": size[0], "width": size[1], "annotations": annotations}
    mappers = {}
    for resize in ("pil", "torch"):
        opts = ["INPUT.RESIZE", resize, "INPUT.MIN_SIZE_TRAIN", "(800,)"]
        cfg = load_config(str(CONFIGS / "Base-RCNN-FPN.yaml"), opts)
        mapper = use_resize(DatasetMapper(cfg, True), cfg)
        mappers[f"INPUT.RESIZE {resize}" + " (detectron2)" * (resize == "pil")] = mapper
    mappers["DATALOADER.CACHE, after the first time"] = CachingMapper(
        mapper, f"{file}.kept", [record]
    )
    ways = {name: partial(mapper, record) for name, mapper in mappers.items()}
    ways["of the first two, reading the file"] = partial(read_image, file, "BGR")
    return ways
