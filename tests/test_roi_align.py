"""ROIAlign in threads, as products of sparse matrices, and of half precision."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn
from toys import SMALL, small_config, train_step

from libra_d2 import Detector
from libra_d2.engine import LibraTrainer
from libra_d2.modeling import roi_align
from libra_d2.modeling.look import Look, LookPooler
from libra_d2.modeling.roi_align import ParallelROIAlign, SparseROIAlign, use_roi_align

BASELINE = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
PISA = "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"
SPARSE = ("MODEL.ROI_ALIGN", "sparse")


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_boxes(number, generator):
    """Small and large ones, some of them outside of two images of 120x80 or without extent."""
    corner = torch.rand(number, 2, generator=generator) * 160 - 30
    extent = torch.rand(number, 2, generator=generator) ** 2 * 100
    extent[::7, 0] = 0
    extent[3::11] *= -1
    index = torch.arange(number)[:, None] % 2
    return torch.cat([index, corner, corner + extent], dim=1)


def pool(kind, features, rois, *options):
    """What a pooler gives, and the gradient of the features."""
    own = features.clone().requires_grad_()
    pooled = kind(*options)(own, rois)
    weights = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view_as(pooled)
    pooled.backward(weights)
    return pooled, own.grad


@pytest.mark.usefixtures("threads")
class TestThreads:
    """All of a CPU's threads pool what one would, to the bit."""

    @pytest.mark.parametrize("num_boxes", [0, 1, 2, 50])
    @pytest.mark.parametrize("channels", [1, 2, 16])
    def test_forward_and_gradient(self, num_boxes, channels, generator):
        features = torch.randn(2, channels, 20, 30, generator=generator)
        rois = make_boxes(num_boxes, generator)
        outcomes = [pool(kind, features, rois, 7, 0.25, 0) for kind in (ROIAlign, ParallelROIAlign)]
        for expected, got in zip(*outcomes, strict=True):
            assert torch.equal(got, expected)
        with torch.no_grad():
            assert torch.equal(ParallelROIAlign(7, 0.25, 0)(features, rois), outcomes[0][0])


@pytest.mark.usefixtures("threads")
class TestSparse:
    """Products of sparse matrices are torchvision's numbers up to rounding."""

    @pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
    @pytest.mark.parametrize("aligned", [True, False])
    @pytest.mark.parametrize("size", [1, 7, (2, 5)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_forward_and_gradient(self, sampling_ratio, aligned, size, dtype, generator):
        features = torch.randn(2, 5, 20, 30, generator=generator, dtype=dtype)
        rois = make_boxes(60, generator).to(dtype)
        options = size, 0.25, sampling_ratio, aligned
        for layout in (torch.contiguous_format, torch.channels_last):
            own = features.to(memory_format=layout)
            outcomes = [pool(kind, own, rois, *options) for kind in (ROIAlign, SparseROIAlign)]
            tolerance = 2e-6 if dtype == torch.float32 else 1e-13
            for expected, got in zip(*outcomes, strict=True):
                assert expected.abs().sum() > 0
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("num_boxes", [0, 1])
    def test_few_boxes(self, num_boxes, generator):
        features = torch.randn(2, 5, 20, 30, generator=generator)
        rois = make_boxes(8, generator)[1 : 1 + num_boxes]
        outcomes = [pool(kind, features, rois, 7, 0.25, 0) for kind in (ROIAlign, SparseROIAlign)]
        torch.testing.assert_close(*outcomes)

    def test_features_of_one_pixel(self):
        rois = torch.tensor([[0, 0, 0, 4, 4], [0, -3, 1, 9, 2]], dtype=torch.float32)
        outcomes = [
            pool(kind, torch.ones(1, 2, 1, 1), rois, 3, 0.25, 2)
            for kind in (ROIAlign, SparseROIAlign)
        ]
        torch.testing.assert_close(*outcomes)

    @pytest.mark.parametrize("at_once", [1, 5000, 20000])
    def test_by_parts(self, at_once, generator, monkeypatch):
        """A box of all of an image has as many entries as the image has positions, and more."""
        features, rois = torch.randn(2, 5, 20, 30, generator=generator), make_boxes(60, generator)
        pooled, gradient = pool(SparseROIAlign, features, rois, 7, 0.25, 0)
        monkeypatch.setattr(roi_align, "_ENTRIES_AT_ONCE", at_once)
        sizes = [len(part) for part in SparseROIAlign(7, 0.25, 0)._split(rois)]
        assert sum(sizes) == 60 and len(sizes) > 1
        pooled_by_parts, gradient_by_parts = pool(SparseROIAlign, features, rois, 7, 0.25, 0)
        assert torch.equal(pooled_by_parts, pooled)
        torch.testing.assert_close(gradient_by_parts, gradient)

    def test_a_box_is_pooled_alike_beside_any_others(self, generator):
        """Which a look at all proposals relies on."""
        features, rois = torch.randn(2, 16, 20, 30, generator=generator), make_boxes(50, generator)
        pooler = SparseROIAlign(7, 0.25, 0)
        assert torch.equal(pooler(features, rois)[[40, 3, 17]], pooler(features, rois[[40, 3, 17]]))

    def test_a_look_takes_it_over(self, generator):
        features = [torch.randn(2, 8, s, s, generator=generator).requires_grad_() for s in (32, 16)]
        boxes = [Boxes(make_boxes(40, generator)[:, 1:]) for _ in range(2)]
        pooler = LookPooler.like(ROIPooler(4, (1 / 4, 1 / 8), 0, "ROIAlignV2", 56, 3))
        use_roi_align(pooler, SparseROIAlign)
        chosen, look = [Boxes(b.tensor[5:9]) for b in boxes], Look()
        with look, torch.no_grad():
            pooler(features, boxes)
        look.keep(torch.tensor([5, 6, 7, 8, 45, 46, 47, 48]))
        with look:
            outcomes = [pooler(features, chosen)]
        outcomes.append(pooler(features, chosen))
        assert torch.equal(*outcomes)
        gradients = [torch.autograd.grad(x.square().sum(), features) for x in outcomes]
        assert all(map(torch.equal, *gradients))


def test_boxes_are_not_rounded_like_features():
    """A box at 1,000 pixels, which bfloat16 would move by two."""
    features = torch.arange(1100.0).expand(1, 1, 1100, 1100).contiguous() % 7
    boxes = torch.tensor([[0.0, 1001.5, 1001.5, 1017.5, 1017.5]])
    parent = ROIAlign(2, 1.0, 1)
    expected = parent(features, boxes)
    for kind in (ParallelROIAlign, SparseROIAlign):
        pooled = kind(2, 1.0, 1)(features.bfloat16(), boxes)
        assert pooled.dtype == torch.bfloat16
        torch.testing.assert_close(pooled.float(), expected, atol=0.02, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = parent(features.bfloat16(), boxes)
    assert (rounded.float() - expected).abs().max() > 0.3


@pytest.mark.parametrize(
    "name, kind", [("torchvision", ParallelROIAlign), ("sparse", SparseROIAlign)]
)
@pytest.mark.parametrize("config", [BASELINE, PISA])
def test_a_run_uses_it_with_the_poolers_options(name, kind, config, tmp_path):
    cfg = small_config(config, *SMALL, "MODEL.ROI_ALIGN", name)
    plain = build_model(cfg).roi_heads.box_pooler.level_poolers[1]
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for model in (LibraTrainer.build_model(cfg), Detector(tmp_path).model):
        pooler = model.roi_heads.box_pooler.level_poolers[1]
        assert type(pooler) is kind
        assert repr(pooler).partition("(")[2] == repr(plain).partition("(")[2]


@pytest.mark.parametrize("config", [BASELINE, PISA])
def test_losses_and_gradients_are_the_same_up_to_rounding(config):
    outcomes = []
    for opts in ((), SPARSE):
        cfg = small_config(config, *SMALL, *opts)
        outcomes.append(train_step(cfg, build=LibraTrainer.build_model)[:2])
    for expected, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class Own(ROIAlign):
    pass


def test_a_users_own_pooler_stays():
    model = nn.ModuleList([Own(2, 1.0, 1), ROIAlign(2, 1.0, 1)])
    use_roi_align(model, SparseROIAlign)
    assert [type(pooler) for pooler in model] == [Own, SparseROIAlign]
