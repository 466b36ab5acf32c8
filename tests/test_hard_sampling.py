"""Hard examples: the largest losses, with and without NMS."""

import pytest
import torch
from torchvision.ops import box_iou, nms

from libra_d2.sampling import sample_hard, sample_hard_nms, sample_score_hlr_negatives


class TestSampleHard:
    def test_keeps_the_largest_losses_of_the_candidates(self):
        losses = torch.tensor([0.5, 3.0, 1.0, 2.0, 9.0])
        candidates = torch.tensor([True, True, True, True, False])
        kept = sample_hard(losses, candidates, 2)
        assert kept.tolist() == [False, True, False, True, False]

    @pytest.mark.parametrize("num_samples", [0, 3, 4, 100])
    def test_counts(self, num_samples):
        candidates = torch.tensor([True, False, True, True, True])
        kept = sample_hard(torch.rand(5), candidates, num_samples)
        assert kept.sum() == min(num_samples, 4) and not (kept & ~candidates).any()

    def test_rows_with_numbers_of_their_own(self, generator):
        losses = torch.rand(2, 3, 50, generator=generator)
        candidates = torch.rand(2, 3, 50, generator=generator) < 0.5
        numbers = torch.tensor([[0, 5, 10], [50, 1, 2]])
        kept = sample_hard(losses, candidates, numbers)
        for i in range(2):
            for j in range(3):
                own = losses[i, j][candidates[i, j]].sort(descending=True).values
                n = min(int(numbers[i, j]), len(own))
                assert torch.equal(losses[i, j][kept[i, j]].sort(descending=True).values, own[:n])

    def test_of_equal_losses_the_first(self):
        kept = sample_hard(torch.ones(5), torch.ones(5, dtype=torch.bool), 2)
        assert kept.tolist() == [True, True, False, False, False]

    def test_infinite_losses_are_losses(self):
        losses = torch.tensor([float("inf"), -float("inf"), 0.0])
        assert sample_hard(losses, torch.ones(3, dtype=torch.bool), 3).all()

    @pytest.mark.parametrize("shape", [(0,), (2, 0)])
    def test_empty(self, shape):
        assert (
            sample_hard(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), 3).shape == shape
        )

    @pytest.mark.parametrize(
        ("losses", "candidates", "num_samples", "match"),
        [
            (torch.zeros(3), torch.zeros(3), 1, "must be a bool mask"),
            (torch.zeros(2), torch.zeros(3, dtype=torch.bool), 1, "losses must have the shape"),
            (torch.zeros(3), torch.zeros(3, dtype=torch.bool), -1, "must not be negative"),
        ],
    )
    def test_bad_input(self, losses, candidates, num_samples, match):
        with pytest.raises(ValueError, match=match):
            sample_hard(losses, candidates, num_samples)


def crowd(generator, n=400):
    corner = torch.rand(n, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 10 + torch.rand(n, 2, generator=generator) * 10], dim=1)
    candidates = torch.rand(n, generator=generator) < 0.8
    return torch.rand(n, generator=generator), boxes, candidates


class TestSampleHardNms:
    @pytest.mark.parametrize("num_samples", [0, 1, 4, 16, 1000])
    @pytest.mark.parametrize("nms_thresh", [0.3, 0.7])
    def test_is_the_beginning_of_nms_over_all(self, generator, num_samples, nms_thresh):
        """Also where it has to look at more of the ranking than at first."""
        losses, boxes, candidates = crowd(generator)
        slots = candidates.nonzero().squeeze(1)
        expected = slots[nms(boxes[slots], losses[slots], nms_thresh)][:num_samples]
        kept = sample_hard_nms(losses, boxes, candidates, num_samples, nms_thresh=nms_thresh)
        assert torch.equal(kept.nonzero().squeeze(1), expected.sort().values)

    def test_without_overlap_is_sample_hard(self, generator):
        losses, _, candidates = crowd(generator)
        corner = torch.arange(400.0).unsqueeze(1).expand(-1, 2) * 10
        boxes = torch.cat([corner, corner + 5], dim=1)
        kept = sample_hard_nms(losses, boxes, candidates, 20, nms_thresh=0.5)
        assert torch.equal(kept, sample_hard(losses, candidates, 20))

    def test_nothing_to_choose_from(self):
        none = torch.zeros(4, dtype=torch.bool)
        kept = sample_hard_nms(torch.rand(4), torch.rand(4, 4), none, 2, nms_thresh=0.5)
        assert not kept.any()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="boxes must have the shape"):
            mask = torch.ones(3, dtype=torch.bool)
            sample_hard_nms(torch.zeros(3), torch.zeros(2, 4), mask, 1, nms_thresh=0.5)


def plain_score_hlr(scores, boxes, candidates, num_samples, score_thresh=0.05, nms_thresh=0.5):
    """Clusters, ranks and numbers step by step: ranks of the valid, in their order."""
    valid = (candidates & (scores > score_thresh)).nonzero().squeeze(1)
    left = valid[scores[valid].argsort(descending=True)].tolist()
    entries = []
    while left:
        leader = left[0]
        ious = box_iou(boxes[leader : leader + 1], boxes[left])[0]
        cluster = [i for i, iou in zip(left, ious.tolist(), strict=True) if iou >= nms_thresh]
        entries += [(place, -scores[i].item(), i) for place, i in enumerate(cluster)]
        left = [i for i in left if i not in cluster]
    return [i for _, _, i in sorted(entries)]


class TestScoreHlr:
    @pytest.mark.parametrize("num_samples", [0, 5, 60, 1000])
    @pytest.mark.parametrize("seed", range(3))
    def test_against_a_plain_loop(self, seed, num_samples):
        generator = torch.Generator().manual_seed(seed)
        scores, boxes, candidates = crowd(generator, 200)
        scores = scores**3
        ranking = plain_score_hlr(scores, boxes, candidates, num_samples)
        kept, weights = sample_score_hlr_negatives(
            scores, boxes, candidates, num_samples, k=0.5, generator=generator
        )
        num_kept = min(num_samples, int(candidates.sum()))
        assert kept.sum() == num_kept and not (kept & ~candidates).any()
        assert kept[ranking[:num_samples]].all()
        up_bound = max(num_kept, len(ranking))
        expected = torch.zeros(200)
        chosen = ranking[:num_samples]
        u = [(up_bound - rank) / up_bound for rank in range(len(chosen))]
        expected[kept] = min(u, default=1.0) ** 0.5
        expected[chosen] = torch.tensor(u) ** 0.5
        torch.testing.assert_close(weights, expected)

    def test_looks_at_no_more_of_a_crowd_than_its_ranks_need(self, generator, monkeypatch):
        """Time and memory of NMS grow with the square of what it looks at."""
        looked_at = []

        def counting(boxes, *args):
            looked_at.append(len(boxes))
            return nms(boxes, *args)

        monkeypatch.setattr("libra_d2.sampling.hard.nms", counting)
        corner = torch.rand(4000, 2, generator=generator) * 1000
        boxes = torch.cat([corner, corner + 60], dim=1)
        scores = torch.rand(4000, generator=generator) + 0.1
        every = torch.ones(4000, dtype=torch.bool)
        sample_score_hlr_negatives(scores, boxes, every, 50)
        assert max(looked_at) <= 400

    def test_the_best_of_each_cluster_come_first(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [50, 50, 60, 59]])
        scores = torch.tensor([0.9, 0.8, 0.3, 0.2])
        every = torch.ones(4, dtype=torch.bool)
        kept, weights = sample_score_hlr_negatives(scores, boxes, every, 2, k=1.0)
        assert kept.tolist() == [True, False, True, False]
        assert weights.tolist() == [1.0, 0.0, 0.75, 0.0]

    def test_an_overlap_of_just_the_threshold_joins(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]])
        scores = torch.tensor([0.9, 0.8, 0.7])
        every = torch.ones(3, dtype=torch.bool)
        kept, _ = sample_score_hlr_negatives(scores, boxes, every, 2, nms_thresh=0.5)
        assert kept.tolist() == [True, False, True]

    def test_without_a_confident_negative_it_is_random(self):
        kept = torch.zeros(40)
        every = torch.ones(40, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        boxes = torch.rand(40, 4, generator=generator)
        for _ in range(200):
            mask, weights = sample_score_hlr_negatives(
                torch.full((40,), 0.01), boxes, every, 10, generator=generator
            )
            kept += mask
            assert torch.equal(weights, mask.float())
        # Each is kept 50 times, with a standard deviation of 6.
        assert kept.sum() == 2000 and 25 < kept.min() and kept.max() < 75

    def test_number_as_a_tensor(self, generator):
        scores, boxes, candidates = crowd(generator, 100)
        a, b = (
            sample_score_hlr_negatives(scores, boxes, candidates, n)[0]
            for n in (7, torch.tensor(7))
        )
        assert torch.equal(a, b) and a.sum() == 7

    def test_nothing_to_choose_from(self):
        for n in (0, 4):
            kept, weights = sample_score_hlr_negatives(
                torch.rand(n), torch.rand(n, 4), torch.zeros(n, dtype=torch.bool), 3
            )
            assert kept.shape == weights.shape == (n,) and not kept.any() and not weights.any()

    @pytest.mark.parametrize(
        ("options", "match"),
        [({"k": 0.0}, "k must be greater"), ({"bias": 1.5}, r"bias must be in \[0, 1\]")],
    )
    def test_bad_input(self, options, match):
        with pytest.raises(ValueError, match=match):
            mask = torch.ones(3, dtype=torch.bool)
            sample_score_hlr_negatives(torch.zeros(3), torch.zeros(3, 4), mask, 1, **options)
