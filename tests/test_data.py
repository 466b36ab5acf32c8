"""The embedded data set: complete, deterministic, and there all at once or not at all."""

import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util

from libra_d2.data import digits
from libra_d2.data.coco_json import read_coco
from libra_d2.data.digits import SPLITS, Split, make_digits
from libra_d2.data.scene import SceneMaker


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A split of 200 training images, and its folder."""
    folder = tmp_path_factory.mktemp("data") / "digits" / "sample"
    make_digits(Split(num_images=200, seed=1, training=True), folder)
    return json.loads((folder / "annotations.json").read_text()), folder


def test_is_coco_with_ten_classes(coco):
    annotations, folder = coco
    assert [c["name"] for c in annotations["categories"]] == [str(i) for i in range(10)]
    assert len(annotations["images"]) == len(list((folder / "images").glob("*.jpg"))) == 200
    for image in annotations["images"][:20]:
        pixels = cv2.imread(str(folder / "images" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)


def test_objects_are_of_every_kind_that_is_promised(coco):
    annotations, _ = coco
    boxes = np.array([a["bbox"] for a in annotations["annotations"]])
    sides = boxes[:, 2:].max(1)
    assert sides.min() >= 10 and sides.min() <= 16 and 120 <= sides.max() <= 180
    per_image = np.bincount([a["image_id"] for a in annotations["annotations"]])[1:]
    assert per_image.min() >= 1 and 15 <= per_image.max() <= 20
    per_class = np.bincount([a["category_id"] for a in annotations["annotations"]])[1:]
    assert per_class.min() > 0 and 2 < per_class[1] / per_class[6] < 6


def test_boxes_lie_inside_and_some_overlap(coco):
    annotations, _ = coco
    sizes = {i["id"]: (i["width"], i["height"]) for i in annotations["images"]}
    by_image = {}
    for a in annotations["annotations"]:
        x, y, w, h = a["bbox"]
        width, height = sizes[a["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        by_image.setdefault(a["image_id"], []).append((x, y, x + w, y + h))
    overlaps = 0
    for boxes in by_image.values():
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                overlaps += min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
    assert overlaps > 50


def test_masks_fill_their_boxes(coco):
    annotations, _ = coco
    sizes = {i["id"]: (i["width"], i["height"]) for i in annotations["images"]}
    for a in annotations["annotations"][:200]:
        width, height = sizes[a["image_id"]]
        x, y, w, h = a["bbox"]
        mask = mask_util.decode(
            mask_util.merge(mask_util.frPyObjects(a["segmentation"], height, width))
        )
        outside = mask.copy()
        outside[y : y + h, x : x + w] = 0
        ys, xs = np.nonzero(mask)
        assert outside.sum() == 0
        assert max(abs(xs.min() - x), abs(xs.max() + 1 - x - w)) <= 1
        assert max(abs(ys.min() - y), abs(ys.max() + 1 - y - h)) <= 1
        assert abs(mask.sum() - a["area"]) <= 0.2 * a["area"] + 5 and mask.sum() < 0.95 * w * h + 5


def test_boxes_fit_the_ink():
    """The pixels that differ from the scene without its objects lie in its boxes."""
    maker = SceneMaker(training=True)
    maker._look_alike = lambda rng: np.zeros((8, 8), np.uint8)
    rng = np.random.default_rng(3)
    scene = maker.make(rng)
    background = maker._background(np.random.default_rng(3)).astype(int)
    changed = np.abs(scene.image.astype(int) - background).max(-1) > 60
    inside = np.zeros_like(changed)
    for x, y, w, h in scene.boxes:
        inside[y : y + h, x : x + w] = True
    assert changed.sum() > 50 and (changed & ~inside).sum() < 0.02 * changed.sum()


def test_the_same_seed_draws_the_same(tmp_path):
    files = []
    for name in ("a", "b"):
        make_digits(Split(num_images=3, seed=9, training=False), tmp_path / name)
        files.append([f.read_bytes() for f in sorted((tmp_path / name).rglob("*.*"))])
    assert files[0] == files[1] and len(files[0]) == 4


def test_training_and_validation_share_no_digit():
    train, val = SceneMaker(training=True), SceneMaker(training=False)
    assert sum(len(ink) for ink in (*train.ink, *val.ink)) == 1797
    seen = {ink.tobytes() for inks in train.ink for ink in inks}
    shared = [ink for inks in val.ink for ink in inks if ink.tobytes() in seen]
    assert len(shared) == 0


def test_an_interrupted_run_leaves_nothing_half_made(tmp_path, monkeypatch):
    folder = tmp_path / "digits" / "train"
    split = Split(num_images=5, seed=1, training=True)
    real = cv2.imwrite

    def interrupted(name, *args):
        if name.endswith("000003.jpg"):
            raise KeyboardInterrupt
        return real(name, *args)

    monkeypatch.setattr(digits.cv2, "imwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_digits(split, folder)
    assert not folder.exists() and not list(folder.parent.glob(".*partial"))
    monkeypatch.undo()
    make_digits(split, folder)
    assert len(list((folder / "images").iterdir())) == 5


def test_what_exists_is_not_drawn_again(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "annotations.json").write_text("mine")
    make_digits(Split(num_images=5, seed=1, training=True), folder)
    assert [f.read_text() for f in folder.iterdir()] == ["mine"]


def test_splits_are_registered():
    assert {n: s.num_images for n, s in SPLITS.items()} == {
        "digits_train": 600,
        "digits_val": 150,
        "digits_train_large": 4000,
        "digits_test": 600,
    }
    for name in SPLITS:
        assert name in DatasetCatalog.list()
        assert MetadataCatalog.get(name).evaluator_type == "coco"
    assert len(DatasetCatalog.get("digits_val")) == 150


def test_whole_numbers_may_be_written_as_floats_and_areas_as_nan(tmp_path):
    """As pandas and Python's json write them; detectron2 reads them too."""
    image = {"id": 1.0, "file_name": "a.jpg", "height": 9.0, "width": 9}
    annotation = {"id": 1, "image_id": 1.0, "category_id": 2, "bbox": [1, 2, 3, 4]}
    annotation |= {"iscrowd": 0.0, "area": float("nan")}
    content = {"images": [image], "categories": [{"id": 2.0, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps({**content, "annotations": [annotation]}))
    assert read_coco(str(tmp_path / "a.json")).class_names() == ["a"]
