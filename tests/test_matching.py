"""Mutual Guidance: against a plain loop, limits and identities, no object left out, bad input."""

import pytest
import torch
from torchvision.ops import box_iou

from libra_d2.matching import classify_to_localize, guide_mutually, localize_to_classify


def grid_anchors(size=128):
    """Square anchors of three sizes on a grid, (A, 4)."""
    anchors = []
    for stride, side in ((8, 20), (16, 40), (32, 80)):
        center = torch.arange(stride / 2, size, stride)
        y, x = torch.meshgrid(center, center, indexing="ij")
        center = torch.stack([x, y], dim=-1).reshape(-1, 2)
        anchors.append(torch.cat([center - side / 2, center + side / 2], dim=1))
    return torch.cat(anchors)


def apart(seed):
    """A scene in which no two objects share their best anchor, by whatever measure."""
    while True:
        anchor_ious, regressed_ious, scores = scene(seed)
        measures = anchor_ious, regressed_ious, anchor_ious ** ((1.7 - scores) / 1.7)
        if all(len(m.argmax(dim=1).unique()) == len(m) for m in measures):
            return anchor_ious, regressed_ious, scores
        seed += 1000


def scene(seed, num_gts=5, noise=6.0, size=128):
    """IoUs of ground truths with anchors and with predictions near these, and random scores."""
    generator = torch.Generator().manual_seed(seed)
    anchors = grid_anchors(size)
    corner = torch.rand(num_gts, 2, generator=generator) * size * 0.8
    extent = torch.rand(num_gts, 2, generator=generator) * 60 + 10
    gts = torch.cat([corner, corner + extent], dim=1)
    predictions = anchors + torch.randn(anchors.shape, generator=generator) * noise
    predictions[:, 2:] = torch.maximum(predictions[:, 2:], predictions[:, :2] + 1)
    scores = torch.rand(num_gts, len(anchors), generator=generator)
    return box_iou(gts, anchors), box_iou(gts, predictions), scores


def plain_labels(quality, anchor_ious, positive_iou, ignored_iou):
    """Section 3 of the paper step by step, for scenes apart: (A,) ground truths and labels."""

    def own(matrix):
        matrix = matrix.clone()
        for row in matrix:
            row[row.argmax()] = 1.0
        for a in range(matrix.shape[1]):
            best = matrix[:, a].argmax()
            rest = [g for g in range(len(matrix)) if g != best]
            matrix[rest, a] = 0.0
        return matrix

    quality, anchor_ious = own(quality), own(anchor_ious)
    matched_gt = torch.zeros(quality.shape[1], dtype=torch.int64)
    labels = torch.zeros(quality.shape[1], dtype=torch.int8)
    for g in range(len(quality)):
        ranking = [a for a in quality[g].argsort(descending=True).tolist() if quality[g, a] > 0]
        num_positives = int((anchor_ious[g] >= positive_iou).sum())
        num_ignored = int((anchor_ious[g] >= ignored_iou).sum())
        for rank, a in enumerate(ranking[:num_ignored]):
            matched_gt[a], labels[a] = g, 1 if rank < num_positives else -1
    return matched_gt, labels


def assert_same(got, expected):
    (matched_gt, labels), (expected_gt, expected_labels) = got, expected
    assert torch.equal(labels, expected_labels)
    assert torch.equal(matched_gt[labels != 0], expected_gt[labels != 0])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.6, 0.3), (0.5, 0.5)])
class TestAgainstAPlainLoop:
    def test_localize_to_classify(self, seed, thresholds):
        positive_iou, negative_iou = thresholds
        anchor_ious, regressed_ious, _ = apart(seed)
        got = localize_to_classify(
            anchor_ious, regressed_ious, positive_iou=positive_iou, negative_iou=negative_iou
        )
        assert_same(got, plain_labels(regressed_ious, anchor_ious, *thresholds))

    def test_classify_to_localize(self, seed, thresholds):
        positive_iou, negative_iou = thresholds
        anchor_ious, _, scores = apart(seed)
        got = classify_to_localize(
            anchor_ious,
            scores,
            sigma=1.7,
            positive_iou=positive_iou,
            negative_iou=negative_iou,
        )
        amplified = anchor_ious ** ((1.7 - scores) / 1.7)
        assert_same(got, plain_labels(amplified, anchor_ious, positive_iou, positive_iou))


class TestIdentities:
    @pytest.mark.parametrize("seed", range(5))
    def test_predictions_equal_to_the_anchors_give_the_static_counts(self, seed):
        anchor_ious, _, _ = apart(seed)
        matched_gt, labels = localize_to_classify(anchor_ious, anchor_ious)
        best, gt = anchor_ious.max(dim=0)
        forced = torch.zeros_like(labels, dtype=torch.bool)
        forced[anchor_ious.argmax(dim=1)] = True
        assert torch.equal(labels == 1, (best >= 0.5) | forced)
        assert torch.equal(labels == -1, (best >= 0.4) & (best < 0.5) & ~forced)
        positive = (labels == 1) & ~forced
        assert torch.equal(matched_gt[positive], gt[positive])

    @pytest.mark.parametrize("seed", range(5))
    def test_a_large_sigma_gives_the_static_labels(self, seed):
        anchor_ious, _, scores = apart(seed)
        matched_gt, labels = classify_to_localize(anchor_ious, scores, sigma=1e9)
        static_gt, static_labels = localize_to_classify(anchor_ious, anchor_ious)
        assert torch.equal(labels == 1, static_labels == 1)
        assert torch.equal(matched_gt[labels == 1], static_gt[labels == 1])

    def test_scores_of_zero_change_nothing_and_high_ones_attract(self):
        anchor_ious = torch.tensor([[0.7, 0.6, 0.5, 0.3]])
        _, labels = classify_to_localize(anchor_ious, torch.zeros(1, 4))
        assert labels.tolist() == [1, 1, 1, 0]
        # 0.3 ** 0.5 = 0.55 is more than the 0.5 of the third.
        _, labels = classify_to_localize(anchor_ious, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
        assert labels.tolist() == [1, 1, 0, 1]

    def test_good_predictions_become_positive(self):
        anchor_ious = torch.tensor([[0.7, 0.45, 0.3, 0.1]])
        regressed_ious = torch.tensor([[0.2, 0.6, 0.9, 0.1]])
        matched_gt, labels = localize_to_classify(anchor_ious, regressed_ious)
        assert labels.tolist() == [0, -1, 1, 0] and matched_gt.tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_types(self, dtype):
        anchor_ious, regressed_ious, _ = scene(0)
        matched_gt, labels = localize_to_classify(anchor_ious.to(dtype), regressed_ious.to(dtype))
        assert matched_gt.dtype == torch.int64 and labels.dtype == torch.int8

    def test_inputs_are_left_alone_and_carry_no_gradient(self):
        matrices = scene(0)
        before = [matrix.clone() for matrix in matrices]
        anchor_ious, regressed_ious, scores = (matrix.requires_grad_() for matrix in matrices)
        localize_to_classify(anchor_ious, regressed_ious)
        classify_to_localize(anchor_ious, scores)
        for matrix, copy in zip(matrices, before, strict=True):
            assert torch.equal(matrix, copy) and matrix.grad is None


class TestBothAtOnce:
    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.6, 0.3), (0.5, 0.5)])
    @pytest.mark.parametrize("is_sparse", [False, True])
    def test_the_labels_of_each(self, seed, thresholds, is_sparse):
        anchor_ious, regressed_ious, scores = scene(seed, num_gts=40, noise=15.0)
        if is_sparse:
            scores = (scores * (anchor_ious > 0)).to_sparse()
            anchor_ious, regressed_ious = anchor_ious.to_sparse(), regressed_ious.to_sparse()
        options = dict(zip(("positive_iou", "negative_iou"), thresholds, strict=True))
        both = guide_mutually(anchor_ious, regressed_ious, scores, sigma=1.7, **options)
        alone = (
            localize_to_classify(anchor_ious, regressed_ious, **options),
            classify_to_localize(anchor_ious, scores, sigma=1.7, **options),
        )
        for got, expected in zip(both, alone, strict=True):
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

    def test_bad_input(self):
        ious = torch.zeros(1, 2)
        for matrices in ((ious, torch.zeros(1, 3), ious), (ious, ious, torch.zeros(1, 3))):
            with pytest.raises(ValueError, match=r"same shape .*got \(1, 2\) and \(1, 3\)"):
                guide_mutually(*matrices)
        with pytest.raises(ValueError, match="sigma must be greater than 1, got"):
            guide_mutually(ious, ious, ious, sigma=1.0)


class TestNoObjectIsLeftOut:
    def positives_of(self, result, num_gts):
        matched_gt, labels = result
        return matched_gt[labels == 1].bincount(minlength=num_gts)

    @pytest.mark.parametrize("seed", range(30))
    def test_in_a_crowd(self, seed):
        anchor_ious, regressed_ious, scores = scene(seed, num_gts=60, noise=15.0)
        assert (anchor_ious.amax(dim=1) > 0).all()
        for result in (
            localize_to_classify(anchor_ious, regressed_ious),
            classify_to_localize(anchor_ious, scores),
        ):
            assert self.positives_of(result, 60).min() >= 1

    def test_by_an_anchor_that_is_another_objects(self):
        anchor_ious = torch.tensor([[0.0, 0.7, 0.9, 0.0], [0.6, 0.4, 0.2, 0.4]])
        regressed_ious = torch.tensor([[0.0, 0.5, 0.8, 0.8], [0.8, 0.7, 0.0, 0.9]])
        matched_gt, labels = localize_to_classify(anchor_ious, regressed_ious)
        assert matched_gt.tolist() == [1, 1, 0, 1] and labels.tolist() == [-1, 0, 1, 1]

    def test_of_the_same_box(self):
        anchor_ious = torch.tensor([[0.6, 0.45, 0.2, 0.1]]).expand(3, -1)
        for result in (
            localize_to_classify(anchor_ious, anchor_ious),
            classify_to_localize(anchor_ious, torch.zeros(3, 4)),
        ):
            assert self.positives_of(result, 3).tolist() == [1, 1, 1]
            assert result[0][:3].tolist() == [0, 1, 2]

    def test_that_all_predictions_miss(self):
        anchor_ious = torch.tensor([[0.9, 0.3, 0.0], [0.0, 0.2, 0.3]])
        regressed_ious = torch.tensor([[0.9, 0.8, 0.0], [0.0, 0.0, 0.0]])
        matched_gt, labels = localize_to_classify(anchor_ious, regressed_ious)
        assert labels.tolist() == [1, 0, 1] and matched_gt[2] == 1

    def test_but_one_that_no_anchor_overlaps(self):
        anchor_ious = torch.tensor([[0.0, 0.0], [0.7, 0.0]])
        for result in (
            localize_to_classify(anchor_ious, anchor_ious),
            classify_to_localize(anchor_ious, anchor_ious),
        ):
            assert result[1].tolist() == [1, 0] and result[0][0] == 1

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("is_sparse", [False, True])
    def test_but_one_without_area(self, is_sparse):
        """Its IoU with an anchor without area is 0 / 0."""
        boxes = torch.tensor([[5.0, 5, 5, 5], [0, 0, 8, 8]])
        anchors = torch.tensor([[5.0, 5, 5, 5], [0, 0, 9, 9]])
        anchor_ious = box_iou(boxes, anchors)
        assert anchor_ious[0, 0].isnan()
        anchor_ious = anchor_ious.to_sparse() if is_sparse else anchor_ious
        for function in (localize_to_classify, classify_to_localize):
            matched_gt, labels = function(anchor_ious, anchor_ious)
            assert labels.tolist() == [0, 1] and matched_gt[1] == 1

    def test_when_there_are_fewer_anchors_than_objects(self):
        anchor_ious = torch.full((5, 2), 0.6)
        _, labels = localize_to_classify(anchor_ious, anchor_ious)
        assert labels.tolist() == [1, 1]

    def test_an_object_takes_no_anchors_of_another(self):
        """One with fewer good predictions than positives does not fill up with what is not its."""
        anchor_ious = torch.tensor([[0.9, 0.8, 0.7, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9, 0.0]])
        regressed_ious = torch.tensor([[0.9, 0.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.9, 0.0]])
        matched_gt, labels = localize_to_classify(anchor_ious, regressed_ious)
        assert labels.tolist() == [1, 0, 0, 1, 0] and matched_gt[3] == 1


class TestSparse:
    """Matrices of the overlapping pairs alone."""

    @pytest.mark.parametrize("seed", range(5))
    def test_the_same_as_dense(self, seed):
        anchor_ious, regressed_ious, scores = scene(seed, num_gts=40, noise=15.0)
        sparse_ious = anchor_ious.to_sparse()
        sparse_scores = (scores * (anchor_ious > 0)).to_sparse()
        dense = localize_to_classify(anchor_ious, regressed_ious)
        for got in (
            localize_to_classify(sparse_ious, regressed_ious.to_sparse()),
            localize_to_classify(sparse_ious, regressed_ious),
        ):
            assert_same(got, dense)
        dense = classify_to_localize(anchor_ious, scores)
        assert_same(classify_to_localize(sparse_ious, sparse_scores), dense)
        assert_same(classify_to_localize(sparse_ious, scores), dense)

    def test_scores_must_be_those_of_the_pairs(self):
        anchor_ious = torch.tensor([[0.6, 0.0, 0.3]]).to_sparse()
        scores = torch.tensor([[0.6, 0.3, 0.0]]).to_sparse()
        with pytest.raises(ValueError, match="must have the indices of sparse anchor_ious"):
            classify_to_localize(anchor_ious, scores)
        with pytest.raises(ValueError, match="must have the indices of sparse anchor_ious"):
            classify_to_localize(anchor_ious.to_dense(), scores)


def test_of_equal_predictions_the_first_anchor_is_taken():
    anchor_ious = torch.tensor([[0.9, 0.5, 0.3, 0.3, 0.3]])
    _, labels = localize_to_classify(anchor_ious, torch.full((1, 5), 0.4))
    assert labels.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_nothing_to_match(shape):
    ious = torch.zeros(shape)
    for matched_gt, labels in (
        localize_to_classify(ious, ious),
        classify_to_localize(ious, ious),
        *guide_mutually(ious, ious, ious),
    ):
        assert matched_gt.shape == labels.shape == (shape[1],)
        assert matched_gt.dtype == torch.int64 and not labels.any()


@pytest.mark.parametrize("sigma", [1.0, 0.5, -2.0, float("nan")])
def test_sigma_must_be_greater_than_one(sigma):
    with pytest.raises(ValueError, match="sigma must be greater than 1, got"):
        classify_to_localize(torch.zeros(1, 2), torch.zeros(1, 2), sigma=sigma)


@pytest.mark.parametrize("thresholds", [(0.4, 0.5), (1.5, 0.4), (0.5, 0.0), (0.5, -0.1)])
@pytest.mark.parametrize("function", [localize_to_classify, classify_to_localize])
def test_thresholds_must_be_ordered(function, thresholds):
    positive_iou, negative_iou = thresholds
    with pytest.raises(ValueError, match="negative_iou must be above 0 and at most positive_iou"):
        function(
            torch.zeros(1, 2),
            torch.zeros(1, 2),
            positive_iou=positive_iou,
            negative_iou=negative_iou,
        )


@pytest.mark.parametrize("function", [localize_to_classify, classify_to_localize])
def test_shapes_must_agree(function):
    with pytest.raises(ValueError, match=r"same shape .*got \(1, 2\) and \(1, 3\)"):
        function(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu():
    matrices = scene(3)
    for function, other in ((localize_to_classify, 1), (classify_to_localize, 2)):
        expected = function(matrices[0], matrices[other])
        got = function(matrices[0].cuda(), matrices[other].cuda())
        assert_same([tensor.cpu() for tensor in got], expected)
    both = guide_mutually(*(matrix.cuda() for matrix in matrices))
    for got, expected in zip(both, guide_mutually(*matrices), strict=True):
        assert_same([tensor.cpu() for tensor in got], expected)
