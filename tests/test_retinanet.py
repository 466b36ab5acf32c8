"""LibraRetinaNet: equal to detectron2's at defaults, every switch alone and with every other."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from fvcore.nn import giou_loss, smooth_l1_loss
from torch.nn import functional as F
from toys import call_losses, make_inputs, one_level, small_retinanet, train_step

from libra_d2.losses import balanced_l1_loss
from libra_d2.modeling import OhemLoss

PLAIN = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
SWITCHES = {
    "CLS_LOSS_TYPE": "balanced_ce",
    "BBOX_REG_LOSS_TYPE": "balanced_l1",
    "MATCHER": "mutual_guidance",
}


class TestAtDefaults:
    @pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_computes_what_its_parent_does_bit_for_bit(self, box_loss, beta):
        opts = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss]
        opts += ["MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", beta]
        # fvcore's scripted focal loss is optimized in its first calls, which changes its rounding.
        train_step(small_retinanet(*opts, *PLAIN))
        losses, gradients, logged, model = train_step(small_retinanet(*opts))
        expected = train_step(small_retinanet(*opts, *PLAIN))
        assert type(model).__name__ == "LibraRetinaNet"
        assert type(expected[3]).__name__ == "RetinaNet"
        torch.testing.assert_close(losses, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(gradients, expected[1], rtol=0, atol=0)
        assert logged == expected[2]
        assert model.loss_normalizer == expected[3].loss_normalizer

    @torch.no_grad()
    def test_detects_what_its_parent_does(self):
        detections = []
        for plain in ([], PLAIN):
            torch.manual_seed(0)
            model = build_model(small_retinanet("MODEL.RETINANET.PRIOR_PROB", 0.1, *plain)).eval()
            detections.append(model(make_inputs())[0]["instances"])
        own, expected = detections
        assert len(own) == len(expected) > 0
        assert torch.equal(own.scores, expected.scores)
        assert torch.equal(own.pred_boxes.tensor, expected.pred_boxes.tensor)


class TestSwitches:
    @pytest.mark.parametrize("switch", list(SWITCHES))
    def test_each_changes_what_it_should_alone(self, switch):
        off = train_step(small_retinanet())[0]
        on = train_step(small_retinanet(f"MODEL.RETINANET.{switch}", SWITCHES[switch]))[0]
        changed = {name for name in on if on[name] != off[name]}
        assert (
            changed
            == {
                "CLS_LOSS_TYPE": {"loss_cls"},
                "BBOX_REG_LOSS_TYPE": {"loss_box_reg"},
                # A new model's scores are all alike and so amplify nothing.
                "MATCHER": {"loss_cls"},
            }[switch]
        )

    @pytest.mark.parametrize("num_objects", [(0, 0), (1, 1), (100, 40), (0, 60)])
    @pytest.mark.parametrize("matcher", ["max_iou", "mutual_guidance"])
    @pytest.mark.parametrize("cls_loss", ["focal", "ohem"])
    def test_any_number_of_objects_trains(self, num_objects, matcher, cls_loss):
        opts = ["MODEL.RETINANET.MATCHER", matcher, "MODEL.RETINANET.CLS_LOSS_TYPE", cls_loss]
        opts += ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1"]
        losses, gradients, _, _ = train_step(small_retinanet(*opts), make_inputs(num_objects))
        assert all(loss.isfinite() for loss in losses.values())
        assert all(g.isfinite().all() for g in gradients.values())
        assert (losses["loss_box_reg"] > 0) == (max(num_objects) > 0)

    @pytest.mark.parametrize("weight", [0.25, 3.0])
    def test_weight_of_the_box_loss(self, weight):
        plain = train_step(small_retinanet())[0]
        weighted = train_step(small_retinanet("MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT", weight))[0]
        assert weighted["loss_cls"] == plain["loss_cls"]
        torch.testing.assert_close(weighted["loss_box_reg"], plain["loss_box_reg"] * weight)

    @pytest.mark.parametrize("prior", [0.01, 0.3])
    def test_prior_is_what_a_new_model_predicts(self, prior):
        model = build_model(small_retinanet("MODEL.RETINANET.PRIOR_PROB", prior))
        torch.testing.assert_close(
            model.head.cls_score.bias.sigmoid(), torch.full_like(model.head.cls_score.bias, prior)
        )


class TestClassificationLosses:
    def cross_entropy(self, logits, labels):
        target = F.one_hot(labels, 11)[..., :10].to(logits)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none"), target

    def test_balanced_cross_entropy_is_focal_loss_with_gamma_0(self):
        opts = ["MODEL.RETINANET.CLS_LOSS_TYPE", "balanced_ce"]
        opts += ["MODEL.RETINANET.FOCAL_LOSS_ALPHA", 0.75]
        model, anchors, logits, deltas, labels, gt_boxes = one_level(*opts)
        losses = call_losses(model, anchors, logits, deltas, labels, gt_boxes)
        loss, target = self.cross_entropy(logits[labels >= 0], labels[labels >= 0])
        expected = (loss * (0.75 * target + 0.25 * (1 - target))).sum()
        num_positives = ((labels >= 0) & (labels < 10)).sum()
        torch.testing.assert_close(losses["loss_cls"], expected / (90 + num_positives / 10))

    @pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
    def test_focal_loss_has_a_finite_gradient_for_any_gamma(self, gamma):
        model, anchors, logits, *rest = one_level("MODEL.RETINANET.FOCAL_LOSS_GAMMA", gamma)
        logits = (logits * 30).requires_grad_()
        losses = call_losses(model, anchors, logits, *rest)
        (gradient,) = torch.autograd.grad(losses["loss_cls"], logits)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0

    @pytest.mark.parametrize("bound", [-1, 1])
    def test_ohem_trains_on_the_hardest(self, bound):
        opts = ["MODEL.RETINANET.CLS_LOSS_TYPE", "ohem", "MODEL.RETINANET.OHEM.NMS_THRESH", 1.0]
        opts += ["MODEL.RETINANET.OHEM.BATCH_SIZE_PER_IMAGE", 12]
        opts += ["MODEL.RETINANET.OHEM.NEGATIVE_POSITIVE_UB", bound]
        model, anchors, logits, deltas, labels, gt_boxes = one_level(*opts)
        labels[torch.rand(labels.shape) < 0.5] = 10  # half of them background
        losses = call_losses(model, anchors, logits, deltas, labels, gt_boxes)
        expected = 0.0
        for image, own in zip(logits, labels, strict=True):
            loss, _ = self.cross_entropy(image[own >= 0], own[own >= 0])
            hardest, order = loss.sum(dim=1).sort(descending=True)
            is_negative = own[own >= 0][order] == 10
            hardest, is_negative = hardest[:12], is_negative[:12]
            num_negatives = 12 if bound < 0 else max(1, int((~is_negative).sum())) * bound
            expected += hardest[~is_negative].sum() + hardest[is_negative][:num_negatives].sum()
        num_positives = ((labels >= 0) & (labels < 10)).sum()
        torch.testing.assert_close(losses["loss_cls"], expected / (90 + num_positives / 10))

    def test_ohem_leaves_out_what_overlaps_a_harder_one(self):
        anchors = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60], [0, 0, 9, 10]])
        losses = torch.tensor([3.0, 2.0, 1.0, 0.0])
        background = torch.ones(1, 4, dtype=torch.int64)  # whose loss grows with the logit
        loss = OhemLoss(batch_size_per_image=2, nms_thresh=0.5)
        chosen = loss.choose(losses.view(1, 4, 1), background, anchors)
        assert chosen.tolist() == [[1, -1, 1, -1]]

    def test_ohem_sees_every_image_on_its_own(self):
        opts = ["MODEL.RETINANET.CLS_LOSS_TYPE", "ohem"]
        model, anchors, logits, _, labels, _ = one_level(*opts)
        logits[1] *= 100  # much harder
        kept = model.cls_loss.choose(logits, labels, anchors.tensor) >= 0
        alone = model.cls_loss.choose(logits[:1], labels[:1], anchors.tensor) >= 0
        assert torch.equal(kept[0], alone[0]) and kept[0].any()


class TestBoxLosses:
    @pytest.mark.parametrize("reference", ["paper", "mmdet"])
    def test_balanced_l1_in_both_references(self, reference):
        opts = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1"]
        opts += ["MODEL.LIBRA.REFERENCE", reference]
        model, anchors, logits, deltas, labels, gt_boxes = one_level(*opts)
        losses = call_losses(model, anchors, logits, deltas, labels, gt_boxes)
        positive = (labels >= 0) & (labels < 10)
        expected = 0.0
        for i in range(2):
            target = model.box2box_transform.get_deltas(anchors.tensor, gt_boxes[i])
            expected += balanced_l1_loss(
                deltas[i][positive[i]],
                target[positive[i]],
                beta=0.11,
                reduction="sum",
                reference=reference,
            )
        torch.testing.assert_close(losses["loss_box_reg"], expected / (90 + positive.sum() / 10))

    @pytest.mark.parametrize("name", ["smooth_l1", "giou"])
    def test_detectron2s_losses(self, name):
        opts = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", name]
        opts += ["MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.2]
        model, anchors, logits, deltas, labels, gt_boxes = one_level(*opts, num_images=1)
        losses = call_losses(model, anchors, logits, deltas, labels, gt_boxes)
        positive = (labels[0] >= 0) & (labels[0] < 10)
        own, target = anchors.tensor[positive], gt_boxes[0, positive]
        if name == "smooth_l1":
            wanted = model.box2box_transform.get_deltas(own, target)
            expected = smooth_l1_loss(deltas[0, positive], wanted, beta=0.2, reduction="sum")
        else:
            boxes = model.box2box_transform.apply_deltas(deltas[0, positive], own)
            expected = giou_loss(boxes, target, reduction="sum")
        torch.testing.assert_close(losses["loss_box_reg"], expected / (90 + positive.sum() / 10))


class TestMmdetReference:
    MMDET = ("MODEL.LIBRA.REFERENCE", "mmdet")

    @pytest.mark.parametrize("bfp", [False, True])
    def test_p7_is_made_without_a_relu(self, bfp):
        opts = ["MODEL.BACKBONE.NAME", "build_bfp_backbone"] if bfp else []
        torch.manual_seed(0)
        paper = build_model(small_retinanet(*opts)).backbone
        torch.manual_seed(0)
        mmdet = build_model(small_retinanet(*opts, *self.MMDET)).backbone
        assert isinstance(paper.top_block, LastLevelP6P7)
        assert list(mmdet.state_dict()) == list(paper.state_dict())
        c5 = torch.randn(1, 40, 8, 8)
        (p6, p7), (expected_p6, with_relu) = mmdet.top_block(c5), paper.top_block(c5)
        assert torch.equal(p6, expected_p6)
        assert torch.equal(p7, mmdet.top_block.p7(p6)) and not torch.equal(p7, with_relu)

    @torch.no_grad()
    def test_boxes_are_clipped_before_nms(self):
        """Two boxes that overlap by little but, inside the image, by much."""
        anchors = [Boxes(torch.tensor([[-90.0, 0, 10, 10], [0, 0, 10, 10], [-30, -30, -20, -20]]))]
        scores = [torch.tensor([[0.9], [0.8], [0.7]])]
        deltas = [torch.zeros(3, 4)]
        found = {}
        for reference in ("paper", "mmdet"):
            model = build_model(small_retinanet("MODEL.LIBRA.REFERENCE", reference)).eval()
            found[reference] = model.inference_single_image(anchors, scores, deltas, (50, 50))
        assert len(found["paper"]) == 3
        assert len(found["mmdet"]) == 1
        assert found["mmdet"].pred_boxes.tensor.tolist() == [[0, 0, 10, 10]]

    @torch.no_grad()
    def test_detects(self):
        model = build_model(small_retinanet(*self.MMDET, "MODEL.RETINANET.PRIOR_PROB", 0.1)).eval()
        detections = model(make_inputs())[0]["instances"]
        assert len(detections) > 0 and detections.pred_boxes.nonempty().all()


@pytest.mark.parametrize("switch", [[], ["MODEL.RETINANET.MATCHER", "mutual_guidance"]])
def test_can_be_copied(switch):
    model = build_model(small_retinanet(*switch)).train()
    with EventStorage():
        losses = copy.deepcopy(model)(make_inputs())
    assert all(loss.isfinite() for loss in losses.values())


def test_parents_matcher_labels_where_no_switch_says_otherwise():
    model = build_model(small_retinanet())
    assert type(model.anchor_matcher) is Matcher and model.prediction_matcher is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls_loss", ["focal", "ohem"])
def test_trains_on_a_gpu_under_amp(dtype, cls_loss):
    opts = ["MODEL.RETINANET.MATCHER", "mutual_guidance", "MODEL.DEVICE", "cuda"]
    opts += ["MODEL.RETINANET.CLS_LOSS_TYPE", cls_loss]
    opts += ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1"]
    model = build_model(small_retinanet(*opts)).train()
    with EventStorage(), torch.autocast("cuda", dtype):
        losses = model(make_inputs())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("matcher", ["max_iou", "mutual_guidance"])
def test_trains_under_bfloat16_autocast(matcher):
    opts = ["MODEL.RETINANET.MATCHER", matcher, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1"]
    model = build_model(small_retinanet(*opts)).train()
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = model(make_inputs())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_a_pyramid_that_lacks_a_level():
    with pytest.raises(ValueError, match="IN_FEATURES names 'p7', a level .* does not have"):
        build_model(small_retinanet("MODEL.BACKBONE.NAME", "build_small_resnet_fpn_backbone"))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("MATCHER", "mutual_guidence", "did you mean 'mutual_guidance'.*max_iou"),
        ("CLS_LOSS_TYPE", "focl", "did you mean 'focal'.*balanced_ce, ohem"),
    ],
)
def test_unknown_names(key, value, match):
    with pytest.raises(ValueError, match=f"MODEL.RETINANET.{key} '{value}'.*{match}"):
        build_model(small_retinanet(f"MODEL.RETINANET.{key}", value))
