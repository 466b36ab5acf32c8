"""Loaders of images that can go on at any batch, and that say what they can't read.

What an image becomes depends on the run's seed and the image's place in the order alone: not on the
number of workers, nor on what was loaded before.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .cache import use_cache
from .packing import pack
from .resize import use_resize
from .workers import (
    LoadingError,
    Reader,
    Unreadable,
    batches_of,
    obey_the_parent_alone,
    random_numbers_of,
)

__all__ = [
    "TRAIN_PARTS",
    "TestLoader",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "test_loader_of",
    "train_loader_of",
]

# Of the arguments of detectron2's loader those that ours knows.
TRAIN_PARTS = {
    *("dataset", "mapper", "sampler", "total_batch_size", "aspect_ratio_grouping", "num_workers"),
}


class _Images(Dataset):
    """Images by (place in the order, index)."""

    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], Any], seed: int):
        self.records, self.read, self.seed = records, Reader(mapper), seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place_and_index: tuple[int, int]) -> Any:
        place, index = place_and_index
        with random_numbers_of(self.seed, place):
            return self.read(self.records[index])


class _Batches(Sampler):
    """The batches of a sampler's order, from any one on.

    Args:
        sampler: of indices.
        batch_size: of this process.
        groups: of each index; a batch is of one group, as detectron2's are of one aspect.
        start: how many batches to leave out.
    """

    def __init__(self, sampler: Sampler, batch_size: int, groups: Sequence[int], start: int):
        self.sampler, self.batch_size, self.groups, self.start = sampler, batch_size, groups, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return islice(self._from_the_first(), self.start, None)

    def _from_the_first(self) -> Iterator[list[tuple[int, int]]]:
        rank, num_processes = comm.get_rank(), comm.get_world_size()
        buckets = defaultdict(list)
        for place, index in enumerate(self.sampler):
            bucket = buckets[self.groups[index]]
            bucket.append((place * num_processes + rank, int(index)))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


class TrainLoader:
    """Endless batches for training.

    Args:
        records: detectron2's, one an image.
        mapper: makes a model's input of a record; None for an image to leave out.
        sampler: of indices, endless, and the same whenever it is iterated.
        batch_size: of this process.
        group_by_aspect: whether a batch is all wide or all tall images; records need width, height.
        num_workers: processes that load; 0 for this one.
        seed: of what is random in the mapper.
        max_bad_images: how many images that can't be read may be left out.
        pin_memory: whether batches come in memory that a GPU copies from at once, if there is one.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], Any],
        sampler: Sampler,
        batch_size: int,
        *,
        group_by_aspect: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_images: int = 0,
        pin_memory: bool = False,
    ):
        wide = (
            [r["width"] > r["height"] for r in records] if group_by_aspect else [0] * len(records)
        )
        self.dataset = _Images(DatasetFromList(list(records), copy=False), mapper, seed)
        self.make_batches = lambda start: _Batches(sampler, batch_size, wide, start)
        self.batch_size = batch_size
        self.num_workers, self.max_bad_images = num_workers, max_bad_images
        self.pin_memory = pin_memory
        self.start = 0
        self.position = self._before = 0
        self.bad_images: dict[str, str] = {}

    def state_dict(self) -> dict:
        """How many batches were taken, and which images could not be read."""
        return {"position": self.position, "bad_images": self.bad_images}

    def take_back(self) -> None:
        """The last batch was not trained on."""
        self.position = self._before

    def load_state_dict(self, state: dict) -> None:
        """The next iteration goes on there."""
        self.start = self.position = state["position"]
        self.bad_images = dict(state["bad_images"])

    def __iter__(self) -> Iterator[list[Any]]:
        from_workers = self.num_workers > 0
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.make_batches(self.start),
            num_workers=self.num_workers,
            collate_fn=pack if from_workers else list,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            worker_init_fn=obey_the_parent_alone,
            # Not from the numbers that training draws from.
            generator=torch.Generator().manual_seed(self.dataset.seed),
        )
        num_empty, most_empty = 0, len(self.dataset) // self.batch_size + 1
        for position, batch in enumerate(batches_of(loader), self.start + 1):
            whole = []
            for image in batch.unpack() if from_workers else batch:
                if isinstance(image, Unreadable):
                    self._leave_out(image)
                elif image is not None:
                    whole.append(image)
            num_empty = 0 if whole else num_empty + 1
            if num_empty > most_empty:
                raise LoadingError("of all images none is left that could be read")
            if whole:
                self._before, self.position = self.position, position
                yield whole

    def _leave_out(self, image: Unreadable) -> None:
        if image.file_name in self.bad_images:
            return
        if len(self.bad_images) >= self.max_bad_images:
            raise LoadingError(
                f"{image}; DATALOADER.MAX_BAD_IMAGES {self.max_bad_images} such images may be left "
                "out"
            )
        self.bad_images[image.file_name] = image.reason
        logging.getLogger(__name__).warning("%s; it is left out", image)


class TestLoader:
    """Batches for evaluation, of a detectron2 loader whose mapper is a reader.

    Args:
        loader: it.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in batches_of(self.loader):
            for image in batch:
                if isinstance(image, Unreadable):
                    raise LoadingError(f"{image}; an evaluation leaves no image out")
            yield batch


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], Any] | None = None) -> TrainLoader:
    """The loader of ``DATASETS.TRAIN``, with detectron2's keys and ``DATALOADER.MAX_BAD_IMAGES``.

    Args:
        cfg: a run's config, whose ``SEED`` is not negative.
        mapper: instead of detectron2's ``DatasetMapper``.
    """
    return train_loader_of(build_detection_train_loader.from_config(cfg, mapper), cfg)


def train_loader_of(parts: dict[str, Any], cfg: CfgNode) -> TrainLoader:
    """The loader of detectron2's arguments of ``build_detection_train_loader``.

    Args:
        parts: ``dataset`` (a list of records), ``mapper``, ``total_batch_size``, and whichever else
            there are of ``TRAIN_PARTS``.
        cfg: a run's config, for ``SEED``, ``INPUT.RESIZE``, ``DATALOADER.CACHE``,
            ``DATALOADER.MAX_BAD_IMAGES`` and ``DATALOADER.PIN_MEMORY``.
    """
    records = parts["dataset"]
    return TrainLoader(
        records,
        _prepare(parts["mapper"], cfg, records),
        parts.get("sampler") or TrainingSampler(len(records)),
        parts["total_batch_size"] // comm.get_world_size(),
        group_by_aspect=parts.get("aspect_ratio_grouping", True),
        num_workers=parts.get("num_workers", 0),
        seed=max(cfg.SEED, 0),
        max_bad_images=cfg.DATALOADER.MAX_BAD_IMAGES,
        pin_memory=cfg.DATALOADER.PIN_MEMORY,
    )


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Callable[[dict], Any] | None = None
) -> TestLoader:
    """The loader of a data set to evaluate on.

    Args:
        cfg: a run's config.
        dataset_name: of ``DATASETS.TEST``.
        mapper: instead of detectron2's ``DatasetMapper``.
    """
    mapper = mapper or DatasetMapper(cfg, False)
    return test_loader_of(build_detection_test_loader.from_config(cfg, dataset_name, mapper), cfg)


def test_loader_of(parts: dict[str, Any], cfg: CfgNode) -> TestLoader:
    """The loader of detectron2's arguments of ``build_detection_test_loader``.

    Args:
        parts: they.
        cfg: a run's config, for ``INPUT.RESIZE`` and ``DATALOADER.CACHE``.
    """
    reader = Reader(_prepare(parts["mapper"], cfg, parts["dataset"]))
    loader = build_detection_test_loader(**{**parts, "mapper": reader})
    loader.worker_init_fn = obey_the_parent_alone
    return TestLoader(loader)


def _prepare(
    mapper: Callable[[dict], Any], cfg: CfgNode, records: Sequence[dict]
) -> Callable[[dict], Any]:
    return use_cache(use_resize(mapper, cfg), cfg, records)
