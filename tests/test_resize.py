"""INPUT.RESIZE: images brought to their size by torch."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from detectron2.modeling import build_model
from PIL import Image
from toys import SMALL, small_config, toy_config

from libra_d2 import Detector
from libra_d2.data.loader import build_test_loader, build_train_loader
from libra_d2.data.resize import TorchResize, TorchResizeShortestEdge, use_resize

CONFIG = "Base-Libra-RCNN-FPN.yaml"
DATA = ("DATASETS.TRAIN", ("digits_val",), "DATASETS.TEST", ("digits_val",))


def make_image(height=90, width=130, channels=3):
    """Smooth with edges, as photographs are."""
    y, x, c = np.mgrid[:height, :width, :channels]
    image = 127 + 80 * np.sin(x / 9 + c) * np.cos(y / 7) + 40 * ((x + 2 * y) % 50 > 25)
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(45, 65), (31, 200), (180, 260), (90, 130), (1, 1)])
@pytest.mark.parametrize("layout", ["plain", "reversed channels", "flipped"])
def test_it_is_pils_up_to_rounding(size, layout):
    image = make_image()
    image = {"plain": image, "reversed channels": image[:, :, ::-1], "flipped": image[:, ::-1]}[
        layout
    ]
    expected = ResizeTransform(90, 130, *size).apply_image(image)
    got = TorchResize(90, 130, *size).apply_image(image)
    assert got.dtype == np.uint8 and got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "image",
    [
        *(make_image().astype(np.float32), make_image()[:, :, 0]),
        *(make_image(channels=1), make_image(channels=4)),
    ],
    ids=["float", "no channels", "one channel", "four channels"],
)
def test_other_images_are_as_the_parents(image):
    sizes = (90, 130, 50, 70)
    expected = ResizeTransform(*sizes).apply_image(image)
    got = TorchResize(*sizes).apply_image(image)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.astype(float), expected, atol=1)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(AssertionError):
        TorchResize(10, 10, 5, 5).apply_image(make_image())


def test_masks_keep_their_values():
    mask = (make_image()[:, :, 0] > 127).astype(np.uint8) * 7
    sizes = (90, 130, 50, 70)
    expected = ResizeTransform(*sizes).apply_segmentation(mask)
    np.testing.assert_array_equal(TorchResize(*sizes).apply_segmentation(mask), expected)
    np.testing.assert_array_equal(
        TorchResize(*sizes, Image.NEAREST).apply_image(make_image()),
        ResizeTransform(*sizes, Image.NEAREST).apply_image(make_image()),
    )


def test_it_takes_the_place_of_shortest_edge_alone():
    cfg = small_config(CONFIG, "INPUT.RESIZE", "torch", "INPUT.CROP.ENABLED", True)
    before = build_augmentation(cfg, True)
    after = use_resize(DatasetMapper(cfg, True), cfg).augmentations.augs
    for old, new in zip(before, after[1:], strict=True):  # the first is the crop
        is_resize = type(old) is ResizeShortestEdge
        assert type(new) is (TorchResizeShortestEdge if is_resize else type(old))
        assert vars(old) == vars(new)
    assert use_resize(len, cfg) is len  # a mapper of the user's


@pytest.mark.parametrize("name, is_black", [("pil", False), ("torch", True)])
def test_loaders_and_detectors_resize_so(name, is_black, tmp_path, monkeypatch):
    def black(self, image):
        return np.zeros((self.new_h, self.new_w, 3), np.uint8)

    monkeypatch.setattr(TorchResize, "apply_image", black)
    cfg = toy_config(CONFIG, *SMALL, *DATA, "INPUT.RESIZE", name)
    loaders = build_train_loader(cfg), build_test_loader(cfg, "digits_val")
    images = [next(iter(loader))[0]["image"] for loader in loaders]
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    images.append(Detector(tmp_path).preprocess(make_image())["image"])
    assert [bool((image == 0).all()) for image in images] == [is_black] * 3
