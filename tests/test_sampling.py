"""Samplers: counts, disjointness, distributions, limits and bad input."""

import pytest
import torch

from libra_d2.sampling import (
    sample_instance_balanced_positives,
    sample_iou_balanced_negatives,
    sample_random,
)

ROWS = 20_000  # independent draws of a distribution, all in one batched call
# An observed frequency is within 5 standard deviations of its probability, at most 0.5 / sqrt(ROWS)
# each: a correct sampler fails one check in over a million.
TOLERANCE = 5 * 0.5 / ROWS**0.5


def random_like(ious, candidates, num_samples, **kwargs):
    return sample_random(candidates, num_samples, **kwargs)


def instance_like(ious, candidates, num_samples, **kwargs):
    return sample_instance_balanced_positives((ious * 10).long(), candidates, num_samples, **kwargs)


def with_floor(ious, candidates, num_samples, **kwargs):
    return sample_iou_balanced_negatives(
        ious, candidates, num_samples, floor_iou=0.1, floor_fraction=0.3, **kwargs
    )


SAMPLERS = [random_like, instance_like, sample_iou_balanced_negatives, with_floor]


def frequencies(kept):
    """How often each candidate was kept, over rows of independent draws."""
    return kept.double().mean(0)


@pytest.mark.parametrize("sampler", SAMPLERS)
class TestEverySampler:
    @pytest.mark.parametrize("num_samples", [0, 1, 7, 40, 1000])
    @pytest.mark.parametrize("share", [0.0, 0.05, 0.6, 1.0])
    def test_keeps_exactly_as_many_candidates_as_there_can_be(
        self, sampler, num_samples, share, generator
    ):
        ious = torch.rand(50, 97, generator=generator)
        candidates = torch.rand(50, 97, generator=generator) < share
        kept = sampler(ious, candidates, num_samples, generator=generator)
        assert kept.dtype == torch.bool and kept.shape == candidates.shape
        assert not (kept & ~candidates).any()
        expected = candidates.sum(-1).clamp(max=num_samples)
        assert torch.equal(kept.sum(-1), expected)

    def test_num_samples_may_differ_by_row(self, sampler, generator):
        ious = torch.rand(3, 4, 60, generator=generator)
        candidates = torch.rand(3, 4, 60, generator=generator) < 0.7
        num_samples = torch.arange(12).view(3, 4) * 5
        kept = sampler(ious, candidates, num_samples, generator=generator)
        assert torch.equal(kept.sum(-1), torch.minimum(candidates.sum(-1), num_samples))

    def test_a_tensor_gives_what_an_int_gives(self, sampler):
        ious = torch.rand(200, generator=torch.Generator().manual_seed(1))
        candidates = ious > 0.2
        kept = [
            sampler(ious, candidates, n, generator=torch.Generator().manual_seed(2))
            for n in (31, torch.tensor(31))
        ]
        assert torch.equal(*kept)

    def test_same_seed_same_sample_and_other_seed_another(self, sampler):
        ious = torch.rand(300, generator=torch.Generator().manual_seed(1))
        candidates = ious > 0.1
        first, again, other = (
            sampler(ious, candidates, 50, generator=torch.Generator().manual_seed(seed))
            for seed in (3, 3, 4)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0)])
    def test_nothing_to_choose_from(self, sampler, shape):
        kept = sampler(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), 5)
        assert kept.shape == shape

    def test_inputs_stay_as_they_are(self, sampler, generator):
        ious = torch.rand(5, 80, generator=generator)
        candidates = ious > 0.3
        before = ious.clone(), candidates.clone()
        sampler(ious, candidates, 20, generator=generator)
        assert torch.equal(ious, before[0]) and torch.equal(candidates, before[1])

    def test_rows_are_independent(self, sampler, generator):
        ious = torch.rand(60, generator=generator).expand(2000, 60)
        kept = sampler(ious, ious > -1, 20, generator=generator)
        assert len(kept.unique(dim=0)) == 2000

    def test_looks_at_no_value(self, sampler):
        """No value is looked at on the host: the sampler runs where there are no values."""
        ious = torch.zeros(2, 30, device="meta")
        candidates = torch.zeros(2, 30, dtype=torch.bool, device="meta")
        num_samples = torch.zeros(2, dtype=torch.int64, device="meta")
        assert sampler(ious, candidates, num_samples).shape == (2, 30)


class TestRandom:
    def test_every_candidate_is_equally_likely(self, generator):
        candidates = torch.tensor([True] * 7 + [False] * 3).expand(ROWS, 10)
        kept = frequencies(sample_random(candidates, 3, generator=generator))
        expected = torch.tensor([3 / 7] * 7 + [0.0] * 3, dtype=torch.float64)
        torch.testing.assert_close(kept, expected, rtol=0, atol=TOLERANCE)

    def test_every_pair_is_equally_likely(self, generator):
        candidates = torch.ones(ROWS, 5, dtype=torch.bool)
        kept = sample_random(candidates, 2, generator=generator).double()
        pairs = (kept.T @ kept / ROWS).triu(1)
        expected = torch.full((5, 5), 1 / 10, dtype=torch.float64).triu(1)
        torch.testing.assert_close(pairs, expected, rtol=0, atol=TOLERANCE)


class TestIouBalanced:
    # 12, 6 and 4 candidates in three bins over [0, 0.6); 2 candidates above.
    IOUS = torch.tensor([0.05] * 12 + [0.25] * 6 + [0.45] * 4 + [0.9] * 2)
    CANDIDATES = torch.ones(24, dtype=torch.bool)

    def sample(self, num_samples, generator, ious=None, candidates=None, **kwargs):
        ious = self.IOUS if ious is None else ious
        candidates = self.CANDIDATES if candidates is None else candidates
        return sample_iou_balanced_negatives(
            ious.expand(ROWS, -1),
            candidates.expand(ROWS, -1),
            num_samples,
            generator=generator,
            **{"iou_range": (0.0, 0.6), **kwargs},
        )

    def test_each_bin_gives_the_same(self, generator):
        kept = self.sample(9, generator)
        for start, end in ((0, 12), (12, 18), (18, 22)):
            assert (kept[:, start:end].sum(-1) == 3).all()
        assert not kept[:, 22:].any()

    def test_probability_is_n_over_k_times_m(self, generator):
        """Equation 2: p_k = N / (K M_k)."""
        kept = frequencies(self.sample(9, generator))
        expected = torch.tensor(
            [9 / (3 * 12)] * 12 + [9 / (3 * 6)] * 6 + [9 / (3 * 4)] * 4 + [0, 0]
        )
        torch.testing.assert_close(kept, expected.double(), rtol=0, atol=TOLERANCE)

    def test_the_missing_are_drawn_uniformly_from_all_left(self, generator):
        """N = 18: quotas of 6, 6, 4 leave 2, drawn from the 6 + 0 + 0 + 2 candidates left."""
        kept = frequencies(self.sample(18, generator))
        first = 6 / 12 + 6 / 12 * 2 / 8
        expected = torch.tensor([first] * 12 + [1.0] * 6 + [1.0] * 4 + [2 / 8] * 2).double()
        torch.testing.assert_close(kept, expected, rtol=0, atol=TOLERANCE)

    def test_a_remainder_of_the_division_is_drawn_from_all_left(self, generator):
        """N = 5: a quota of 1 each and 2 from the 21 left."""
        kept = frequencies(self.sample(5, generator))
        chosen = [1 / m + (m - 1) / m * 2 / 21 for m in (12, 6, 4)]
        expected = [chosen[0]] * 12 + [chosen[1]] * 6 + [chosen[2]] * 4 + [2 / 21] * 2
        torch.testing.assert_close(
            kept, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=TOLERANCE
        )

    def test_one_bin_is_random(self, generator):
        kept = frequencies(self.sample(6, generator, num_bins=1, iou_range=(0.0, 1.0)))
        torch.testing.assert_close(
            kept, torch.full((24,), 6 / 24, dtype=torch.float64), rtol=0, atol=TOLERANCE
        )

    def test_paper_and_mmdet_ranges(self, generator):
        """3 bins over [0, 0.5) and over [0, 1], whose last is empty for negatives."""
        ious = torch.tensor([0.0] * 30 + [0.1] * 10 + [0.2] * 12 + [0.4] * 8)
        candidates = torch.ones(60, dtype=torch.bool)
        paper = self.sample(12, generator, ious, candidates, iou_range=(0.0, 0.5))
        assert (paper[:, :40].sum(-1) == 4).all()
        assert (paper[:, 40:52].sum(-1) == 4).all() and (paper[:, 52:].sum(-1) == 4).all()

        # mmdet: edges 0, 1/3, 2/3, 1. 4 of the first 52, 4 of the last 8, and 4 of the 52 left.
        mmdet = frequencies(self.sample(12, generator, ious, candidates, iou_range=(0.0, 1.0)))
        first, last = (4 / m + (m - 4) / m * 4 / 52 for m in (52, 8))
        expected = torch.tensor([first] * 52 + [last] * 8, dtype=torch.float64)
        torch.testing.assert_close(mmdet, expected, rtol=0, atol=TOLERANCE)

    def test_the_range_may_differ_by_row(self, generator):
        ious = torch.tensor([0.1] * 8 + [0.3] * 8).expand(2, 16)
        high = torch.tensor([0.4, 0.2])
        kept = sample_iou_balanced_negatives(
            ious,
            torch.ones(2, 16).bool(),
            8,
            num_bins=2,
            iou_range=(0.0, high),
            generator=generator,
        )
        assert kept[0, :8].sum() == 4 and kept[1, :8].sum() >= 4

    def test_zero_iou_belongs_to_the_first_bin_and_the_upper_edge_to_none(self, generator):
        ious = torch.tensor([0.0, 0.25, 0.25, 0.5, 0.5])
        kept = self.sample(
            2, generator, ious, torch.ones(5).bool(), num_bins=2, iou_range=(0.0, 0.5)
        )
        assert kept[:, 0].all() and (kept[:, 1:3].sum(-1) == 1).all() and not kept[:, 3:].any()

    def test_floor(self, generator):
        """N = 10, a third of 12 below 0.1; the other 7 from bins over [0.1, 0.6)."""
        kept = self.sample(10, generator, num_bins=2, floor_iou=0.1, floor_fraction=0.3)
        assert (kept[:, :12].sum(-1) == 3).all()
        # 3 from each bin of 6 (0.25) and 4 (0.45), and 1 from what is left above the floor.
        expected = [3 / 12] * 12 + [1 / 2 + 1 / 2 / 6] * 6 + [3 / 4 + 1 / 4 / 6] * 4 + [1 / 6] * 2
        torch.testing.assert_close(
            frequencies(kept), torch.tensor(expected).double(), rtol=0, atol=TOLERANCE
        )

    @pytest.mark.parametrize(
        ("fraction", "num_samples", "below"),
        [(0.9, 20, 12), (0.1, 20, 8), (1.0, 6, 6), (0.0, 6, 0)],
    )
    def test_each_side_of_the_floor_fills_the_other(self, fraction, num_samples, below, generator):
        """12 candidates below the floor and 12 above."""
        kept = self.sample(num_samples, generator, floor_iou=0.1, floor_fraction=fraction)
        assert (kept[:, :12].sum(-1) == below).all()
        assert (kept.sum(-1) == num_samples).all()

    @pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    @pytest.mark.parametrize("num_samples", [10, 31])
    def test_floor_takes_its_fraction_rounded_up(self, fraction, num_samples, generator):
        """The same for an int and a tensor."""
        ious = torch.linspace(0, 0.49, 300)
        for count in (num_samples, torch.tensor(num_samples)):
            kept = sample_iou_balanced_negatives(
                ious, ious >= 0, count, floor_iou=0.2, floor_fraction=fraction, generator=generator
            )
            assert kept[ious < 0.2].sum() == -(-round(num_samples * fraction * 10) // 10)

    def test_all_ious_zero(self, generator):
        kept = sample_iou_balanced_negatives(
            torch.zeros(50), torch.ones(50).bool(), 10, iou_range=(0.0, torch.tensor(0.0))
        )
        assert kept.sum() == 10


class TestInstanceBalanced:
    def sample(self, counts, num_samples, generator):
        """Draws from ground truths with these many positives; returns each one's share."""
        gt = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        kept = sample_instance_balanced_positives(
            gt.expand(ROWS, -1), torch.ones(ROWS, len(gt)).bool(), num_samples, generator=generator
        )
        assert (kept.sum(-1) == min(num_samples, sum(counts))).all()
        return kept, gt

    def test_each_gives_its_quota_then_the_rest_fills_up(self, generator):
        """N = 8, G = 3: a quota of round(8 / 3) + 1 = 4 gives 4 + 2 + 1, and one of 16 left."""
        kept, _ = self.sample([20, 2, 1], 8, generator)
        assert (kept[:, :20].sum(-1) == 5).all() and kept[:, 20:].all()
        expected = torch.full((20,), 5 / 20, dtype=torch.float64)
        torch.testing.assert_close(frequencies(kept)[:20], expected, rtol=0, atol=TOLERANCE)

    def test_the_fill_is_uniform_over_the_rest(self, generator):
        """N = 12, G = 3: quota 5 gives 5 + 5 + 1 and one more from the 5 + 15 left."""
        kept, _ = self.sample([10, 20, 1], 12, generator)
        expected = [5 / 10 + 5 / 10 / 20] * 10 + [5 / 20 + 15 / 20 / 20] * 20 + [1.0]
        torch.testing.assert_close(
            frequencies(kept), torch.tensor(expected).double(), rtol=0, atol=TOLERANCE
        )

    def test_too_many_are_cut_at_random(self, generator):
        """N = 4, G = 3: a quota of 2 gives 6, of which 4 stay."""
        kept, gt = self.sample([10, 5, 2], 4, generator)
        expected = [2 / 10 * 4 / 6] * 10 + [2 / 5 * 4 / 6] * 5 + [4 / 6] * 2
        torch.testing.assert_close(
            frequencies(kept), torch.tensor(expected).double(), rtol=0, atol=TOLERANCE
        )
        for i in range(3):
            assert (kept[:, gt == i].sum(-1) <= 2).all()

    def test_half_rounds_to_even(self, generator):
        """N = 5, G = 2: round(2.5) + 1 = 3, as Python and torch round."""
        kept, _ = self.sample([20, 2], 5, generator)
        assert (kept[:, :20].sum(-1) == 3).all()

    def test_only_ground_truths_with_positives_count(self, generator):
        """Ids far apart and ids of non-candidates change nothing."""
        gt = torch.tensor([1000] * 10 + [7] * 2 + [3] * 30 + [(1 << 20) - 1])
        candidates = torch.tensor([True] * 12 + [False] * 30 + [True]).expand(ROWS, -1)
        kept = sample_instance_balanced_positives(
            gt.expand(ROWS, -1), candidates, 9, generator=generator
        )
        # G = 3: a quota of 4 gives 4 + 2 + 1; the missing 2 come from the first.
        assert (kept[:, :10].sum(-1) == 6).all() and kept[:, 10:12].all() and kept[:, -1].all()

    def test_more_ground_truths_than_samples(self, generator):
        kept, _ = self.sample([1] * 50, 10, generator)
        expected = torch.full((50,), 10 / 50, dtype=torch.float64)
        torch.testing.assert_close(frequencies(kept), expected, rtol=0, atol=TOLERANCE)


class TestBadInput:
    MASK = torch.ones(6, dtype=torch.bool)

    @pytest.mark.parametrize(
        ("match", "call"),
        [
            ("bool mask", lambda m: sample_random(m.float(), 3)),
            ("bool mask", lambda m: sample_random(torch.tensor(True), 3)),
            ("must not be negative", lambda m: sample_random(m, -1)),
            ("must be integers", lambda m: sample_random(m, torch.tensor(2.0))),
            ("shape of candidates", lambda m: sample_iou_balanced_negatives(torch.zeros(5), m, 3)),
            ("num_bins", lambda m: sample_iou_balanced_negatives(m.float(), m, 3, num_bins=0)),
            (
                "low < high",
                lambda m: sample_iou_balanced_negatives(m.float(), m, 3, iou_range=(0.5, 0.5)),
            ),
            (
                "floor_fraction",
                lambda m: sample_iou_balanced_negatives(m.float(), m, 3, floor_fraction=1.5),
            ),
            ("floor_iou", lambda m: sample_iou_balanced_negatives(m.float(), m, 3, floor_iou=-0.1)),
            (
                "upper edge",
                lambda m: sample_iou_balanced_negatives(m.float(), m, 3, floor_iou=0.5),
            ),
            ("integers", lambda m: sample_instance_balanced_positives(m.float(), m, 3)),
            (
                "shape of candidates",
                lambda m: sample_instance_balanced_positives(torch.zeros(5).long(), m, 3),
            ),
        ],
    )
    def test_is_one_sentence(self, match, call):
        with pytest.raises(ValueError, match=match) as error:
            call(self.MASK)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_a_gpu_without_a_transfer_to_the_host(sampler):
    ious = torch.rand(16, 2000, device="cuda")
    candidates = ious > 0.1
    num_samples = torch.full((16,), 512, device="cuda")
    expected = candidates.sum(-1).clamp(max=512)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = sampler(ious, candidates, num_samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not (kept & ~candidates).any() and torch.equal(kept.sum(-1), expected)
