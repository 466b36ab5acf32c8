"""DATALOADER.CACHE: images kept at their size."""

import errno
import os
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.transforms import (
    Augmentation,
    NoOpTransform,
    RandomFlip,
    RandomRotation,
    ResizeShortestEdge,
)
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask
from toys import toy_config

from libra_d2.data import cache
from libra_d2.data.cache import CachingMapper, use_cache
from libra_d2.data.loader import build_test_loader, build_train_loader
from libra_d2.data.resize import TorchResizeShortestEdge
from libra_d2.data.workers import LoadingError

HEIGHT, WIDTH = 90, 130


@pytest.fixture
def record(tmp_path):
    """An image that EXIF turns, with every kind of annotation."""
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6
    image = generator.integers(0, 255, (WIDTH, HEIGHT, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.jpg", exif=exif)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:50, 30:70] = 1
    keypoints = [40.0, 30.0, 2.0, 50.0, 40.0, 1.0]
    common = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 3, "keypoints": keypoints}
    polygon = [[30.0, 20.0, 70.0, 20.0, 70.0, 50.0]]
    return {
        **{"file_name": str(tmp_path / "image.jpg"), "height": HEIGHT, "width": WIDTH},
        "image_id": 7,
        "annotations": [
            {**common, "bbox": [30.0, 20.0, 40.0, 30.0], "segmentation": polygon},
            {**common, "bbox": [100, 60, 50, 50], "segmentation": polygon},  # beyond the image
            {
                **{**common, "bbox": [30.5, 20.25, 40.0, 30.0]},
                "segmentation": coco_mask.encode(np.asfortranarray(mask)),
            },
        ],
    }


def make_mapper(resize=ResizeShortestEdge, image_format="BGR", is_train=True, others=None):
    if others is None:
        others = [RandomFlip(), RandomRotation([-30, 30])]
        others = others[: 1 if image_format == "L" else 2]  # detectron2 does not rotate gray images
    return DatasetMapper(
        is_train,
        augmentations=[resize([50, 70, 200], 240, "choice"), *others],
        image_format=image_format,
        use_instance_mask=True,
        use_keypoint=True,
        instance_mask_format="bitmask",
        keypoint_hflip_indices=[1, 0],
    )


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert torch.equal(one["image"], other["image"])
    rest = one.keys() - {"image", "instances"}
    assert {key: one[key] for key in rest} == {key: other[key] for key in rest}
    if "instances" in one:
        a, b = one["instances"].get_fields(), other["instances"].get_fields()
        assert a.keys() == b.keys() and len(one["instances"]) == len(other["instances"]) > 0
        for name in a:
            assert torch.equal(
                getattr(a[name], "tensor", a[name]), getattr(b[name], "tensor", b[name])
            )


def draw(mapper, record, seed):
    np.random.seed(seed)
    return mapper(record), np.random.rand()


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("resize", [ResizeShortestEdge, TorchResizeShortestEdge])
def test_it_gives_the_same_to_the_bit(record, tmp_path, resize, image_format):
    mapper = make_mapper(resize, image_format)
    caching = CachingMapper(mapper, tmp_path / "kept", [record])
    for seed in range(12):
        expected, next_number = draw(mapper, record, seed)
        for _ in range(2):
            got, number = draw(caching, record, seed)
            assert_equal(got, expected)
            assert number == next_number
    files = list((tmp_path / "kept").iterdir())
    assert len(files) == 3 and {file.suffix for file in files} == {".ppm"}


def test_each_size_is_read_once(record, tmp_path, monkeypatch):
    num_reads = []

    def read_image(*args):
        num_reads.append(args)
        return original(*args)

    original = cache.read_image
    monkeypatch.setattr(cache, "read_image", read_image)
    for _ in range(2):  # another run's too
        caching = CachingMapper(make_mapper(), tmp_path / "kept", [record])
        for seed in range(20):
            draw(caching, record, seed)
    assert len(num_reads) == 3


def test_for_evaluation(record, tmp_path):
    mapper = make_mapper(is_train=False, others=[])
    for _ in range(2):
        got = draw(CachingMapper(mapper, tmp_path / "kept", [record]), record, 0)[0]
        assert_equal(got, draw(mapper, record, 0)[0])
        assert (got["height"], got["width"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("happens", ["another image", "a file without its end", "an empty file"])
def test_what_changes_is_read_anew(record, tmp_path, happens):
    mapper = make_mapper()
    caching = CachingMapper(mapper, tmp_path / "kept", [record])
    draw(caching, record, 0)
    if happens == "another image":
        Image.new("RGB", (WIDTH, HEIGHT), "red").save(record["file_name"])
    else:
        (file,) = (tmp_path / "kept").iterdir()
        file.write_bytes(file.read_bytes()[:-1] if "end" in happens else b"")
    assert_equal(draw(caching, record, 0)[0], draw(mapper, record, 0)[0])


def test_kinds_of_resizing_and_formats_are_kept_apart(record, tmp_path):
    for resize in (ResizeShortestEdge, TorchResizeShortestEdge):
        for image_format in ("BGR", "RGB", "L"):
            draw(
                CachingMapper(make_mapper(resize, image_format), tmp_path / "kept", [record]),
                record,
                0,
            )
    assert len(list((tmp_path / "kept").iterdir())) == 6


def test_without_room_it_goes_on(record, tmp_path, monkeypatch, caplog):
    def fsync(stream):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mapper = make_mapper()
    caching = CachingMapper(mapper, tmp_path / "kept", [record])
    draw(caching, record, 0)
    (before,) = (tmp_path / "kept").iterdir()
    monkeypatch.setattr(os, "fsync", fsync)
    for seed in range(6):
        got, expected = draw(caching, record, seed), draw(mapper, record, seed)
        assert_equal(got[0], expected[0])
        assert got[1] == expected[1]
    assert list((tmp_path / "kept").iterdir()) == [before]
    assert caplog.text.count("takes no more images (No space left on device)") == 1


def test_an_interruption_leaves_nothing(record, tmp_path, monkeypatch):
    def fsync(stream):
        raise KeyboardInterrupt

    caching = CachingMapper(make_mapper(), tmp_path / "kept", [record])
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        draw(caching, record, 0)
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_image_of_another_size_is_refused(record, tmp_path, is_kept):
    """Also one of the same ratio, whose resized image has the size of the right one."""
    if is_kept:
        draw(CachingMapper(make_mapper(), tmp_path / "kept", [record]), record, 0)
    record = {**record, "height": 2 * HEIGHT, "width": 2 * WIDTH}
    with pytest.raises(SizeMismatchError):
        draw(CachingMapper(make_mapper(), tmp_path / "kept", [record]), record, 0)


class InPlace(Augmentation):
    def get_transform(self, image):
        torch.from_numpy(image)[:5] = 7
        return NoOpTransform()


def test_augmentations_may_write(record, tmp_path):
    """As they may where torch resizes."""
    mapper = make_mapper(TorchResizeShortestEdge, others=[InPlace()])
    for _ in range(2):
        got = draw(CachingMapper(mapper, tmp_path / "kept", [record]), record, 0)[0]
        assert_equal(got, draw(mapper, record, 0)[0])
        assert (got["image"][:, :5] == 7).all()


@pytest.mark.parametrize("there", ["a file", "a file above", "not writable"])
def test_a_folder_that_can_not_be_is_refused(record, tmp_path, there, monkeypatch):
    folder = tmp_path / ("kept/there" if there == "a file above" else "kept")
    if there == "not writable":
        monkeypatch.setattr(os, "access", lambda *args: False)
    else:
        (tmp_path / "kept").touch()
    with pytest.raises(ValueError, match=r"DATALOADER\.CACHE '.*kept.*' (must be a|can't be writ)"):
        use_cache(make_mapper(), config("DATALOADER.CACHE", folder), [record])


def test_a_whole_folder_need_not_be_writable(record, tmp_path, monkeypatch):
    mapper = make_mapper()
    for seed in range(12):
        draw(CachingMapper(mapper, tmp_path / "kept", [record]), record, seed)
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert_equal(
        draw(CachingMapper(mapper, tmp_path / "kept", [record]), record, 0)[0],
        draw(mapper, record, 0)[0],
    )


class Own(DatasetMapper):
    def __call__(self, record):
        return None


class OwnAnnotations(DatasetMapper):
    """detectron2 invites to change these; they would see the resized image's size."""

    def _transform_annotations(self, record, transforms, shape):
        record["height"] = record["height"]


def config(*opts):
    return toy_config("Base-RCNN-FPN.yaml", *opts)


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        (("INPUT.CROP.ENABLED", True), r"no INPUT\.CROP\); this is DatasetMapper with RandomCrop"),
        (
            ("INPUT.MIN_SIZE_TRAIN", (64, 96), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
            "'choice' is right",
        ),
        (("INPUT.FORMAT", "YUV-BT.601"), r"needs INPUT\.FORMAT BGR, RGB, L; it is YUV"),
    ],
)
def test_what_it_can_not_do_is_refused(opts, match):
    with pytest.raises(ValueError, match=match):
        CachingMapper(DatasetMapper(config(*opts), True), "kept", [])


@pytest.mark.parametrize(
    "mapper",
    [
        len,
        *(
            kind(True, augmentations=[ResizeShortestEdge(50)], image_format="BGR")
            for kind in (Own, OwnAnnotations)
        ),
    ],
)
def test_other_mappers_are_refused(mapper):
    with pytest.raises(ValueError, match=r"needs detectron2's DatasetMapper.*; this is "):
        CachingMapper(mapper, "kept", [])


def test_it_says_when_there_is_no_room(record, tmp_path, monkeypatch):
    sizes = (50, 72), (70, 101), (166, 240)
    needed = [3 * h * w + len(f"P6\n{w} {h}\n255\n") for h, w in sizes]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "of_others.ppm").write_bytes(b"P6" * 10**6)

    def prepare(free, **changes):
        usage = type("", (), {"free": free})
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
        cfg = config("DATALOADER.CACHE", tmp_path / "kept")
        return use_cache(make_mapper(others=[]), cfg, [{**record, **changes}] * 2)

    with pytest.raises(ValueError, match=r"kept' needs 0\.0 GiB more for 1 images"):
        prepare(sum(needed) - 1)
    with pytest.raises(ValueError, match=r"needs 0\.0 GiB more"):
        prepare(sum(needed) - 1, file_name="no such image")
    caching = prepare(sum(needed))
    np.random.seed(0)
    height = caching(record)["image"].shape[1]
    del needed[[h for h, _ in sizes].index(height)]
    prepare(sum(needed))  # what is there need not be written
    with pytest.raises(ValueError, match=r"needs 0\.0 GiB more"):
        prepare(sum(needed) - 1)
    with pytest.raises(ValueError, match="height and width of all images"):
        use_cache(make_mapper(), config("DATALOADER.CACHE", tmp_path), [{"file_name": ""}])


def loaders(*opts):
    opts = ("DATASETS.TRAIN", ("eight",), "DATASETS.TEST", ("eight",), *opts)
    cfg = config(*opts, "INPUT.MIN_SIZE_TRAIN", (64, 96), "INPUT.MIN_SIZE_TEST", 80)
    return build_train_loader(cfg), build_test_loader(cfg, "eight")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_use_it(eight, num_workers):
    opts = "DATALOADER.NUM_WORKERS", num_workers
    plain = loaders(*opts)
    for _ in range(2):
        kept, seen = loaders(*opts, "DATALOADER.CACHE", eight / "kept"), set()
        for one, other in zip(plain, kept, strict=True):
            for a, b in zip(islice(one, 12), islice(other, 12), strict=True):
                assert len(a) == len(b)
                for x, y in zip(a, b, strict=True):
                    assert_equal(y, x)
                    seen.add((x["file_name"], x["image"].shape))
        # Processes that load are ahead.
        assert 8 < len(seen) <= len(list((eight / "kept").iterdir())) <= 3 * 8


def test_images_that_can_not_be_read_have_their_names(eight):
    (eight / "images" / "000003.jpg").write_bytes(b"no image")
    train, _ = loaders("DATALOADER.CACHE", eight / "kept")
    with pytest.raises(LoadingError, match=r"images/000003\.jpg' cannot be read"):
        list(islice(train, 12))
