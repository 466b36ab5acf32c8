"""PISA's ranks, weights and CARL: against plain loops, limits, gradients, bad input."""

import pytest
import torch

from libra_d2.losses import carl_loss
from libra_d2.ranking import hierarchical_local_rank, importance_weights, preserve_loss


def plain_ranks(values, groups):
    """Section 3.2 step by step."""
    place = [
        sum(groups[j] == groups[i] and values[j] > values[i] for j in range(len(values)))
        for i in range(len(values))
    ]
    order = sorted(range(len(values)), key=lambda i: (place[i], -values[i]))
    ranks = [0] * len(values)
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks


class TestHierarchicalLocalRank:
    def test_example(self):
        values = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
        groups = torch.tensor([4, 4, 7, 7, 1])
        # The best of the groups 4, 7, 1; then the second of 4 and of 7.
        assert hierarchical_local_rank(values, groups).tolist() == [0, 3, 1, 4, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_against_a_plain_loop(self, seed):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(80, generator=generator)
        groups = torch.randint(9, (80,), generator=generator)
        expected = plain_ranks(values.tolist(), groups.tolist())
        assert hierarchical_local_rank(values, groups).tolist() == expected

    @pytest.mark.parametrize("seed", range(5))
    def test_classes_have_rankings_of_their_own(self, seed):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(80, generator=generator)
        groups = torch.randint(6, (80,), generator=generator)
        classes = torch.randint(4, (80,), generator=generator)
        ranks = hierarchical_local_rank(values, groups, classes)
        for c in range(4):
            own = classes == c
            assert torch.equal(ranks[own], hierarchical_local_rank(values[own], groups[own]))

    def test_one_group_is_the_order_of_values_and_so_are_groups_of_one(self):
        values = torch.rand(30)
        expected = values.argsort(descending=True).argsort()
        for groups in (torch.zeros(30, dtype=torch.int64), torch.arange(30)):
            assert torch.equal(hierarchical_local_rank(values, groups), expected)

    def test_equal_values_keep_their_order(self):
        assert hierarchical_local_rank(torch.ones(4), torch.tensor([0, 0, 1, 1])).tolist() == [
            *(0, 2, 1, 3)
        ]

    def test_empty(self):
        ranks = hierarchical_local_rank(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        assert ranks.shape == (0,) and ranks.dtype == torch.int64

    @pytest.mark.parametrize(
        ("values", "groups", "match"),
        [
            (torch.zeros(3), torch.zeros(2, dtype=torch.int64), r"got \(3,\) and \(2,\)"),
            (torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64), r"same shape \(N,\)"),
            (torch.zeros(3), torch.zeros(3), "groups must be integers"),
        ],
    )
    def test_bad_input(self, values, groups, match):
        with pytest.raises(ValueError, match=match):
            hierarchical_local_rank(values, groups)


class TestImportanceWeights:
    @pytest.mark.parametrize(("k", "bias"), [(2.0, 0.0), (0.5, 0.0), (1.0, 0.2)])
    def test_formula(self, k, bias):
        ranks = torch.arange(5)
        expected = [(bias + (1 - bias) * (8 - r) / 8) ** k for r in range(5)]
        torch.testing.assert_close(
            importance_weights(ranks, 8, k=k, bias=bias), torch.tensor(expected)
        )
        as_tensor = importance_weights(ranks, torch.tensor(8), k=k, bias=bias)
        torch.testing.assert_close(as_tensor, torch.tensor(expected))

    def test_limits(self):
        ranks = torch.arange(6)
        assert torch.equal(importance_weights(ranks, 6, k=1.0, bias=1.0), torch.ones(6))
        assert importance_weights(torch.tensor([0]), 6, k=9.0, bias=0.0).item() == 1
        weights = importance_weights(ranks, 6, k=2.0, bias=0.0)
        assert (weights[1:] < weights[:-1]).all() and weights[-1] > 0

    @pytest.mark.parametrize(("k", "bias"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0)])
    def test_k_must_be_positive(self, k, bias):
        with pytest.raises(ValueError, match="k must be greater than 0, and"):
            importance_weights(torch.arange(3), 3, k=k, bias=bias)

    @pytest.mark.parametrize("bias", [-0.1, 1.1, float("nan")])
    def test_bias_must_be_a_fraction(self, bias):
        with pytest.raises(ValueError, match=r"bias must be in \[0, 1\], got"):
            importance_weights(torch.arange(3), 3, k=1.0, bias=bias)


class TestPreserveLoss:
    def test_keeps_the_sum(self):
        weights, losses = torch.rand(20), torch.rand(20) * 5
        scaled = preserve_loss(weights, losses)
        torch.testing.assert_close((scaled * losses).sum(), losses.sum())
        torch.testing.assert_close(scaled / scaled[0], weights / weights[0])

    def test_of_nothing(self):
        assert preserve_loss(torch.zeros(0), torch.zeros(0)).shape == (0,)
        assert torch.equal(preserve_loss(torch.ones(3), torch.zeros(3)), torch.ones(3))


class TestCarl:
    def test_formula(self):
        p = torch.tensor([0.2, 0.9, 0.5])
        losses = torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 1.0]])
        c = [(0.2 + 0.8 * x) ** 2 for x in (0.2, 0.9, 0.5)]
        expected = sum(3 * a / sum(c) * b for a, b in zip(c, (4.0, 0.5, 6.0), strict=True)) / 7
        got = carl_loss(p, losses, k=2.0, bias=0.2, normalizer=7)
        assert got.item() == pytest.approx(expected)
        per_box = carl_loss(p, losses.sum(dim=1), k=2.0, bias=0.2, normalizer=7)
        torch.testing.assert_close(per_box, got)

    def test_alike_probabilities_give_the_plain_loss(self):
        losses = torch.rand(6, 4)
        got = carl_loss(torch.full((6,), 0.3), losses, normalizer=10)
        torch.testing.assert_close(got, losses.sum() / 10)
        torch.testing.assert_close(carl_loss(torch.rand(6), losses, bias=1.0, normalizer=10), got)

    @pytest.mark.parametrize("shape", [(5,), (5, 4)])
    def test_gradient(self, shape):
        p = torch.rand(5, dtype=torch.float64) * 0.8 + 0.1
        losses = torch.rand(shape, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda a, b: carl_loss(a, b, k=1.5, normalizer=3.0),
            (p.requires_grad_(), losses.requires_grad_()),
        )

    def test_teaches_to_be_sure_where_regression_is_good(self):
        p = torch.tensor([0.5, 0.5], requires_grad=True)
        carl_loss(p, torch.tensor([0.1, 5.0]), normalizer=1.0).backward()
        assert p.grad[0] < 0 < p.grad[1]

    def test_a_root_of_zero_has_a_finite_gradient(self):
        p = torch.tensor([0.0, 0.5], requires_grad=True)
        carl_loss(p, torch.ones(2), k=0.5, bias=0.0, normalizer=1).backward()
        assert p.grad.isfinite().all()

    def test_without_positives_is_a_differentiable_zero(self):
        p = torch.zeros(0, requires_grad=True)
        loss = carl_loss(p, torch.zeros(0, 4), normalizer=5)
        loss.backward()
        assert loss.item() == 0 and p.grad.shape == (0,)

    @pytest.mark.parametrize(
        ("p", "losses", "options", "match"),
        [
            (torch.zeros(3), torch.zeros(2), {}, r"got \(3,\) and \(2,\)"),
            (torch.zeros(3, 1), torch.zeros(3, 1), {}, r"class_probs must be \(P,\)"),
            (torch.zeros(3), torch.zeros(3), {"k": 0.0}, "k must be greater than 0"),
            (torch.zeros(3), torch.zeros(3), {"bias": 2.0}, "bias must be in"),
        ],
    )
    def test_bad_input(self, p, losses, options, match):
        with pytest.raises(ValueError, match=match):
            carl_loss(p, losses, normalizer=1, **options)
