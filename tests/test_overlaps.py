"""IoU of overlapping boxes alone: against detectron2's of all pairs."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from libra_d2.modeling import overlaps as module
from libra_d2.modeling.overlaps import find_overlaps, split_batch


def make_boxes(number: int, seed: int, size: float = 400.0) -> Boxes:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * size
    extent = torch.rand(number, 2, generator=generator) * 80
    return Boxes(torch.cat([corner, corner + extent], dim=1))


def overlaps(gt_boxes: Boxes, boxes: Boxes) -> torch.Tensor:
    """Of one image."""
    return find_overlaps([gt_boxes], boxes.tensor.unsqueeze(0))


@pytest.mark.parametrize("num_gts", [0, 1, 7, 60])
@pytest.mark.parametrize("num_boxes", [0, 1, 63, 64, 65, 5000])
def test_equals_the_dense_matrix(num_gts, num_boxes):
    gt_boxes, boxes = make_boxes(num_gts, 0), make_boxes(num_boxes, 1)
    got, expected = overlaps(gt_boxes, boxes), pairwise_iou(gt_boxes, boxes)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.to_dense(), expected)
    assert torch.equal(got.indices(), expected.nonzero().t())


def test_in_several_steps(monkeypatch):
    monkeypatch.setattr("libra_d2.modeling.overlaps._AT_ONCE", 3 * 64)
    gt_boxes, boxes = make_boxes(20, 0), make_boxes(1000, 1)
    got, expected = overlaps(gt_boxes, boxes), pairwise_iou(gt_boxes, boxes)
    assert torch.equal(got.to_dense(), expected)
    assert torch.equal(got.indices(), expected.nonzero().t())


@pytest.mark.parametrize("num_boxes", [1, 100, 128])
@pytest.mark.parametrize("num_gts", [(3, 0, 5), (0, 0), (4,)])
@pytest.mark.parametrize("same_boxes", [True, False])
def test_a_batch_is_its_images(num_boxes, num_gts, same_boxes):
    gt_boxes = [make_boxes(number, seed) for seed, number in enumerate(num_gts)]
    boxes = [make_boxes(num_boxes, 9 + (0 if same_boxes else i)) for i in range(len(num_gts))]
    given = boxes[:1] if same_boxes else boxes
    got = find_overlaps(gt_boxes, torch.stack([of_image.tensor for of_image in given]))
    pairs = zip(gt_boxes, boxes, strict=True)
    expected = torch.block_diag(*(pairwise_iou(*pair) for pair in pairs))
    assert got.shape == expected.shape and torch.equal(got.to_dense(), expected)
    assert torch.equal(got.indices(), expected.nonzero().t())


@pytest.mark.parametrize(
    ("most", "parts"),
    [
        (0, [[2], [0], [3], [0], [1]]),
        (250, [[2, 0], [3], [0, 1]]),
        (500, [[2, 0, 3, 0], [1]]),
        (10**6, [[2, 0, 3, 0, 1]]),
    ],
)
def test_images_are_taken_together_up_to_a_number_of_pairs(monkeypatch, most, parts):
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", most)
    gt_boxes = [make_boxes(number, 0) for number in (2, 0, 3, 0, 1)]
    got = [[len(boxes) for boxes in gt_boxes[part]] for part in split_batch(gt_boxes, 100)]
    assert got == parts


def test_boxes_without_area_and_outside_the_image():
    boxes = Boxes(torch.tensor([[5.0, 5, 5, 9], [-20, -20, -10, -10], [-20, -20, 20, 20]]))
    gt_boxes = Boxes(torch.tensor([[-15.0, -15, 10, 10], [5, 5, 5, 9], [300, 300, 310, 310]]))
    assert torch.equal(overlaps(gt_boxes, boxes).to_dense(), pairwise_iou(gt_boxes, boxes))


def test_boxes_that_touch_do_not_overlap():
    boxes = Boxes(torch.tensor([[10.0, 0, 20, 10], [0, 0, 10, 10]]))
    assert overlaps(Boxes(torch.tensor([[0.0, 0, 10, 10]])), boxes).indices().tolist() == [
        [0],
        [1],
    ]
