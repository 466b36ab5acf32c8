"""What holds of every input, tried on random ones.

FUZZ_EXAMPLES is how many of each; `make test-slow` takes 10,000.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libra_d2.layers import REFINE_TYPES, BalancedFeaturePyramid
from libra_d2.losses import balanced_l1_loss, carl_loss, focal_loss
from libra_d2.matching import classify_to_localize, localize_to_classify
from libra_d2.ranking import hierarchical_local_rank, importance_weights
from libra_d2.sampling import (
    sample_hard,
    sample_hard_nms,
    sample_instance_balanced_positives,
    sample_iou_balanced_negatives,
    sample_random,
    sample_score_hlr_negatives,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 40))
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
sizes = st.integers(0, 60)
rows = st.lists(st.integers(1, 3), max_size=2)
# From every decade that float32 has, and the odd ones.
numbers = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e30])


def rng(seed):
    return torch.Generator().manual_seed(seed)


def random_boxes(n, generator):
    corner = torch.rand(n, 2, generator=generator) * 100
    return torch.cat([corner, corner + torch.rand(n, 2, generator=generator) * 60], dim=1)


def check_kept(kept, candidates, num_samples, exactly=True):
    assert kept.dtype == torch.bool and kept.shape == candidates.shape
    assert not (kept & ~candidates).any()
    most = torch.as_tensor(num_samples).clamp(max=candidates.sum(-1))
    assert (kept.sum(-1) == most).all() if exactly else (kept.sum(-1) <= most).all()


@fuzz
@given(seeds, rows, sizes, st.integers(0, 80), st.floats(0, 1))
def test_samplers(seed, rows, n, num_samples, share):
    g = rng(seed)
    shape = (*rows, n)
    candidates = torch.rand(shape, generator=g) < share
    ious = torch.rand(shape, generator=g) * 0.5
    groups = torch.randint(5, shape, generator=g)
    losses = torch.randn(shape, generator=g)
    kept = [
        sample_random(candidates, num_samples, generator=g),
        sample_hard(losses, candidates, num_samples),
        sample_instance_balanced_positives(groups, candidates, num_samples, generator=g),
    ]
    for floor in (0.0, 0.1):
        for num_bins in (1, 3, 7):
            options = {"num_bins": num_bins, "floor_iou": floor, "floor_fraction": floor * 5}
            kept.append(
                sample_iou_balanced_negatives(ious, candidates, num_samples, generator=g, **options)
            )
    for k in kept:
        check_kept(k, candidates, num_samples)
    by_row = zip(
        *(x.flatten(0, -2) if rows else x[None] for x in (losses, candidates, kept[1])), strict=True
    )
    for own, can, has in by_row:  # the hardest
        if has.any() and (can & ~has).any():
            assert own[has].min() >= own[can & ~has].max()


@fuzz
@given(seeds, rows, sizes)
def test_numbers_of_samples_by_row(seed, rows, n):
    g = rng(seed)
    candidates = torch.rand((*rows, n), generator=g) < 0.5
    num_samples = torch.randint(70, tuple(rows), generator=g)
    check_kept(sample_random(candidates, num_samples, generator=g), candidates, num_samples)


@fuzz
@given(seeds, sizes, st.lists(st.integers(0, 4), max_size=3))
def test_numbers_of_samples_of_a_wrong_shape(seed, n, shape):
    candidates = torch.rand((2, 3, n), generator=rng(seed)) < 0.5
    num_samples = torch.ones(shape, dtype=torch.int64)
    try:
        expected = torch.broadcast_shapes(tuple(shape), (2, 3)) == (2, 3)
    except RuntimeError:
        expected = False
    if expected:
        check_kept(sample_random(candidates, num_samples), candidates, 1)
    else:
        with pytest.raises(ValueError, match="num_samples must broadcast"):
            sample_random(candidates, num_samples)


@fuzz
@given(seeds, sizes, st.integers(0, 40), st.floats(0, 1))
def test_samplers_that_look_at_boxes(seed, n, num_samples, threshold):
    g = rng(seed)
    boxes, losses = random_boxes(n, g), torch.rand(n, generator=g)
    candidates = torch.rand(n, generator=g) < 0.7
    kept = sample_hard_nms(losses, boxes, candidates, num_samples, nms_thresh=threshold)
    check_kept(kept, candidates, num_samples, exactly=False)
    kept, weights = sample_score_hlr_negatives(
        torch.rand(n, generator=g),
        boxes,
        candidates,
        num_samples,
        nms_thresh=threshold,
        generator=g,
    )
    check_kept(kept, candidates, num_samples)
    assert weights.shape == (n,) and torch.isfinite(weights).all() and (weights >= 0).all()


@fuzz
@given(
    numbers, numbers, st.floats(1e-3, 10), st.floats(0.01, 5), st.sampled_from(["paper", "mmdet"])
)
def test_balanced_l1(x, y, ratio, alpha, reference):
    one = torch.tensor([x, y], dtype=torch.float32, requires_grad=True)
    two = torch.tensor([y, y], dtype=torch.float32)
    gamma = alpha * ratio
    loss = balanced_l1_loss(one, two, alpha, gamma, beta=0.5, reference=reference)
    (gradient,) = torch.autograd.grad(loss.sum(), one)
    difference = (one - two).detach().abs()
    finite = torch.isfinite(difference)
    assert loss[1] == 0 and not loss.isnan().any()
    rounding = 1e-6 * difference + torch.finfo(torch.float32).tiny  # below it all is rounded
    assert (loss >= -rounding)[finite].all()
    steepest = gamma + (alpha / 0.5 if reference == "mmdet" else 0)  # which jumps at beta
    assert (gradient.abs()[finite] <= steepest * 1.001).all()


@fuzz
@given(seeds, sizes, st.floats(0, 5), st.floats(0, 1), st.floats(-60, 60))
def test_focal_loss(seed, n, gamma, alpha, logit):
    logits = (torch.randn(n, 4, generator=rng(seed)) + logit).requires_grad_()
    targets = (torch.rand(n, 4, generator=rng(seed)) < 0.5).float()
    loss = focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction="sum")
    loss.backward()
    assert torch.isfinite(loss) and loss >= 0 and torch.isfinite(logits.grad).all()


@fuzz
@given(seeds, sizes, st.floats(0.01, 3), st.floats(0, 0.99))
def test_carl(seed, n, k, bias):
    g = rng(seed)
    probs = torch.rand(n, generator=g).requires_grad_()
    losses = torch.rand(n, 4, generator=g) * 10
    loss = carl_loss(probs, losses, k=k, bias=bias, normalizer=max(n, 1))
    loss.backward()
    assert torch.isfinite(loss) and loss >= 0 and torch.isfinite(probs.grad).all()


@fuzz
@given(seeds, sizes, st.integers(1, 6), st.booleans())
def test_ranks(seed, n, num_groups, ties):
    g = rng(seed)
    values = torch.randn(n, generator=g)
    values = values.round() if ties else values
    groups = torch.randint(num_groups, (n,), generator=g)
    ranks = hierarchical_local_rank(values, groups)
    assert sorted(ranks.tolist()) == list(range(n))
    for group in range(num_groups):  # inside a group the larger is the more important
        own = groups == group
        order = ranks[own].argsort()
        assert (values[own][order].diff() <= 0).all()
    weights = importance_weights(ranks, n, k=2.0, bias=0.2)
    assert torch.isfinite(weights).all() and (weights > 0).all()


@fuzz
@given(seeds, st.integers(0, 5), sizes, st.floats(1.01, 4))
def test_mutual_guidance(seed, num_gts, n, sigma):
    g = rng(seed)
    ious, regressed, scores = (torch.rand(num_gts, n, generator=g) for _ in range(3))
    for matched, labels in (
        localize_to_classify(ious, regressed),
        classify_to_localize(ious, scores, sigma=sigma),
    ):
        assert matched.shape == labels.shape == (n,)
        assert {*labels.tolist()} <= {-1, 0, 1}
        if num_gts:
            assert ((0 <= matched) & (matched < num_gts)).all()
        else:
            assert not (labels == 1).any()


@fuzz
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(REFINE_TYPES),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_balanced_feature_pyramid(seed, channels, num_images, refine_type, shapes):
    shapes = sorted(shapes, key=lambda s: s[0] * s[1], reverse=True)
    torch.manual_seed(seed)
    level = min(1, len(shapes) - 1)
    block = BalancedFeaturePyramid(
        channels, len(shapes), refine_level=level, refine_type=refine_type
    )
    levels = [torch.randn(num_images, channels, *shape) for shape in shapes]
    out = block(levels)
    assert [x.shape for x in out] == [x.shape for x in levels]
    assert all(torch.isfinite(x).all() for x in out)
