"""Detection over many images."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tqdm import tqdm

from .detector import Detector
from .inputs import Images, Item
from .outputs import Sink
from .result import Result

__all__ = ["predict"]

_AHEAD = 4


def predict(detector: Detector, images: Images, make_sinks: Callable[[], list[Sink]]) -> int:
    """Detects in all images and gives the results to the sinks; tells the speed at the end.

    Returns:
        How many images could not be read; they are named on stderr and left out.
    """
    if images.category_ids and images.class_names and list(images.class_names) != detector.names:
        images.category_ids = _match(images, detector.names)
    sinks, speed = make_sinks(), _Speed()
    try:
        _go_through(detector, images, sinks, speed)
    except KeyboardInterrupt:
        if not images.is_endless:
            raise
    if not speed.num_images:
        raise ValueError("no image could be read")
    for sink in sinks:
        sink.close()
        if sink.path:
            print(f"wrote {sink.path}", file=sys.stderr)
    skipped = f"; {speed.num_skipped} could not be read" if speed.num_skipped else ""
    rate = speed.num_images / speed.seconds
    print(f"{speed.num_images} images, {rate:.3g} a second{skipped}", file=sys.stderr)
    return speed.num_skipped


@dataclass
class _Speed:
    num_images: int = 0
    num_skipped: int = 0
    seconds: float = 0.0  # of detection, without reading and writing


def _go_through(detector: Detector, images: Images, sinks: Sequence[Sink], speed: _Speed) -> None:
    bar = tqdm(images.items, total=images.number, unit="image", disable=None)
    # Several batches at a time, of which images of one size go together; frames come as they are.
    are_frames = images.fps is not None or images.number is None
    ahead = 1 if are_frames or detector.batch_size == 1 else _AHEAD
    for batch in _batches(bar, detector.batch_size * ahead):
        loaded = []
        for item in batch:
            try:
                loaded.append((item, item.load()))
            except ValueError as error:
                speed.num_skipped += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        start = time.perf_counter()
        results = _detect(detector, loaded, speed)
        speed.seconds += time.perf_counter() - start
        speed.num_images += len(results)
        for item, result in results:
            for sink in sinks:
                _add(sink, item, result)


def _add(sink: Sink, item: Item, result: Result) -> None:
    try:
        sink.add(item, result)
    except OSError as error:
        what = error.strerror or error
        raise ValueError(f"'{error.filename or sink.path}' cannot be written: {what}") from error


def _detect(
    detector: Detector, loaded: list[tuple[Item, np.ndarray]], speed: _Speed
) -> list[tuple[Item, Result]]:
    """Results of a batch, without the images that are of no size to detect in."""
    if len(loaded) > 1:
        try:
            results = detector([image for _, image in loaded])
            return [(item, result) for (item, _), result in zip(loaded, results, strict=True)]
        except ValueError:  # one of them; which is found below
            return [pair for single in loaded for pair in _detect(detector, [single], speed)]
    try:
        return [(item, detector(image)) for item, image in loaded]
    except ValueError as error:
        speed.num_skipped += 1
        tqdm.write(f"skipped: '{loaded[0][0].name}': {error}", file=sys.stderr)
        return []


def _match(images: Images, names: Sequence[str]) -> list[int]:
    """A data set's category ids in the order of the model's classes."""
    ids = dict(zip(images.class_names, images.category_ids, strict=True))
    missing = [name for name in images.class_names if name not in names]
    if missing:
        raise ValueError(f"the model has no class '{missing[0]}' of the data set")
    spare = max(images.category_ids) + 1
    return [ids.get(name, spare + i) for i, name in enumerate(names)]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
