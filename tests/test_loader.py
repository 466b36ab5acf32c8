"""Loaders: the order of images, what is random in them, and images that can't be read."""

import random
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from toys import toy_config

from libra_d2.data.loader import build_test_loader, build_train_loader
from libra_d2.data.workers import LoadingError

OPTS = (
    "DATASETS.TRAIN",
    ("eight",),
    "DATASETS.TEST",
    ("eight",),
    "INPUT.MIN_SIZE_TRAIN",
    (64, 96),
)


def config(*opts):
    return toy_config("Base-Libra-RCNN-FPN.yaml", *OPTS, *opts)


def take(loader, number):
    return [[(x["file_name"], x["image"]) for x in batch] for batch in islice(loader, number)]


def are_equal(one, other):
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1])
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("grouping", [True, False])
def test_batches_are_detectron2s(eight, grouping):
    cfg = config("DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    names = [[x[0] for x in batch] for batch in take(build_train_loader(cfg), 12)]
    theirs = take(build_detection_train_loader(cfg), 12)
    assert names == [[x[0] for x in batch] for batch in theirs]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_images(eight):
    cfg = config("DATALOADER.PIN_MEMORY", True)
    (batch,) = islice(build_train_loader(cfg), 1)
    assert all(x["image"].is_pinned() and len(x["instances"]) > 0 for x in batch)
    names = [(x["file_name"], x["image"]) for x in batch]
    assert are_equal([names], take(build_train_loader(config()), 1))


def test_pinned_memory_is_nothing_without_a_gpu(eight, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batches = take(build_train_loader(config("DATALOADER.PIN_MEMORY", True)), 1)
    assert are_equal(batches, take(build_train_loader(config()), 1))
    assert not any("pin_memory" in str(warning.message) for warning in recwarn)


def test_images_depend_on_seed_and_place_alone(eight):
    batches = take(build_train_loader(config()), 8)
    assert are_equal(batches, take(build_train_loader(config("DATALOADER.NUM_WORKERS", 2)), 8))
    assert not are_equal(batches, take(build_train_loader(config("SEED", 2)), 8))
    sizes = {image.shape for batch in batches for _, image in batch}
    assert len(sizes) > 1  # something is random


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_what_comes_from_a_process_is_whole(tiny, mask_format):
    data = "DATASETS.TRAIN", ("tiny",), "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", mask_format
    batches, others = (
        list(islice(build_train_loader(config(*data, "DATALOADER.NUM_WORKERS", number)), 3))
        for number in (0, 1)
    )
    for image, other in zip(chain(*batches), chain(*others), strict=True):
        assert image.keys() == other.keys()
        fields, also = (x["instances"].get_fields() for x in (image, other))
        assert torch.equal(fields["gt_boxes"].tensor, also["gt_boxes"].tensor)
        assert torch.equal(fields["gt_classes"], also["gt_classes"])
        masks, too = fields["gt_masks"], also["gt_masks"]
        assert type(masks) is type(too) and len(masks) > 0
        if mask_format == "bitmask":
            assert torch.equal(masks.tensor, too.tensor)
        else:
            np.testing.assert_equal(masks.polygons, too.polygons)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_batch_of_a_process_takes_one_file_descriptor(eight):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    opts = "DATALOADER.NUM_WORKERS", 1, "SOLVER.IMS_PER_BATCH", 4
    batches = iter(build_train_loader(config(*opts)))
    kept = [next(batches)]
    before = count()
    kept += [next(batches) for _ in range(3)]
    assert count() <= before + 3
    assert all(len(batch) == 4 for batch in kept)


@pytest.mark.parametrize("start", [1, 5])
def test_a_loader_goes_on_anywhere(eight, start):
    loader = build_train_loader(config())
    batches = take(loader, 9)
    other = build_train_loader(config())
    other.load_state_dict({"position": start, "bad_images": {}})
    assert are_equal(take(other, 9 - start), batches[start:])
    assert other.state_dict()["position"] == 9


def test_numbers_of_training_stay_as_they_were(eight):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seeds = (random.seed, np.random.seed, torch.manual_seed)
    for seed in seeds:
        seed(0)
    expected = draw()
    for seed in seeds:
        seed(0)
    take(build_train_loader(config()), 3)
    assert draw() == expected


class TestBadImages:
    def test_too_many_stop_it(self, eight):
        (eight / "images" / "000003.jpg").write_bytes(b"no image")
        with pytest.raises(LoadingError, match=r"000003\.jpg' cannot be read.*MAX_BAD_IMAGES 0"):
            take(build_train_loader(config()), 9)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_some_are_left_out(self, eight, num_workers, caplog):
        (eight / "images" / "000003.jpg").unlink()
        cfg = config("DATALOADER.MAX_BAD_IMAGES", 1, "DATALOADER.NUM_WORKERS", num_workers)
        loader = build_train_loader(cfg)
        batches = take(loader, 20)
        names = {name.rpartition("/")[2] for batch in batches for name, _ in batch}
        assert "000003.jpg" not in names and len(names) == 7
        assert list(loader.state_dict()["bad_images"]) == [f"{eight}/images/000003.jpg"]
        assert caplog.text.count("it is left out") == 1

    def test_all_of_them(self, eight):
        for image in (eight / "images").iterdir():
            image.unlink()
        with pytest.raises(LoadingError, match="none is left"):
            take(build_train_loader(config("DATALOADER.MAX_BAD_IMAGES", 99)), 9)

    def test_an_evaluation_leaves_none_out(self, eight):
        (eight / "images" / "000003.jpg").write_bytes(b"no image")
        with pytest.raises(LoadingError, match=r"000003\.jpg' cannot be read"):
            list(build_test_loader(config("DATALOADER.MAX_BAD_IMAGES", 9), "eight"))
