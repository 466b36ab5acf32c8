"""What a look at all proposals has computed is taken over, and nothing is changed by that."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from heads import CASCADE, FEW, ISR_N, ISR_P, OHEM, run_heads
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from libra_d2.modeling import LibraFastRCNNOutputLayers, LibraROIHeads, roi_heads
from libra_d2.modeling.half import tf32
from libra_d2.modeling.look import Look, LookPooler, can_look

CONV = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16)
NUM_CANDIDATES = 3 * 200 + 3 + 2  # of run_heads, its ground truths included
BFLOAT16 = {"rtol": 0.02, "atol": 0.02}


class CountRows(TorchFunctionMode):
    """How many rows go through each linear layer and convolution."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d):
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(
    params=[1, 2, pytest.param("cuda", marks=needs_gpu)],
    ids=["one thread", "two threads", "GPU"],
)
def device(request):
    if request.param == "cuda":
        with tf32(False):
            yield "cuda"
        return
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield "cpu"
    torch.set_num_threads(before)


class TestLook:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("conv_dims, norm", [((), ""), ((8, 8), ""), ((8,), "GN")])
    def test_values_and_gradients_are_those_of_a_plain_pass(self, conv_dims, norm, dtype, device):
        features, boxes, pooler, head = self.make_parts(conv_dims, norm, device)
        rows = torch.tensor([3, 12, 5, 41, 79, 70, 40], device=device)
        chosen = [Boxes(boxes[0].tensor[rows[:3]]), Boxes(boxes[1].tensor[rows[3:] - 40])]

        def of(boxes):
            with torch.autocast(device, dtype, enabled=dtype is torch.bfloat16):
                return head(pooler([level.to(dtype) for level in features], boxes))

        def gradients(outcome):
            weights = torch.linspace(-1, 1, outcome.numel(), device=device).view_as(outcome)
            loss = (outcome.float() * weights).sum()
            return torch.autograd.grad(loss, [*features, *head.parameters()])

        look = Look()
        with look, torch.no_grad():
            everything = of(boxes)
        look.keep(rows)
        with CountRows() as counted, look:
            got = of(chosen)
        assert counted.rows == [] and look.values == []
        torch.testing.assert_close(got, everything[rows], rtol=0, atol=0)
        expected = of(chosen)
        tolerance = BFLOAT16 if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(got, expected, **tolerance)
        for a, b in zip(gradients(got), gradients(expected), strict=True):
            assert a.dtype == b.dtype == torch.float32 and b.abs().sum() > 0
            torch.testing.assert_close(a, b, **tolerance)

    def make_parts(self, conv_dims, norm, device):
        """Two levels of features of two images, 40 boxes in each, a pooler and a head."""
        generator = torch.Generator().manual_seed(0)
        features = [torch.randn(2, 32, s, s, generator=generator).to(device) for s in (32, 16)]
        starts = torch.rand(2, 40, 2, generator=generator) * 60
        ends = starts + 4 + torch.rand(2, 40, 2, generator=generator) * 60
        boxes = [Boxes(b) for b in torch.cat([starts, ends], dim=2).to(device)]
        pooler = LookPooler.like(ROIPooler(4, (1 / 4, 1 / 8), 0, "ROIAlignV2", 56, 3))
        torch.manual_seed(0)
        shape = ShapeSpec(channels=32, height=4, width=4)
        norm = (lambda channels: nn.GroupNorm(4, channels)) if norm else ""
        dims = {"conv_dims": conv_dims, "fc_dims": [16, 12]}
        head = FastRCNNConvFCHead(shape, **dims, conv_norm=norm)
        return [level.requires_grad_() for level in features], boxes, pooler, head.to(device)

    def test_what_was_not_computed_is_computed(self):
        first, second, x = nn.Linear(3, 3), nn.Linear(3, 2), torch.rand(5, 3)
        look, rows = Look(), torch.tensor([4, 0])
        with look, torch.no_grad():
            first(x)
        look.keep(rows)
        with CountRows() as counted, look:
            got = second(x[rows]), first(x[rows]), first(x[rows])
        assert counted.rows == [2, 2]
        expected = second(x[rows]), first(x[rows]), first(x[rows])
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("opts", [ISR_N, OHEM, (*ISR_N, *CASCADE), (*OHEM, *CONV)])
def test_heads_compute_no_row_twice(opts, monkeypatch):
    losses, rows = {}, {}
    for remembers in (True, False):
        if not remembers:
            monkeypatch.setattr(roi_heads, "can_look", lambda *parts: False)
        with CountRows() as counted:
            heads, *_, losses[remembers], _ = run_heads(*opts, *ISR_P, *FEW)
        sum(losses[remembers].values()).backward()
        losses[remembers] |= {n: p.grad for n, p in heads.named_parameters()}
        rows[remembers] = counted.rows
        assert heads._look is None and isinstance(heads.box_pooler, LookPooler)
    # Gradients of some 40 were 6e-5 apart on a CPU with two threads: sums in another order.
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=1e-5)
    num_layers = rows[False].count(NUM_CANDIDATES)
    assert num_layers == (6 if CONV[0] in opts else 4)
    # Of the first stage, what is not remembered is computed a second time: as many layers.
    assert len(rows[False]) - len(rows[True]) == num_layers
    assert rows[True].count(NUM_CANDIDATES) == num_layers


def _with_dropout(parts):
    parts["head"].add_module("dropout", nn.Dropout())


def _with_batch_norm(parts):
    parts["head"].add_module("norm", nn.BatchNorm1d(8))


def _of_another_layer(parts):
    parts["head"].add_module("fc2", type("Low", (nn.Linear,), {})(8, 8))


def _with_a_hook(parts):
    parts["head"].fc1.register_forward_pre_hook(lambda module, x: (F.dropout(x[0]),))


def _with_its_own_forward(parts):
    parts["head"].forward = parts["head"].__call__


def _in_place(parts):
    parts["head"].add_module("relu", nn.ReLU(inplace=True))


def _of_another_predictor(parts):
    class Other(FastRCNNOutputLayers):
        def forward(self, x):
            return super().forward(F.dropout(x))

    parts["predictor"].__class__ = Other


def _with_another_pooler(parts):
    parts["pooler"] = ROIPooler(2, (1 / 4,), 0, "ROIAlignV2")


@pytest.mark.parametrize(
    "change",
    [
        *(_with_dropout, _with_batch_norm, _of_another_layer, _with_a_hook),
        *(_with_its_own_forward, _in_place, _of_another_predictor, _with_another_pooler),
    ],
)
def test_only_known_heads_are_remembered(change):
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    shape = ShapeSpec(channels=4, height=2, width=2)
    parts = {
        "pooler": LookPooler.like(ROIPooler(2, (1 / 4,), 0, "ROIAlignV2")),
        "head": FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[8]),
        "predictor": LibraFastRCNNOutputLayers(8, box2box_transform=transform, num_classes=3),
    }
    assert can_look(**parts)
    change(parts)
    assert not can_look(**parts)


def test_not_where_torch_is_deterministic():
    heads = run_heads(*OHEM)[0]
    parts = heads.box_pooler, heads.box_head, heads.box_predictor
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not can_look(*parts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert can_look(*parts)


def test_heads_of_another_class_compute_twice(monkeypatch):
    """Theirs may be another way for the boxes chosen, as here, where features are changed."""

    class Changing(LibraROIHeads):
        def _forward_box(self, features, proposals):
            return super()._forward_box({k: 2 * v for k, v in features.items()}, proposals)

    heads, features, proposals, targets, *_ = run_heads(*OHEM, *FEW)
    heads.__class__ = Changing

    def losses():
        torch.manual_seed(2)
        with EventStorage():
            return heads(None, features, copy.deepcopy(proposals), targets)[1]

    got = losses()
    Changing.trains_as_it_looks = True  # which it does not
    assert got != losses()
    monkeypatch.setattr(roi_heads, "can_look", lambda *parts: False)
    assert got == losses()


def test_other_poolers_are_left_alone():
    pooler = ROIPooler(4, (1 / 4,), 0, "ROIPool")
    assert LookPooler.like(pooler) is pooler
    looking = LookPooler.like(ROIPooler(4, (1 / 4,), 0, "ROIAlignV2"))
    assert LookPooler.like(looking) is looking


def test_heads_are_copied_and_pickled_after_a_look():
    heads, *_ = run_heads(*OHEM)
    state = heads.state_dict()
    for copied in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        torch.testing.assert_close(copied.state_dict(), state, rtol=0, atol=0)
