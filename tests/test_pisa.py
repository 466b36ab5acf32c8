"""ISR-P and CARL, in every kind of detector."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import EventStorage
from heads import CARL, CASCADE, FEW, ISR_N, ISR_P, OHEM, as_proposals, predict, run_heads
from torch.nn import functional as F
from toys import BASELINE, make_inputs, small_config, small_retinanet, train_step

from libra_d2.losses import carl_loss
from libra_d2.modeling import SamplingMatcher
from libra_d2.ranking import hierarchical_local_rank, importance_weights


class TestIsrP:
    def expected(self, heads, features, sampled):
        """Logits, classes and ISR-P weights from the definition, class by class."""
        logits, deltas = predict(heads, features, [x.proposal_boxes.tensor for x in sampled])
        classes = torch.cat([x.gt_classes for x in sampled])
        losses = F.cross_entropy(logits, classes, reduction="none")
        positive = (classes < 10).nonzero().squeeze(1)
        boxes = torch.cat([x.proposal_boxes.tensor for x in sampled])[positive]
        own = deltas.view(len(deltas), -1, 4)[positive, classes[positive]]
        pred = heads.box_predictor.box2box_transform.apply_deltas(own, boxes)
        with_gt = [x for x in sampled if x.has("gt_boxes")]
        gt_boxes = torch.cat([x.gt_boxes.tensor[x.gt_classes < 10] for x in with_gt])
        gts = torch.cat([x.gt_indices[x.gt_classes < 10] + 100 * i for i, x in enumerate(with_gt)])
        ious = matched_pairwise_iou(Boxes(pred), Boxes(gt_boxes))
        weights = torch.ones_like(losses)
        most = classes[positive].bincount().max()
        for c in classes[positive].unique():
            slots = classes[positive] == c
            ranks = hierarchical_local_rank(ious[slots], gts[slots])
            weights[positive[slots]] = importance_weights(ranks, most, k=2.0, bias=0.0)
        total = losses[positive].sum()
        weights[positive] *= total / (weights * losses)[positive].sum()
        return losses, weights, total

    @torch.no_grad()
    def test_two_stage(self):
        heads, features, _, _, sampled, got, logged = run_heads(*ISR_P)
        losses, weights, total = self.expected(heads, features, sampled)
        torch.testing.assert_close(got["loss_cls"], (losses * weights).mean())
        assert logged["pisa/isr_p_before"] == pytest.approx(total.item(), rel=1e-5)
        assert logged["pisa/isr_p_after"] == pytest.approx(total.item(), rel=1e-5)
        plain = run_heads()[5]["loss_cls"]
        torch.testing.assert_close(got["loss_cls"], plain)  # the sum is the same; gradients not

    def test_changes_gradients_and_with_bias_1_nothing(self):
        def gradient(*opts):
            heads, *_, losses, _ = run_heads(*opts)
            losses["loss_cls"].backward()
            return heads.box_predictor.cls_score.weight.grad

        plain = gradient()
        assert not torch.allclose(gradient(*ISR_P), plain)
        unbiased = gradient(*ISR_P, "MODEL.PISA.ISR_POSITIVE.BIAS", 1.0)
        torch.testing.assert_close(unbiased, plain)

    @torch.no_grad()
    def test_with_weights_of_the_sampler(self):
        _, _, _, _, _, losses, logged = run_heads(*ISR_P, *ISR_N, *FEW)
        assert losses["loss_cls"].isfinite()
        assert logged["pisa/isr_p_before"] == pytest.approx(logged["pisa/isr_p_after"], rel=1e-5)

    def test_retinanet(self):
        """Against the definition, on one level of random anchors."""
        torch.manual_seed(0)
        model = build_model(small_retinanet(*ISR_P, *CARL)).train()
        plain = build_model(small_retinanet()).train()
        generator = torch.Generator().manual_seed(3)
        corner = torch.rand(60, 2, generator=generator) * 60
        anchors = torch.cat([corner, corner + 20], dim=1)
        gts = torch.rand(2, 4, 4, generator=generator) * 30 + torch.tensor([0.0, 0, 40, 40])
        gt_of = torch.randint(4, (2, 60), generator=generator)
        classes = torch.tensor([[1, 2, 1, 10], [1, 1, 5, 10]])
        labels = classes.gather(1, gt_of)
        gt_boxes = gts.gather(1, gt_of[..., None].expand(-1, -1, 4))
        logits = torch.randn(2, 60, 10, generator=generator)
        deltas = torch.randn(2, 60, 4, generator=generator) * 0.3
        args = ([Boxes(anchors)], [logits], list(labels), [deltas], list(gt_boxes))
        with EventStorage() as storage:
            got, expected = model.losses(*args), plain.losses(*args)
        torch.testing.assert_close(got["loss_cls"], expected["loss_cls"])
        logged = {k: v for k, (v, _) in storage.latest().items()}
        assert logged["pisa/isr_p_before"] == pytest.approx(logged["pisa/isr_p_after"], rel=1e-5)
        with EventStorage():
            weights = model.classification_weights(anchors, logits, labels, deltas, gt_boxes)
        assert (weights[labels == 10] == 1).all()
        positive = labels < 10
        pred = torch.stack([model.box2box_transform.apply_deltas(d, anchors) for d in deltas])
        ious = matched_pairwise_iou(Boxes(pred[positive]), Boxes(gt_boxes[positive]))
        groups = (gt_of + torch.tensor([[0], [10]]))[positive]
        most = labels[positive].bincount().max()
        wanted = torch.zeros(int(positive.sum()))
        for c in labels[positive].unique():
            slots = labels[positive] == c
            ranks = hierarchical_local_rank(ious[slots], groups[slots])
            wanted[slots] = importance_weights(ranks, most, k=2.0, bias=0.0)
        ratio = weights[positive] / wanted
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        # CARL with the same normalizer as the box loss.
        target = torch.stack([model.box2box_transform.get_deltas(anchors, g) for g in gt_boxes])
        box_losses = (deltas - target).abs()[positive]  # beta 0: plain L1
        probs = logits[positive].sigmoid()[torch.arange(len(box_losses)), labels[positive]]
        carl = carl_loss(probs, box_losses, normalizer=model.loss_normalizer)
        torch.testing.assert_close(got["loss_carl"], carl)


class TestCarl:
    @pytest.mark.parametrize("agnostic", [True, False])
    def test_two_stage(self, agnostic):
        opts = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic]
        heads, features, _, _, sampled, losses, _ = run_heads(*CARL, *opts)
        logits, deltas = predict(heads, features, [x.proposal_boxes.tensor for x in sampled])
        classes = torch.cat([x.gt_classes for x in sampled])
        positive = (classes < 10).nonzero().squeeze(1)
        boxes = torch.cat([x.proposal_boxes.tensor for x in sampled])[positive]
        gts = torch.cat(
            [x.gt_boxes.tensor[x.gt_classes < 10] for x in sampled if x.has("gt_boxes")]
        )
        own = deltas[positive] if agnostic else deltas.view(-1, 10, 4)[positive, classes[positive]]
        target = heads.box_predictor.box2box_transform.get_deltas(boxes, gts)
        probs = logits.softmax(dim=1)[positive, classes[positive]]
        expected = carl_loss(probs, (own - target).abs(), normalizer=len(classes))
        torch.testing.assert_close(losses["loss_carl"], expected)
        (gradient,) = torch.autograd.grad(losses["loss_carl"], heads.box_predictor.cls_score.weight)
        assert gradient.abs().sum() > 0  # classification learns from regression

    def test_a_box_loss_of_a_subclass_stays(self, monkeypatch):
        def seven(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
            return 7 + 0 * pred_deltas.sum()

        heads, features, proposals, targets, *_ = run_heads(*CARL)
        own = type("Own", (type(heads.box_predictor),), {"box_reg_loss": seven})
        heads.box_predictor.__class__ = own
        with EventStorage():
            losses = heads(None, features, copy.deepcopy(proposals), targets)[1]
        assert losses["loss_box_reg"] == 7 and losses["loss_carl"] > 0

    def test_leaves_the_other_losses_alone(self):
        plain, carl = run_heads()[5], run_heads(*CARL)[5]
        assert all(plain[name] == carl[name] for name in plain) and "loss_carl" in carl


class TestCascade:
    def test_at_defaults_it_is_its_parent_bit_for_bit(self):
        opts = [*CASCADE, "MODEL.MASK_ON", False]
        plain = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN"]
        losses, gradients, _, model = train_step(small_config(BASELINE, *opts))
        expected = train_step(small_config(BASELINE, *opts, *plain))
        assert type(model.roi_heads).__name__ == "LibraCascadeROIHeads"
        torch.testing.assert_close(losses, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(gradients, expected[1], rtol=0, atol=0)

    @pytest.mark.parametrize("sampler", [OHEM, ISR_N])
    def test_samples_in_its_first_stage_and_reweighs_in_all(self, sampler):
        opts = [*CASCADE, *sampler, *ISR_P, *CARL, *FEW]
        opts += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balanced_l1"]
        losses, gradients, logged, model = train_step(small_config(BASELINE, *opts))
        matchers = model.roi_heads.proposal_matchers
        assert [type(m).__name__ for m in matchers] == ["Matcher"] * 3
        assert isinstance(model.roi_heads.proposal_matcher, SamplingMatcher)
        for stage in range(3):
            for name in ("loss_cls", "loss_box_reg", "loss_carl"):
                assert losses[f"{name}_stage{stage}"].isfinite()
            before = logged[f"stage{stage}/pisa/isr_p_before"]
            after = logged[f"stage{stage}/pisa/isr_p_after"]
            assert before == pytest.approx(after, rel=1e-5)
            assert gradients[f"roi_heads.box_predictor.{stage}.cls_score.weight"].abs().sum() > 0
        assert logged["roi_head/num_fg_samples"] + logged["roi_head/num_bg_samples"] == 32

    def test_stages_have_the_weights_of_their_own_boxes(self):
        torch.manual_seed(0)
        heads = build_model(small_config(BASELINE, *CASCADE)).roi_heads
        weights = [p.box2box_transform.weights for p in heads.box_predictor]
        assert [w[0] for w in weights] == [10.0, 20.0, 30.0]


class TestOtherHeads:
    @pytest.mark.parametrize("sampler", [OHEM, ISR_N])
    def test_masks_and_keypoints_train_on_the_chosen(self, sampler, monkeypatch):
        opts = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
        torch.manual_seed(0)
        heads = build_model(small_config(BASELINE, *opts, *sampler, *FEW)).train().roi_heads
        seen = []
        monkeypatch.setattr(heads, "_forward_mask", lambda f, p: seen.append(p) or {})
        inputs = make_inputs((3, 1))
        features = {f"p{i}": torch.randn(2, 64, 96 >> i, 128 >> i) for i in (2, 3, 4, 5)}
        with EventStorage():
            sampled, _ = heads(
                None, features, as_proposals(inputs), [x["instances"] for x in inputs]
            )
        assert seen[0] is sampled and all(len(x) == 32 for x in sampled)


def test_no_objects_train():
    for opts in ((*OHEM, *ISR_P), (*ISR_N, *ISR_P, *CARL), (*CASCADE, *ISR_N, *ISR_P, *CARL)):
        losses, gradients, _, _ = train_step(small_config(BASELINE, *opts), make_inputs((0, 0)))
        assert all(loss.isfinite() for loss in losses.values())
        assert all(g.isfinite().all() for g in gradients.values())
    losses, gradients, _, _ = train_step(small_retinanet(*ISR_P, *CARL), make_inputs((0, 0)))
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_carl"] == 0
    assert all(g.isfinite().all() for g in gradients.values())
