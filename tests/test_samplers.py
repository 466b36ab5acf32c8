"""Samplers at the matcher's seam: what is kept, and what is left to detectron2."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from toys import BASELINE, small_config

from libra_d2.modeling import IouBalancedSampler, SamplingMatcher

BALANCED = ("instance_balanced", "iou_balanced")


def make_matcher(positive="instance_balanced", negative="iou_balanced", *opts):
    cfg = small_config(
        BASELINE,
        *("MODEL.ROI_HEADS.POSITIVE_SAMPLER", positive),
        *("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", negative),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 40),
        *opts,
    )
    matcher = build_model(cfg).roi_heads.proposal_matcher
    assert isinstance(matcher, SamplingMatcher)
    return matcher


def keep_first(candidates, number):
    return candidates & (candidates.cumsum(0) <= number)


class TestSamplingMatcher:
    def ious(self):
        generator = torch.Generator().manual_seed(0)
        ious = torch.rand(3, 500, generator=generator) ** 3
        ious[:, -1] = torch.tensor([1.0, 0.0, 0.0])  # an appended ground truth
        return ious

    def test_keeps_a_sample_and_ignores_the_rest(self):
        ious = self.ious()
        gt_indices, labels = make_matcher()(ious)
        expected_indices, expected_labels = Matcher([0.5], [0, 1])(ious)
        assert torch.equal(gt_indices, expected_indices) and labels.dtype == expected_labels.dtype
        assert (labels == 1).sum() == 10 and (labels == 0).sum() == 30
        chosen = labels >= 0
        assert torch.equal(labels[chosen], expected_labels[chosen])
        per_gt = gt_indices[labels == 1].bincount(minlength=3)
        assert per_gt.max() <= round(10 / 3) + 1

    def test_few_positives_leave_room_for_negatives(self):
        ious = self.ious().clamp(max=0.45)
        ious[0, :4] = 0.8
        _, labels = make_matcher()(ious)
        assert (labels == 1).sum() == 4 and (labels == 0).sum() == 36

    def test_negatives_fill_up_what_a_positive_sampler_leaves(self):
        matcher = SamplingMatcher(
            Matcher([0.5], [0, 1]),
            positive_sampler=lambda matches, candidates, num_samples: keep_first(candidates, 2),
            negative_sampler=IouBalancedSampler(),
            batch_size_per_image=40,
            positive_fraction=0.25,
        )
        _, labels = matcher(self.ious())
        assert (labels == 1).sum() == 2 and (labels == 0).sum() == 38
        matcher.negative_positive_ub = 5
        _, labels = matcher(self.ious())
        assert (labels == 1).sum() == 2 and (labels == 0).sum() == 10

    def test_weights_that_nothing_reads_are_refused(self):
        def weigh(matches, candidates, num_samples):
            matches.weights = torch.full(candidates.shape, 3.0)
            return keep_first(candidates, num_samples)

        matcher = SamplingMatcher(
            Matcher([0.5], [0, 1]),
            positive_sampler=weigh,
            batch_size_per_image=40,
            positive_fraction=0.25,
        )
        with matcher.of([]) as weights:
            matcher(self.ious())
        assert (weights[0] == 3.0).all()
        with pytest.raises(ValueError, match="nothing here reads the weights"):
            matcher(self.ious())

    @pytest.mark.parametrize(("reference", "high"), [("paper", 0.5), ("mmdet", 1.0)])
    def test_bins_span_the_range_of_the_reference(self, reference, high):
        ious = torch.zeros(1, 400)
        ious[0, :200], ious[0, 200:220], ious[0, -1] = 0.05, 0.4, 1.0
        _, labels = make_matcher("random", "iou_balanced", "MODEL.LIBRA.REFERENCE", reference)(ious)
        # N = 39 and K = 3: a quota of 13 from the bin of 0.4, which mmdet's ranges make the second.
        num_high = (labels[200:220] == 0).sum()
        assert 13 <= num_high <= 20 and (labels[:400] == 0).sum() == 39
        first_bin = (labels[:200] == 0).sum() + (labels[220:] == 0).sum()
        assert first_bin == 39 - num_high

    def test_random_leaves_a_kind_to_detectron2(self):
        ious = self.ious()
        _, expected = Matcher([0.5], [0, 1])(ious)
        _, labels = make_matcher("random", "iou_balanced")(ious)
        assert torch.equal(labels == 1, expected == 1) and (labels == 0).sum() == 30
        _, labels = make_matcher("instance_balanced", "random")(ious)
        assert torch.equal(labels == 0, expected == 0) and (labels == 1).sum() == 10

    @pytest.mark.parametrize("reference", ["paper", "mmdet"])
    def test_without_ground_truths(self, reference):
        matcher = make_matcher(
            "instance_balanced", "iou_balanced", "MODEL.LIBRA.REFERENCE", reference
        )
        gt_indices, labels = matcher(torch.zeros(0, 100))
        assert (labels == 0).sum() == 40 and (labels == -1).sum() == 60
        assert torch.equal(gt_indices, torch.zeros(100, dtype=torch.int64))

    @pytest.mark.parametrize("reference", ["paper", "mmdet"])
    def test_without_candidates(self, reference):
        matcher = make_matcher(
            "instance_balanced", "iou_balanced", "MODEL.LIBRA.REFERENCE", reference
        )
        for num_gts in (0, 2):
            gt_indices, labels = matcher(torch.zeros(num_gts, 0))
            assert len(gt_indices) == len(labels) == 0

    def test_ignored_stay_ignored(self):
        matcher = make_matcher(
            "instance_balanced",
            "iou_balanced",
            *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.5]),
            *("MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1]),
        )
        ious = self.ious()
        _, labels = matcher(ious)
        between = (ious.amax(0) >= 0.3) & (ious.amax(0) < 0.5)
        assert (labels[between] == -1).all() and (labels == 0).sum() == 30

    @pytest.mark.parametrize(
        ("key", "value", "nearest"),
        [
            ("POSITIVE_SAMPLER", "instance_balnced", "instance_balanced"),
            ("NEGATIVE_SAMPLER", "iou", ""),
        ],
    )
    def test_unknown_sampler(self, key, value, nearest):
        with pytest.raises(ValueError, match=f"MODEL.ROI_HEADS.{key} '{value}'.*{nearest}.*random"):
            build_model(small_config(BASELINE, f"MODEL.ROI_HEADS.{key}", value))
