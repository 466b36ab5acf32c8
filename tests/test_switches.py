"""Switches as objects: registries, options from the config, constructors that stand alone."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from torch.utils.checkpoint import checkpoint
from toys import BASELINE, LIBRA, make_inputs, small_config, toy_config, train_step

from libra_d2.modeling import (
    BOX_LOSSES,
    CLASSIFICATION_LOSSES,
    MATCHERS,
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    BalancedL1,
    BalancedSampling,
    Carl,
    DeltaLoss,
    IouBalancedSampler,
    IsrPositive,
    LibraFastRCNNOutputLayers,
    OhemSampler,
    SamplingMatcher,
    SmoothL1,
)
from libra_d2.modeling.sampling_log import log_sampled
from libra_d2.modeling.switches import check_bound
from libra_d2.sampling import sample_hard

REGISTRIES = (BOX_LOSSES, CLASSIFICATION_LOSSES, MATCHERS, NEGATIVE_SAMPLERS, POSITIVE_SAMPLERS)


@NEGATIVE_SAMPLERS.register(name="largest_iou")
class LargestIou:
    """A sampler of anyone's own."""

    def __call__(self, matches, candidates, num_samples):
        return sample_hard(matches.ious, candidates, num_samples)


@BOX_LOSSES.register(name="squared")
@dataclass(frozen=True, kw_only=True)
class Squared(DeltaLoss):
    """A box loss of anyone's own."""

    def compare(self, deltas, targets):
        return (deltas - targets) ** 2


@ROI_HEADS_REGISTRY.register()
class TwoLineROIHeads(BalancedSampling, StandardROIHeads):
    """Anyone's own heads, balanced."""


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r._name)
def test_every_switch_is_made_without_arguments_prints_and_pickles(registry):
    for name in registry.names():
        switch = registry.get(name)()
        if switch is not None:
            assert type(switch).__name__ in repr(switch)
            assert type(pickle.loads(pickle.dumps(switch))) is type(switch)


def test_switches_from_outside_are_named_in_the_config():
    opts = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "largest_iou"]
    opts += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "squared"]
    losses, _, _, model = train_step(small_config(BASELINE, *opts))
    assert isinstance(model.roi_heads.proposal_matcher.negative_sampler, LargestIou)
    assert model.roi_heads.box_predictor.box_loss == Squared()
    assert losses["loss_box_reg"].isfinite()
    with pytest.raises(ValueError, match="'larges_iou' does not exist.*'largest_iou'.*score_hlr"):
        small_config(BASELINE, "MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "larges_iou")


@BOX_LOSSES.register(name="rpn_only")
@dataclass(frozen=True, kw_only=True)
class RpnOnly(Squared):
    """One that other heads can't have."""

    scale: float = 1.0

    @classmethod
    def from_config(cls, cfg, head):
        if head != "RPN":
            raise ValueError(f"for the RPN, not {head}")
        return cls()


def test_a_switch_of_anyones_own_that_is_not_chosen_does_not_matter():
    small_config(BASELINE)
    with pytest.raises(ValueError, match="for the RPN, not ROI_BOX_HEAD"):
        small_config(BASELINE, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "rpn_only")


class OwnSettings(StandardROIHeads):
    """Heads whose output layers are not what the config says."""

    predictor = FastRCNNOutputLayers

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        shape = ShapeSpec(channels=ret["box_predictor"].cls_score.in_features)
        ret["box_predictor"] = cls.predictor(
            cfg, shape, test_score_thresh=0.77, loss_weight={"loss_box_reg": 5.0}
        )
        return ret


@ROI_HEADS_REGISTRY.register()
class BalancedOwnSettings(BalancedSampling, OwnSettings):
    """The same, balanced."""


@ROI_HEADS_REGISTRY.register()
class BalancedOwnPredictor(BalancedSampling, OwnSettings):
    """With output layers of anyone's own."""

    predictor = type("OwnPredictor", (FastRCNNOutputLayers,), {})


def test_settings_of_output_layers_are_kept():
    cfg = small_config(LIBRA, "MODEL.ROI_HEADS.NAME", "BalancedOwnSettings")
    predictor = build_model(cfg).roi_heads.box_predictor
    assert type(predictor) is LibraFastRCNNOutputLayers and predictor.box_loss == BalancedL1()
    assert predictor.test_score_thresh == 0.77 and predictor.loss_weight == {"loss_box_reg": 5.0}


def test_losses_that_anyones_own_output_layers_would_ignore():
    opts = ("MODEL.ROI_HEADS.NAME", "BalancedOwnPredictor")
    assert "loss_box_reg" in train_step(small_config(BASELINE, *opts))[0]
    for key, value in (("PISA.CARL.ENABLED", True), ("ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "squared")):
        with pytest.raises(ValueError, match=f"{key} {value} needs output layers.*OwnPredictor"):
            build_model(small_config(BASELINE, *opts, f"MODEL.{key}", value))


def test_a_name_is_registered_once():
    with pytest.raises(AssertionError, match="largest_iou"):
        NEGATIVE_SAMPLERS.register(LargestIou, name="largest_iou")


def test_any_roi_heads_are_balanced_in_two_lines():
    model = build_model(small_config(LIBRA, "MODEL.ROI_HEADS.NAME", "TwoLineROIHeads")).train()
    heads = model.roi_heads
    assert isinstance(heads.proposal_matcher, SamplingMatcher)
    assert heads.box_predictor.box_loss == BalancedL1()
    with EventStorage():
        losses = model(make_inputs())
    assert all(loss.isfinite() for loss in losses.values())


class TestModels:
    """A whole Libra model as an object among others."""

    def model(self):
        torch.manual_seed(0)
        bfp = ("MODEL.BACKBONE.NAME", "build_bfp_backbone")
        return build_model(small_config(LIBRA, *bfp))

    def losses(self, model):
        torch.manual_seed(1)
        with EventStorage():
            return model.train()(make_inputs())

    @pytest.mark.parametrize("copied", ["deepcopy", "pickle", "ema"])
    def test_copies_compute_the_same(self, copied):
        model = self.model()
        make = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
            "ema": lambda m: torch.optim.swa_utils.AveragedModel(m),
        }[copied]
        other = make(model)
        torch.testing.assert_close(self.losses(other), self.losses(model), rtol=0, atol=0)

    def test_activation_checkpointing(self):
        backbone = self.model().backbone.train()
        image = torch.rand(1, 3, 64, 64, requires_grad=True)
        gradients = []
        for run in (backbone, lambda x: checkpoint(backbone, x, use_reentrant=False)):
            torch.manual_seed(0)
            (gradient,) = torch.autograd.grad(sum(x.sum() for x in run(image).values()), image)
            gradients.append(gradient)
        torch.testing.assert_close(*gradients)

    def test_the_backbone_compiles_in_one_graph(self):
        backbone = self.model().backbone.eval()
        compiled = torch.compile(backbone, backend="eager", fullgraph=True)
        image = torch.rand(1, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image), backbone(image))

    @pytest.mark.parametrize("refine_type", ["non_local", "conv", "none"])
    def test_a_compiled_backbone_trains(self, refine_type):
        cfg = small_config(LIBRA, "MODEL.BFP.REFINE_TYPE", refine_type)
        backbone = build_model(cfg).backbone.train()
        image, gradients = torch.rand(1, 3, 96, 128), []
        for network in (backbone, torch.compile(backbone, backend="aot_eager")):
            backbone.zero_grad()
            sum(level.square().sum() for level in network(image).values()).backward()
            gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
        for eager, compiled in zip(*gradients, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3 * eager.abs().max())

    def test_pointrends_heads_are_balanced_in_two_lines(self):
        from detectron2.projects.point_rend.roi_heads import PointRendROIHeads

        class BalancedPointRendROIHeads(BalancedSampling, PointRendROIHeads):
            """Both."""

        model = self.model()
        cfg = small_config(LIBRA)
        heads = BalancedPointRendROIHeads(cfg, model.backbone.output_shape())
        assert isinstance(heads.proposal_matcher.negative_sampler, IouBalancedSampler)
        assert heads.box_predictor.box_loss == BalancedL1()
        model.roi_heads = heads
        assert all(loss.isfinite() for loss in self.losses(model).values())


class TestOutputLayers:
    OPTIONS = {  # noqa: RUF012
        "box2box_transform": Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        "num_classes": 4,
    }

    def make(self, **kwargs):
        return LibraFastRCNNOutputLayers(ShapeSpec(channels=8), **self.OPTIONS, **kwargs)

    @pytest.mark.parametrize("name", ["smooth_l1", "giou", "diou", "ciou"])
    def test_parents_arguments_work(self, name):
        options = {"box_reg_loss_type": name, "smooth_l1_beta": 0.3}
        own = self.make(**options)
        parent = FastRCNNOutputLayers(ShapeSpec(channels=8), **self.OPTIONS, **options)
        boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30]])
        args = (boxes, boxes + 2, torch.rand(2, 16), torch.tensor([1, 3]))
        assert torch.equal(own.box_reg_loss(*args), parent.box_reg_loss(*args))

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"box_loss": SmoothL1(), "smooth_l1_beta": 1.0}, "smooth_l1_beta has no effect"),
            ({"box_loss": SmoothL1(), "box_reg_loss_type": "giou"}, "box_reg_loss_type has no"),
            ({"box_reg_loss_type": "balanced_l1"}, "one of smooth_l1, giou, diou, ciou, got"),
            ({"isr_positive": IsrPositive(), "use_sigmoid_ce": True}, "IsrPositive.*softmax"),
            ({"carl": Carl(), "use_sigmoid_ce": True}, "Carl.*softmax"),
        ],
    )
    def test_what_excludes_each_other_is_refused(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            self.make(**kwargs)

    def test_weights_of_a_sampler_need_the_softmax(self):
        layers = self.make(use_sigmoid_ce=True)
        image = Instances((40, 40), gt_classes=torch.tensor([1, 4]), loss_weights=torch.ones(2))
        image.proposal_boxes = image.gt_boxes = Boxes(torch.tensor([[0.0, 0, 9, 9]] * 2))
        with pytest.raises(ValueError, match="weighs proposals needs the softmax"), EventStorage():
            layers.losses((torch.zeros(2, 5), torch.zeros(2, 16)), [image])

    def test_stock_layers_cannot_serve_a_sampler_that_looks_at_predictions(self):
        heads = build_model(small_config(BASELINE)).roi_heads
        stock = FastRCNNOutputLayers(ShapeSpec(channels=32), **self.OPTIONS)
        options = {
            "box_in_features": ["p2"],
            "box_pooler": heads.box_pooler,
            "box_head": heads.box_head,
            "num_classes": 4,
            "batch_size_per_image": 8,
            "positive_fraction": 0.5,
            "proposal_matcher": heads.proposal_matcher,
        }
        plain = TwoLineROIHeads(
            box_predictor=stock, negative_sampler=IouBalancedSampler(), **options
        )
        assert isinstance(plain.proposal_matcher, SamplingMatcher)
        with pytest.raises(ValueError, match="OhemSampler.* needs LibraFastRCNNOutputLayers"):
            TwoLineROIHeads(box_predictor=stock, negative_sampler=OhemSampler(), **options)


def test_of_boxes_that_are_turned_nothing_is_logged():
    image = Instances((40, 40), gt_classes=torch.tensor([1]), gt_indices=torch.tensor([0]))
    image.proposal_boxes = image.gt_boxes = RotatedBoxes(torch.tensor([[9.0, 9, 4, 4, 30]]))
    with EventStorage() as storage:
        log_sampled([image], num_gts=[1], background_label=4, num_bins=3, max_iou=0.5)
    assert not storage.latest()


def test_c4_heads_train_with_every_sampler():
    opts = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]]
    opts += ["MODEL.ROI_HEADS.NAME", "LibraRes5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]]
    opts += ["MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64]]]
    opts += ["MODEL.BFP.ENABLED", False, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
    opts += ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 4]
    for negative in ("iou_balanced", "score_hlr"):
        own = [
            "MODEL.ROI_HEADS.NEGATIVE_SAMPLER",
            negative,
            "MODEL.PISA.ISR_POSITIVE.ENABLED",
            True,
        ]
        losses, gradients, _, _ = train_step(toy_config(BASELINE, *opts, *own))
        assert all(loss.isfinite() for loss in losses.values())
        assert all(g.isfinite().all() for g in gradients.values())


class TestRpn:
    def test_a_sampler_counts_all_anchors(self):
        opts = ["MODEL.RPN.NEGATIVE_SAMPLER", "iou_balanced", "MODEL.RPN.BOUNDARY_THRESH", 0]
        with pytest.raises(ValueError, match=r"\(MODEL.RPN.BOUNDARY_THRESH\) must be -1 with a"):
            build_model(small_config(BASELINE, *opts))

    @pytest.mark.parametrize("bound", [2.5, 0, -2])
    def test_a_bound_is_a_whole_number(self, bound):
        with pytest.raises(ValueError, match=f"a whole number of at least 1, got {bound}"):
            check_bound(bound)

    def losses(self, *opts):
        losses, _, logged, model = train_step(small_config(BASELINE, *opts))
        return losses, logged, model.proposal_generator

    def test_normalizer_is_the_number_of_sampled_anchors(self):
        bound = ("MODEL.RPN.NEGATIVE_POSITIVE_UB", 5)
        by_batch, logged, rpn = self.losses(*bound, "MODEL.RPN.LOSS_NORMALIZER", "batch_size")
        sampled, again, _ = self.losses(*bound, "MODEL.RPN.LOSS_NORMALIZER", "sampled")
        assert logged["rpn/num_neg_anchors"] == again["rpn/num_neg_anchors"]
        number = 3 * (logged["rpn/num_pos_anchors"] + logged["rpn/num_neg_anchors"])
        ratio = 3 * rpn.batch_size_per_image / number
        for name in ("loss_rpn_cls", "loss_rpn_loc"):
            torch.testing.assert_close(sampled[name], by_batch[name] * ratio)
        auto = self.losses(*bound)[0]
        assert auto["loss_rpn_cls"] == sampled["loss_rpn_cls"]

    def test_libra_rpn_samples_within_the_bound(self):
        opts = ("MODEL.RPN.NEGATIVE_SAMPLER", "iou_balanced", "MODEL.RPN.NEGATIVE_POSITIVE_UB", 5)
        losses, logged, rpn = self.losses(*opts, "MODEL.RPN.BBOX_REG_LOSS_TYPE", "balanced_l1")
        assert rpn.box_loss == BalancedL1()
        assert rpn.anchor_matcher.negative_sampler == IouBalancedSampler(upper_iou=0.3)
        assert all(loss.isfinite() for loss in losses.values())
        # One of the three images is empty and has five negatives of its own.
        assert 0 < logged["rpn/num_neg_anchors"] * 3 <= 5 * logged["rpn/num_pos_anchors"] * 3 + 5
