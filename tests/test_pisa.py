"""Samplers that look at predictions, ISR-P and CARL, in every kind of detector."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from toys import BASELINE, make_inputs, small_config, small_retinanet, train_step

from libra_d2.losses import carl_loss
from libra_d2.modeling import OhemSampler, SamplingMatcher
from libra_d2.modeling.samplers import Predictions
from libra_d2.ranking import hierarchical_local_rank, importance_weights

ISR_P = ("MODEL.PISA.ISR_POSITIVE.ENABLED", True)
CARL = ("MODEL.PISA.CARL.ENABLED", True)
ISR_N = ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "score_hlr")
OHEM = ("MODEL.ROI_HEADS.POSITIVE_SAMPLER", "ohem", "MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem")
CASCADE = ("MODEL.ROI_HEADS.NAME", "LibraCascadeROIHeads")
CASCADE += ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
FEW = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32)


def as_proposals(inputs, num_proposals=200):
    """Random proposals, some of them near the ground truths."""
    generator = torch.Generator().manual_seed(5)
    proposals = []
    for x in inputs:
        targets = x["instances"]
        boxes = torch.rand(num_proposals, 4, generator=generator) * 60
        boxes[:, 2:] += boxes[:, :2] + 1
        if len(targets):
            near = num_proposals // 3
            boxes[:near] = targets.gt_boxes.tensor[torch.arange(near) % len(targets)]
            boxes[:near] += torch.randn(near, 4, generator=generator) * 3
            boxes[:near, 2:] = torch.maximum(boxes[:near, 2:], boxes[:near, :2] + 1)
        image = Instances(targets.image_size)
        image.proposal_boxes = Boxes(boxes)
        image.objectness_logits = torch.zeros(num_proposals)
        proposals.append(image)
    return proposals


def run_heads(*opts, num_objects=(3, 0, 2), seed=0):
    """ROI heads with large random weights, and what they sample and lose on random proposals."""
    torch.manual_seed(seed)
    model = build_model(small_config(BASELINE, *opts)).train()
    heads = model.roi_heads
    for parameter in heads.parameters():
        parameter.data.mul_(5)
    inputs = make_inputs(num_objects)
    generator = torch.Generator().manual_seed(1)
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    shape = (len(inputs), 64)
    features = {
        name: torch.randn(*shape, 96 // s, 128 // s, generator=generator)
        for name, s in strides.items()
    }
    proposals, targets = as_proposals(inputs), [x["instances"] for x in inputs]
    torch.manual_seed(2)
    with EventStorage() as storage:
        sampled, losses = heads(None, features, copy.deepcopy(proposals), targets)
    logged = {k: v for k, (v, _) in storage.latest().items()}
    return heads, features, proposals, targets, sampled, losses, logged


def predict(heads, features, boxes):
    """Logits and deltas of boxes, a list of (P, 4) an image."""
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], list(map(Boxes, boxes)))
    return heads.box_predictor(heads.box_head(pooled))


def sampled_positions(image, candidates):
    """Which of the candidates were sampled, as a mask; no two of them are the same box."""
    equal = (image.proposal_boxes.tensor[:, None] == candidates[None]).all(dim=2)
    assert (equal.sum(dim=1) == 1).all()
    return equal.any(dim=0)


class TestOhem:
    @torch.no_grad()
    def test_trains_on_the_largest_losses_of_positives_and_negatives(self):
        heads, features, proposals, targets, sampled, _, _ = run_heads(*OHEM, *FEW)
        candidates = [
            torch.cat([p.proposal_boxes.tensor, t.gt_boxes.tensor])
            for p, t in zip(proposals, targets, strict=True)
        ]
        logits, _ = predict(heads, features, candidates)
        logits = logits.split([len(c) for c in candidates])
        for image, gt, boxes, own in zip(sampled, targets, candidates, logits, strict=True):
            kept = sampled_positions(image, boxes)
            classes = torch.full((len(boxes),), 10)
            if len(gt):
                ious, indices = pairwise_iou(gt.gt_boxes, Boxes(boxes)).max(dim=0)
                classes[ious >= 0.5] = gt.gt_classes[indices[ious >= 0.5]]
            losses = F.cross_entropy(own, classes, reduction="none")
            num_positives = min(8, int((classes < 10).sum()))
            for candidate, number in (
                (classes < 10, num_positives),
                (classes == 10, 32 - num_positives),
            ):
                assert (kept & candidate).sum() == number
                chosen, left = losses[kept & candidate], losses[candidate & ~kept]
                if len(chosen) and len(left):
                    assert chosen.min() >= left.max()

    def test_one_kind_alone(self):
        sampled = run_heads(*OHEM[:2], *FEW)[4]
        assert [len(image) for image in sampled] == [32, 32, 32]


class TestIsrN:
    @torch.no_grad()
    def test_weighs_the_negatives_and_keeps_their_loss(self):
        heads, features, _, _, sampled, _, _ = run_heads(*ISR_N, *FEW)
        for i, image in enumerate(sampled):
            negative = image.gt_classes == 10
            assert len(image) == 32 and (image.loss_weights[~negative] == 1).all()
            single = {k: v[i : i + 1] for k, v in features.items()}
            logits, _ = predict(heads, single, [image.proposal_boxes.tensor])
            losses = F.cross_entropy(logits, image.gt_classes, reduction="none")[negative]
            weights = image.loss_weights[negative]
            torch.testing.assert_close((losses * weights).sum(), losses.sum(), rtol=1e-4, atol=1e-4)
            # Without another negative the cluster's best is the heaviest of it.
            assert weights.unique().numel() > 5

    @torch.no_grad()
    def test_the_loss_is_by_weight(self):
        heads, features, _, _, sampled, losses, _ = run_heads(*ISR_N, *FEW)
        logits, _ = predict(heads, features, [x.proposal_boxes.tensor for x in sampled])
        classes = torch.cat([x.gt_classes for x in sampled])
        weights = torch.cat([x.loss_weights for x in sampled])
        expected = (F.cross_entropy(logits, classes, reduction="none") * weights).mean()
        torch.testing.assert_close(losses["loss_cls"], expected)


class TestPredictionsOfCandidates:
    @pytest.mark.parametrize("opts", [OHEM, ISR_N, (*OHEM, *CASCADE)])
    def test_leave_no_trace(self, opts):
        """Random state and batch-norm statistics are those of a run without the extra pass."""
        norm = ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16]
        norm += ["MODEL.ROI_BOX_HEAD.NORM", "BN"]
        torch.manual_seed(0)
        heads = build_model(small_config(BASELINE, *opts, *norm)).train().roi_heads
        inputs = make_inputs((2, 1))
        features = {f"p{i}": torch.randn(2, 64, 96 >> i, 128 >> i) for i in (2, 3, 4, 5)}
        before = copy.deepcopy(heads.state_dict())
        state = torch.get_rng_state()
        proposals, targets = as_proposals(inputs), [x["instances"] for x in inputs]
        predictions = heads._take_predictions(*heads._add_predictions(features, proposals, targets))
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(heads.state_dict(), before, rtol=0, atol=0)
        assert [len(p.logits) for p in predictions] == [202, 201]
        assert not any(p.logits.requires_grad for p in predictions)

    def test_are_those_of_the_highest_scoring_class(self):
        heads, features, proposals, targets, *_ = run_heads(*ISR_N, num_objects=(2,))
        with torch.no_grad():
            (image,) = heads._take_predictions(
                *heads._add_predictions(features, proposals, targets)
            )
            boxes = torch.cat([proposals[0].proposal_boxes.tensor, targets[0].gt_boxes.tensor])
            logits, deltas = predict(heads, features, [boxes])
        best = logits[:, :10].argmax(dim=1)
        own = deltas.view(-1, 10, 4)[torch.arange(len(boxes)), best]
        expected = heads.box_predictor.box2box_transform.apply_deltas(own, boxes)
        torch.testing.assert_close(image.boxes, expected)
        torch.testing.assert_close(image.logits, logits)

    @pytest.mark.parametrize("append_gt", [True, False])
    def test_follow_the_proposals_also_without_appended_ground_truths(self, append_gt):
        opts = ["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", append_gt]
        sampled = run_heads(*ISR_N, *FEW, *opts)[4]
        assert all(image.has("loss_weights") and len(image) == 32 for image in sampled)
        assert not any(image.has("candidate") for image in sampled)

    def test_of_an_earlier_batch_are_not_used_again(self):
        matcher = SamplingMatcher(
            Matcher([0.5], [0, 1]),
            negative_sampler=OhemSampler(),
            batch_size_per_image=8,
            positive_fraction=0.5,
        )
        image = Predictions(torch.zeros(3, 11), torch.zeros(3, 4), torch.zeros(1).long())
        with matcher.of([image]):
            matcher(torch.zeros(1, 3))
            with pytest.raises(ValueError, match="nothing is predicted for this one"):
                matcher(torch.zeros(1, 3))
        with pytest.raises(ValueError, match="OhemSampler.* look at what the box head predicts"):
            matcher(torch.zeros(1, 3))

    def test_of_another_image_are_refused(self):
        matcher = SamplingMatcher(
            Matcher([0.5], [0, 1]),
            positive_sampler=OhemSampler(),
            batch_size_per_image=8,
            positive_fraction=0.5,
        )
        image = Predictions(torch.zeros(4, 11), torch.zeros(4, 4), torch.zeros(1).long())
        with matcher.of([image]), pytest.raises(ValueError, match="image 0 .* 3 candidates"):
            matcher(torch.zeros(1, 3))

    @pytest.mark.parametrize("opts", [OHEM, ISR_N, (*OHEM, *CASCADE)])
    def test_two_forward_passes_before_one_backward(self, opts):
        """Also where the extra pass goes through batch norm that is trained."""
        norm = ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16]
        norm += ["MODEL.ROI_BOX_HEAD.NORM", "BN"]
        torch.manual_seed(0)
        model = build_model(small_config(BASELINE, *opts, *norm)).train()
        with EventStorage():
            losses = [*model(make_inputs((2, 1))).values(), *model(make_inputs((1, 2))).values()]
        sum(losses).backward()
        assert model.roi_heads.state_dict()  # and nothing was left behind
        assert all(p.grad.isfinite().all() for p in model.roi_heads.parameters())

    def test_heads_that_are_asked_to_sample_alone(self):
        """Without predictions only samplers that need none can: nothing is made up."""
        heads, features, proposals, targets, *_ = run_heads(*OHEM, *FEW)
        with EventStorage(), pytest.raises(ValueError, match="look at what the box head predicts"):
            heads.label_and_sample_proposals(proposals, targets)
        with EventStorage():
            sampled = heads.label_and_sample_proposals(
                *heads._add_predictions(features, proposals, targets)
            )
        assert [len(image) for image in sampled] == [32, 32, 32]


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
