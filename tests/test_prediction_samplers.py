"""Samplers that look at predictions, and the predictions that they see."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from heads import (
    CASCADE,
    FEW,
    ISR_N,
    OHEM,
    as_proposals,
    predict,
    run_heads,
    sampled_positions,
)
from torch.nn import functional as F
from toys import BASELINE, make_inputs, small_config

from libra_d2.modeling import OhemSampler, SamplingMatcher, ScoreHlrSampler
from libra_d2.modeling.samplers import Matches, Predictions


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

    def test_isr_n_leaves_the_weights_of_others(self):
        matches = Matches(
            ious=torch.tensor([0.9, 0.1, 0.2]),
            gt_indices=torch.zeros(3).long(),
            labels=torch.tensor([1, 0, 0], dtype=torch.int8),
            predictions=Predictions(torch.zeros(3, 11), torch.rand(3, 4), torch.zeros(1).long()),
            weights=torch.tensor([3.0, 1.0, 1.0]),
        )
        kept = ScoreHlrSampler()(matches, matches.labels == 0, 1)
        assert kept.sum() == 1 and matches.weights[0] == 3.0

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
