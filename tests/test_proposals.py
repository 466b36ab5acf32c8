"""The RPN's proposals: equal to what detectron2 finds image by image."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from toys import BASELINE, DEVICES, toy_config

from libra_d2.modeling import LibraRPN

SIZES = [(96, 128), (80, 100), (33, 128)]


def make_rpn(*opts, training: bool = True) -> LibraRPN:
    opts = ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 60, "MODEL.RPN.PRE_NMS_TOPK_TEST", 40, *opts]
    rpn = build_model(toy_config(BASELINE, *opts)).proposal_generator
    assert isinstance(rpn, LibraRPN)
    return rpn.train(training)


def make_predictions(rpn: LibraRPN, scale: float = 0.5, dtype=torch.float32):
    """Anchors, logits and deltas of images padded to 96x128, and the images' sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(96 // stride, 128 // stride) for stride in (4, 8, 16, 32, 64)]
    anchors = rpn.anchor_generator([torch.zeros(1, 1, *size) for size in sizes])
    logits = [torch.randn(3, len(a), generator=generator).to(dtype) for a in anchors]
    deltas = [torch.randn(3, len(a), 4, generator=generator).to(dtype) * scale for a in anchors]
    return anchors, logits, deltas, SIZES


def assert_the_parents(rpn, predictions):
    own = rpn.predict_proposals(*predictions)
    expected = RPN.predict_proposals(rpn, *predictions)
    for one, other in zip(own, expected, strict=True):
        assert one.image_size == other.image_size
        assert one.get_fields().keys() == other.get_fields().keys()
        assert torch.equal(one.proposal_boxes.tensor, other.proposal_boxes.tensor)
        assert torch.equal(one.objectness_logits, other.objectness_logits)
    return own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of bfloat16 many are equal
@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_parents(training, dtype, scale, device):
    rpn = make_rpn(training=training)
    *levels, sizes = make_predictions(rpn, scale, dtype)
    levels = [[level.to(device) for level in kind] for kind in levels]
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        own = assert_the_parents(rpn, (*levels, sizes))
    assert all(0 < len(x) <= rpn.post_nms_topk[training] for x in own)


def test_equals_the_parents_where_all_anchors_are_candidates():
    rpn = make_rpn("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 10**6)
    assert_the_parents(rpn, make_predictions(rpn))


def test_small_and_outlying_boxes_are_left_out():
    rpn = make_rpn()
    rpn.min_box_size = 12.0
    own = assert_the_parents(rpn, make_predictions(rpn))
    for proposals, (height, width) in zip(own, SIZES, strict=True):
        boxes = proposals.proposal_boxes.tensor
        assert (boxes[:, 2:] - boxes[:, :2] > 12).all() and (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()


def test_traced_it_is_the_parents():
    """Whose graph is right for other images too."""
    rpn = make_rpn(training=False)
    predictions = make_predictions(rpn)
    anchors, _, deltas, sizes = predictions

    def find(*logits):
        found = rpn.predict_proposals(anchors, logits, deltas, [torch.tensor(s) for s in sizes])
        return [x.proposal_boxes.tensor for x in found]

    traced = torch.jit.trace(find, tuple(predictions[1]), check_trace=False)
    others = [logits.flip(1) for logits in predictions[1]]
    expected = rpn.predict_proposals(anchors, others, deltas, sizes)
    for one, other in zip(traced(*others), expected, strict=True):
        assert torch.equal(one, other.proposal_boxes.tensor)


class ShiftedRPN(LibraRPN):
    """A user's own, which decodes otherwise."""

    def _decode_proposals(self, anchors, pred_anchor_deltas):
        return [boxes + 3 for boxes in super()._decode_proposals(anchors, pred_anchor_deltas)]


def test_proposals_decoded_otherwise_are_taken():
    rpn = make_rpn()
    rpn.__class__ = ShiftedRPN
    own = rpn.predict_proposals(*make_predictions(rpn, scale=0.0))
    rpn.__class__ = LibraRPN
    plain = rpn.predict_proposals(*make_predictions(rpn, scale=0.0))
    assert not torch.equal(own[0].proposal_boxes.tensor[:5], plain[0].proposal_boxes.tensor[:5])


def test_an_image_may_have_none():
    rpn = make_rpn()
    anchors, logits, deltas, sizes = make_predictions(rpn)
    for level in deltas:
        level[1, :, :2] = 1e4  # far to the right of the second image
    own = assert_the_parents(rpn, (anchors, logits, deltas, sizes))
    assert [len(x) > 0 for x in own] == [True, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", [1, 2])
def test_what_is_not_finite(what, value):
    """In training an error; else left out, as far as it is among the candidates."""
    rpn = make_rpn(training=False)
    predictions = make_predictions(rpn)
    chosen = predictions[1][0][0].topk(5).indices
    predictions[what][0][0, chosen[:3]] = value
    own = assert_the_parents(rpn, predictions)
    assert own[0].proposal_boxes.tensor.isfinite().all()
    rpn.train()
    with pytest.raises(FloatingPointError, match="Inf/NaN"):
        rpn.predict_proposals(*predictions)
