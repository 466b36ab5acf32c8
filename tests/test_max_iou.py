"""Labels of anchors from the pairs that overlap: equal to what detectron2 makes of all pairs."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from toys import BASELINE, DEVICES, RETINANET, toy_config

from libra_d2.modeling import LibraRetinaNet, LibraRPN, SamplingMatcher, overlaps
from libra_d2.modeling.max_iou import match_anchors

SIZE = 256


def make_anchors(stride: int = 8) -> list[Boxes]:
    """Of two levels, as a grid; some reach out of the image."""
    levels = []
    for step in (stride, 2 * stride):
        y, x = torch.meshgrid(*[torch.arange(0, SIZE, step)] * 2, indexing="ij")
        center = torch.stack([x, y], dim=2).reshape(-1, 1, 2).float()
        half = torch.tensor([[2.0, 1.0], [1.5, 1.5], [1.0, 2.0]]) * step
        levels.append(Boxes(torch.cat([center - half, center + half], dim=2).reshape(-1, 4)))
    return levels


def make_gts(number: int, seed: int = 0, grid: int = 1) -> Boxes:
    """Corners lie on a grid of so many pixels: the larger it is, the more IoUs are equal."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * SIZE
    extent = 8 + torch.rand(number, 2, generator=generator) * 60
    return Boxes((torch.cat([corner, corner + extent], dim=1) / grid).round() * grid)


def make_instances(*gts: Boxes) -> list[Instances]:
    return [
        Instances((SIZE, SIZE), gt_boxes=boxes, gt_classes=torch.arange(len(boxes)) % 10)
        for boxes in gts
    ]


FAR_AWAY = Boxes(torch.tensor([[900.0, 900, 950, 950]]))  # overlaps no anchor
BATCHES = {
    "one": (make_gts(1),),
    "a few": (make_gts(3), make_gts(7, seed=1)),
    "none among others": (make_gts(2), make_gts(0), make_gts(5, seed=2), make_gts(0)),
    "none at all": (make_gts(0), make_gts(0)),
    "a crowd": (make_gts(200),),
    "equal IoUs": (make_gts(40, grid=16), make_gts(9, grid=32)),
    "the same twice": (Boxes.cat([make_gts(3), make_gts(3)]),),
    "far away": (make_gts(2), FAR_AWAY, make_gts(3, seed=3)),
    "without end": (Boxes(torch.tensor([[9.0, 9, 30, 30], [0, 0, 1e25, 1e25], [-1e25, 0, 9, 9]])),),
    "without area": (Boxes(torch.tensor([[8.0, 8, 8, 40], [5, 5, 60, 60]])),),
}


@pytest.fixture(params=["one by one", "as a whole"])
def parts(request, monkeypatch):
    if request.param == "as a whole":  # as on a GPU
        monkeypatch.setattr(overlaps, "_PAIRS_AT_ONCE", 10**9)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize(
    ("thresholds", "labels"),
    [([0.3, 0.7], [0, -1, 1]), ([0.4, 0.5], [0, -1, 1]), ([0.5], [0, 1]), ([0.1, 0.5], [-1, 0, 1])],
)
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_dense_matching(batch, thresholds, labels, low_quality):
    matcher, anchors = Matcher(thresholds, labels, low_quality), Boxes.cat(make_anchors())
    matches = list(match_anchors(matcher, list(BATCHES[batch]), anchors))
    assert len(matches) == len(BATCHES[batch])
    for gt_boxes, match in zip(BATCHES[batch], matches, strict=True):
        ious = pairwise_iou(gt_boxes, anchors)
        gt_indices, expected = matcher(ious)
        assert match.labels.dtype == expected.dtype and torch.equal(match.labels, expected)
        assert match.gt_indices.dtype == gt_indices.dtype
        assert torch.equal(match.gt_indices, gt_indices)
        highest = ious.amax(dim=0) if len(gt_boxes) else torch.zeros(len(anchors))
        assert torch.equal(match.ious, highest)


@pytest.mark.usefixtures("parts")
def test_without_anchors():
    matches = match_anchors(Matcher([0.5], [0, 1]), [make_gts(2), make_gts(0)], Boxes([]))
    assert [len(match.labels) for match in matches] == [0, 0]


def assert_equal(own, expected):
    for one, other in zip(own, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_rpn_trains_on_what_its_parent_does(batch, device):
    rpn = build_model(toy_config(BASELINE)).proposal_generator
    assert isinstance(rpn, LibraRPN)
    anchors = [level.to(device) for level in make_anchors()]
    gts = [gt.to(device) for gt in make_instances(*BATCHES[batch])]
    torch.manual_seed(0)
    own, after = rpn.label_and_sample_anchors(anchors, gts), torch.rand(1, device=device)
    torch.manual_seed(0)
    assert_equal(own, RPN.label_and_sample_anchors(rpn, anchors, gts))
    assert torch.equal(after, torch.rand(1, device=device))  # no more and no less was drawn


@pytest.mark.parametrize("batch", BATCHES)
def test_the_rpns_samplers_see_what_they_would(batch):
    opts = ["MODEL.RPN.NEGATIVE_SAMPLER", "iou_balanced", "MODEL.RPN.NEGATIVE_POSITIVE_UB", 5]
    rpn = build_model(toy_config(BASELINE, *opts)).proposal_generator
    anchors, gts = make_anchors(), make_instances(*BATCHES[batch])
    torch.manual_seed(0)
    own = rpn.label_and_sample_anchors(anchors, gts)
    torch.manual_seed(0)
    assert_equal(own, RPN.label_and_sample_anchors(rpn, anchors, gts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", BATCHES)
def test_retinanet_learns_what_its_parent_does(batch, device):
    model = build_model(toy_config(RETINANET))
    assert isinstance(model, LibraRetinaNet)
    anchors = [level.to(device) for level in make_anchors()]
    gts = [gt.to(device) for gt in make_instances(*BATCHES[batch])]
    assert_equal(model.label_anchors(anchors, gts), RetinaNet.label_anchors(model, anchors, gts))


class Reversed(Matcher):
    """A matcher of a user's own, which has to be asked."""

    def __call__(self, match_quality_matrix):
        matches, labels = super().__call__(match_quality_matrix)
        return matches, 1 - labels.clamp(min=0)


def test_a_matcher_of_ones_own_is_asked():
    anchors, gts = make_anchors(), make_instances(make_gts(3))
    matcher = Reversed([0.4], [0, 1])
    model = build_model(toy_config(RETINANET))
    model.anchor_matcher = matcher
    (labels,), _ = model.label_anchors(anchors, gts)
    expected = matcher(pairwise_iou(gts[0].gt_boxes, Boxes.cat(anchors)))[1] == 1
    assert torch.equal(labels < model.num_classes, expected) and expected.sum() > 1000
    rpn = build_model(toy_config(BASELINE)).proposal_generator
    rpn.anchor_matcher, rpn.positive_fraction, rpn.batch_size_per_image = matcher, 1.0, 10**6
    (labels,), _ = rpn.label_and_sample_anchors(anchors, gts)
    assert torch.equal(labels == 1, expected)


class NoPositives(SamplingMatcher):
    """A sampling matcher of a user's own."""

    def __call__(self, match_quality_matrix):
        matches, labels = super().__call__(match_quality_matrix)
        return matches, labels.clamp(max=0)


def test_a_sampling_matcher_of_ones_own_is_asked():
    rpn = build_model(toy_config(BASELINE)).proposal_generator
    rpn.anchor_matcher = NoPositives(
        rpn.anchor_matcher, batch_size_per_image=256, positive_fraction=0.5
    )
    (labels,), _ = rpn.label_and_sample_anchors(make_anchors(), make_instances(make_gts(3)))
    assert (labels == 1).sum() == 0 and (labels == 0).sum() == 256


def test_anchors_beyond_the_boundary_are_left_out_as_by_the_parent():
    rpn = build_model(toy_config(BASELINE, "MODEL.RPN.BOUNDARY_THRESH", 0)).proposal_generator
    rpn.batch_size_per_image = 10**6
    anchors, gts = make_anchors(), make_instances(make_gts(3))
    (labels,), _ = rpn.label_and_sample_anchors(anchors, gts)
    inside = Boxes.cat(anchors).inside_box((SIZE, SIZE), 0)
    assert (~inside).any() and (labels[~inside] == -1).all() and (labels[inside] == 0).any()
