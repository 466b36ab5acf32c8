"""Losses: values, limits, gradients, both references, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from libra_d2.losses import balanced_l1_loss, focal_loss

OPTIONS = [(0.5, 1.5, 1.0), (0.2, 1.0, 1.0), (0.5, 1.5, 0.11), (0.3, 2.0, 2.5)]


def formula(d, alpha, gamma, beta, reference):
    """The loss of one difference d >= 0, branch by branch as the paper and mmdetection state it."""
    b = math.exp(gamma / alpha) - 1
    if reference == "paper":
        d /= beta
        inlier = alpha / b * (b * d + 1) * math.log(b * d + 1) - alpha * d
        return beta * (inlier if d < 1 else gamma * d + gamma / b - alpha)
    if d < beta:
        return alpha / b * (b * d + 1) * math.log(b * d / beta + 1) - alpha * d
    return gamma * d + gamma / b - alpha * beta


@pytest.mark.parametrize("reference", ["paper", "mmdet"])
@pytest.mark.parametrize(("alpha", "gamma", "beta"), OPTIONS)
class TestBothReferences:
    def test_values(self, alpha, gamma, beta, reference):
        d = torch.linspace(-4, 4, 401, dtype=torch.float64)
        loss = balanced_l1_loss(d, torch.zeros_like(d), alpha, gamma, beta, "none", reference)
        expected = [formula(abs(x), alpha, gamma, beta, reference) for x in d.tolist()]
        torch.testing.assert_close(
            loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )

    def test_gradient(self, alpha, gamma, beta, reference):
        d = torch.cat([torch.linspace(-3, 3, 40), torch.tensor([beta * 0.999, beta * 1.001])])
        d = d.double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: balanced_l1_loss(
                x, torch.zeros_like(x), alpha, gamma, beta, reference=reference
            ),
            d,
        )

    def test_is_continuous_at_beta(self, alpha, gamma, beta, reference):
        d = torch.tensor([beta * (1 - 1e-12), beta * (1 + 1e-12)], dtype=torch.float64)
        loss = balanced_l1_loss(d, torch.zeros_like(d), alpha, gamma, beta, reference=reference)
        torch.testing.assert_close(loss[0], loss[1], rtol=1e-9, atol=0)

    def test_outliers_have_gradient_gamma(self, alpha, gamma, beta, reference):
        d = torch.tensor([1.01 * beta, 2 * beta, -30], dtype=torch.float64, requires_grad=True)
        balanced_l1_loss(d, torch.zeros_like(d), alpha, gamma, beta, "sum", reference).backward()
        expected = torch.tensor([gamma, gamma, -gamma], dtype=torch.float64)
        torch.testing.assert_close(d.grad, expected)


def gradient(d, **options):
    d = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    balanced_l1_loss(d, torch.zeros_like(d), reduction="sum", **options).backward()
    return d.grad


def test_the_references_agree_for_beta_1():
    d = torch.linspace(-3, 3, 101)
    paper, mmdet = (
        balanced_l1_loss(d, torch.zeros_like(d), reference=r) for r in ("paper", "mmdet")
    )
    assert torch.equal(paper, mmdet)


def test_paper_gradient_is_the_published_one():
    """Equation 8: alpha ln(b d + 1) for d < 1, gamma otherwise, and continuous at 1."""
    b = math.exp(3) - 1
    d = [0.1, 0.5, 0.999999, 1.0, 2.0]
    expected = [0.5 * math.log(b * x + 1) if x < 1 else 1.5 for x in d]
    torch.testing.assert_close(gradient(d), torch.tensor(expected, dtype=torch.float64))


def test_mmdet_gradient_is_not_zero_at_zero_for_small_beta():
    """alpha / beta - alpha = 4.05 for beta 0.11."""
    slope = gradient([1e-9], beta=0.11, reference="mmdet")
    torch.testing.assert_close(
        slope, torch.tensor([0.5 / 0.11 - 0.5], dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert gradient([1e-9], beta=0.11, reference="paper").abs() < 1e-6


def test_beta_to_zero_is_l1_times_gamma():
    d = torch.linspace(-3, 3, 61, dtype=torch.float64)
    loss = balanced_l1_loss(d, torch.zeros_like(d), gamma=1.0, beta=1e-9)
    torch.testing.assert_close(loss, F.l1_loss(d, torch.zeros_like(d), reduction="none"))


def test_inliers_gain_as_alpha_falls_and_outliers_stay():
    inlier = [gradient([0.2], alpha=a, gamma=1.0).item() for a in (0.5, 0.3, 0.2)]
    assert inlier[0] < inlier[1] < inlier[2]
    assert all(gradient([5.0], alpha=a, gamma=1.0).item() == 1.0 for a in (0.5, 0.3, 0.2))


def test_gradient_at_zero_is_zero():
    assert gradient([0.0]).item() == 0


def test_huge_differences_stay_finite():
    d = torch.tensor([1e30, -1e30], requires_grad=True)
    loss = balanced_l1_loss(d, torch.zeros(2), reduction="sum")
    loss.backward()
    assert loss.isfinite() and d.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction):
    input, target = torch.randn(4, 7), torch.randn(4, 7)
    loss = balanced_l1_loss(input, target, reduction=reduction)
    assert torch.equal(loss, getattr(balanced_l1_loss(input, target), reduction)())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_is_a_differentiable_zero(reduction):
    input = torch.zeros(0, 4, requires_grad=True)
    loss = balanced_l1_loss(input, torch.zeros(0, 4), reduction=reduction)
    loss.backward()
    assert loss.item() == 0 and input.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    input, target = torch.randn(50).to(dtype), torch.randn(50).to(dtype)
    loss = balanced_l1_loss(input, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, balanced_l1_loss(input.float(), target.float()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 0.0}, "alpha must be a positive"),
        ({"gamma": -1.0}, "gamma must be a positive"),
        ({"beta": 0.0}, "beta must be a positive"),
        ({"beta": math.nan}, "beta must be a positive"),
        ({"alpha": 0.01}, "gamma must be between"),
        ({"reference": "papr"}, "one of paper, mmdet"),
        ({"reduction": "avg"}, "one of none, mean, sum"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        balanced_l1_loss(torch.zeros(2), torch.zeros(2), **options)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(2, 1\)"):
        balanced_l1_loss(torch.zeros(2), torch.zeros(2, 1))


class TestFocalLoss:
    def inputs(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(40, 5, generator=generator, dtype=dtype) * 3
        return logits, (torch.rand(40, 5, generator=generator) < 0.3).to(dtype)

    @pytest.mark.parametrize("alpha", [0.25, 0.75, -1.0])
    @pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
    def test_values(self, alpha, gamma):
        logits, targets = self.inputs()
        p_t = torch.where(targets == 1, logits.sigmoid(), 1 - logits.sigmoid())
        expected = -((1 - p_t) ** gamma) * p_t.log()
        if alpha >= 0:
            expected *= torch.where(targets == 1, alpha, 1 - alpha)
        loss = focal_loss(logits, targets, alpha, gamma)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(focal_loss(logits, targets, alpha, gamma, "sum"), loss.sum())

    def test_gamma_0_is_cross_entropy(self):
        logits, targets = self.inputs()
        expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        torch.testing.assert_close(focal_loss(logits, targets, alpha=-1, gamma=0.0), expected)

    @pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
    def test_gradient(self, gamma):
        logits, targets = self.inputs()
        assert torch.autograd.gradcheck(
            lambda x: focal_loss(x, targets, gamma=gamma), logits.requires_grad_()
        )

    @pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
    def test_is_finite_for_any_logit(self, gamma):
        logits = torch.tensor([-1e4, -90.0, -17.5, 0.0, 17.5, 90.0, 1e4], requires_grad=True)
        for target in (0.0, 1.0):
            (gradient,) = torch.autograd.grad(
                focal_loss(logits, torch.full_like(logits, target), gamma=gamma, reduction="sum"),
                logits,
            )
            assert gradient.isfinite().all()
            assert (gradient[0] if target == 0 else gradient[-1]) == 0

    def test_empty_is_a_differentiable_zero(self):
        logits = torch.zeros(0, 4, requires_grad=True)
        focal_loss(logits, torch.zeros(0, 4), reduction="sum").backward()
        assert logits.grad.shape == (0, 4)

    def test_half_precision_is_computed_in_float32(self):
        logits, targets = self.inputs(torch.bfloat16)
        expected = focal_loss(logits.float(), targets.float())
        assert torch.equal(focal_loss(logits, targets), expected)

    @pytest.mark.parametrize(
        ("targets", "options", "match"),
        [
            (torch.zeros(3), {}, "same shape"),
            (torch.zeros(2), {"gamma": -1.0}, "gamma >= 0"),
            (torch.zeros(2), {"reduction": "avg"}, "got 2.0 and 'avg'"),
        ],
    )
    def test_bad_input(self, targets, options, match):
        with pytest.raises(ValueError, match=match):
            focal_loss(torch.zeros(2), targets, **options)
