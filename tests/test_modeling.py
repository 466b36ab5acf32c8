"""Adapters: equal to detectron2 at defaults, every switch alone and with every other."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from toys import BASELINE, LIBRA, PLAIN, make_inputs, small_config, toy_config, train_step

from libra_d2.losses import balanced_l1_loss
from libra_d2.modeling import LibraRPN

# Each switch of Libra R-CNN, and what it is off.
SWITCHES = {
    "MODEL.BFP.ENABLED": False,
    "MODEL.RPN.NEGATIVE_POSITIVE_UB": -1,
    "MODEL.RPN.LOSS_NORMALIZER": "batch_size",
    "MODEL.ROI_HEADS.POSITIVE_SAMPLER": "random",
    "MODEL.ROI_HEADS.NEGATIVE_SAMPLER": "random",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "smooth_l1",
}


class TestAtDefaults:
    def test_computes_what_its_parent_does_bit_for_bit(self):
        losses, gradients, _, model = train_step(small_config(BASELINE))
        expected_losses, expected_gradients, _, parent = train_step(small_config(BASELINE, *PLAIN))
        assert type(model.roi_heads).__name__ == "LibraROIHeads"
        assert type(parent.roi_heads).__name__ == "StandardROIHeads"
        assert type(model.roi_heads.proposal_matcher) is Matcher
        torch.testing.assert_close(losses, expected_losses, rtol=0, atol=0)
        torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=0)

    def test_ignored_proposals_of_images_without_objects(self):
        """There the parent overrides the matcher's labels; so does this, at its defaults."""
        opts = ["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.1, 0.5]]
        opts += ["MODEL.ROI_HEADS.IOU_LABELS", [-1, 0, 1]]
        inputs = make_inputs((0, 2))
        losses = train_step(small_config(BASELINE, *opts), inputs)[0]
        expected = train_step(small_config(BASELINE, *opts, *PLAIN), inputs)[0]
        torch.testing.assert_close(losses, expected, rtol=0, atol=0)

    def test_masks_and_keypoints_draw_the_same_weights(self):
        opts = ["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True]
        opts += ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
        states = []
        for plain in ([], PLAIN):
            torch.manual_seed(0)
            states.append(build_model(small_config(BASELINE, *opts, *plain)).state_dict())
        torch.testing.assert_close(*states, rtol=0, atol=0)

    @torch.no_grad()
    def test_detects_what_its_parent_does(self):
        detections = []
        for plain in ([], PLAIN):
            torch.manual_seed(0)
            model = build_model(small_config(BASELINE, *plain)).eval()
            detections.append(model(make_inputs())[0]["instances"])
        own, expected = detections
        assert len(own) == len(expected) > 0
        assert torch.equal(own.scores, expected.scores)
        assert torch.equal(own.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(own.pred_classes, expected.pred_classes)


class TestSwitches:
    @pytest.mark.parametrize("switch", list(SWITCHES))
    def test_one_override_switches_it_off(self, switch):
        """What it does is tested elsewhere; here, that the override reaches it."""
        opts = ["MODEL.BACKBONE.NAME", "build_bfp_backbone"]
        opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32]
        on = train_step(small_config(LIBRA, *opts))
        off = train_step(small_config(LIBRA, *opts, switch, SWITCHES[switch]))
        assert any(on[0][name] != off[0][name] for name in on[0])

    @pytest.mark.parametrize(
        "num_objects",
        [(0, 0), (1, 1), (100, 40), (0, 100)],
        ids=["none", "one", "more than samples", "none and many"],
    )
    @pytest.mark.parametrize("reference", ["paper", "mmdet"])
    def test_any_number_of_objects_trains(self, num_objects, reference):
        cfg = small_config(
            LIBRA,
            *("MODEL.BACKBONE.NAME", "build_bfp_backbone", "MODEL.LIBRA.REFERENCE", reference),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
        )
        losses, _, logged, _ = train_step(cfg, make_inputs(num_objects))
        assert all(loss.isfinite() for loss in losses.values())
        assert ("roi_head/min_positives_per_gt" in logged) == (max(num_objects) > 0)

    def test_fewer_candidates_than_samples_and_ignored_ones_train(self):
        cfg = small_config(
            LIBRA,
            *("MODEL.BACKBONE.NAME", "build_bfp_backbone"),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 5),
            *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.5]),
            *("MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1]),
        )
        losses, _, logged, _ = train_step(cfg)
        assert all(loss.isfinite() for loss in losses.values())
        assert logged["roi_head/num_fg_samples"] + logged["roi_head/num_bg_samples"] <= 8


def test_sampled_numbers_are_logged():
    """They are those of the proposals that come back."""
    cfg = small_config(
        LIBRA,
        *("MODEL.BACKBONE.NAME", "build_bfp_backbone"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
    )
    heads = build_model(cfg).roi_heads
    inputs = [x["instances"] for x in make_inputs((3, 0, 1))]
    generator = torch.Generator().manual_seed(5)
    proposals = []
    for targets in inputs:
        boxes = torch.rand(300, 4, generator=generator) * 60
        boxes[:, 2:] += boxes[:, :2] + 1
        if len(targets):
            boxes[:100] = targets.gt_boxes.tensor[torch.arange(100) % len(targets)]
            boxes[:100] += torch.randn(100, 4, generator=generator) * 4
            boxes[:100, 2:] = torch.maximum(boxes[:100, 2:], boxes[:100, :2] + 1)
        image = copy.copy(targets).__class__(targets.image_size)
        image.proposal_boxes = Boxes(boxes)
        image.objectness_logits = torch.zeros(300)
        proposals.append(image)
    with EventStorage() as storage:
        sampled = heads.label_and_sample_proposals(proposals, inputs)
    logged = {k: v for k, (v, _) in storage.latest().items()}

    counts, bins = [], torch.zeros(3)
    for image, targets in zip(sampled, inputs, strict=True):
        background = image.gt_classes == 10
        ious = pairwise_iou(targets.gt_boxes, image.proposal_boxes)
        best = ious.amax(0) if len(targets) else torch.zeros(len(image))
        bins += torch.histc(best[background], bins=3, min=0, max=0.5)
        if len(targets):
            counts += ious.argmax(0)[~background].bincount(minlength=len(targets)).tolist()
            assert torch.equal(image.gt_indices, ious.argmax(0))
    for k in range(3):
        assert logged[f"roi_head/negative_iou_bin{k}"] == pytest.approx(bins[k] / bins.sum())
    assert logged["roi_head/min_positives_per_gt"] == min(counts)
    assert logged["roi_head/max_positives_per_gt"] == max(counts)


class TestBalancedL1:
    def loss(self, cls_agnostic, reference="paper", classes=(2, 10, 0)):
        opts = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", cls_agnostic]
        opts += ["MODEL.LIBRA.REFERENCE", reference, "MODEL.ROI_BOX_HEAD.BALANCED_L1.BETA", 0.2]
        cfg = small_config(LIBRA, *opts)
        predictor = build_model(cfg).roi_heads.box_predictor
        proposals = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30], [3, 3, 9, 12]])
        targets = proposals + torch.tensor([1.0, -1, 2, 3])
        deltas = torch.linspace(-1, 1, 3 * (4 if cls_agnostic else 40)).view(3, -1)
        classes = torch.tensor(classes)
        deltas.requires_grad_()
        loss = predictor.box_reg_loss(proposals, targets, deltas, classes)
        wanted = predictor.box2box_transform.get_deltas(proposals, targets)
        expected = 0.0
        for i, c in enumerate(classes.tolist()):
            if c < 10:
                own = deltas[i] if cls_agnostic else deltas[i].view(10, 4)[c]
                expected += balanced_l1_loss(
                    own, wanted[i], beta=0.2, reduction="sum", reference=reference
                )
        return loss, expected / 3, deltas

    @pytest.mark.parametrize("cls_agnostic", [True, False])
    @pytest.mark.parametrize("reference", ["paper", "mmdet"])
    def test_is_over_the_true_class_and_divided_by_all_rois(self, cls_agnostic, reference):
        loss, expected, _ = self.loss(cls_agnostic, reference)
        torch.testing.assert_close(loss, expected)

    def test_without_foreground_is_a_differentiable_zero(self):
        loss, _, deltas = self.loss(False, classes=(10, 10, 10))
        loss.backward()
        assert loss.item() == 0 and deltas.grad.abs().sum() == 0

    @pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
    def test_detectron2s_losses_still_work(self, loss_type):
        cfg = small_config(BASELINE, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", loss_type)
        plain = small_config(BASELINE, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", loss_type, *PLAIN)
        torch.testing.assert_close(train_step(cfg)[0], train_step(plain)[0], rtol=0, atol=0)


class TestRPN:
    def labels(self, bound, num_positives, num_negatives):
        cfg = toy_config(BASELINE, "MODEL.RPN.NEGATIVE_POSITIVE_UB", bound)
        rpn = build_model(cfg).proposal_generator
        assert isinstance(rpn, LibraRPN)
        label = torch.full((2000,), -1, dtype=torch.int8)
        label[:num_positives], label[1000 : 1000 + num_negatives] = 1, 0
        out = rpn._subsample_labels(label.clone())
        assert ((out == -1) | (out == label)).all()
        return (out == 1).sum().item(), (out == 0).sum().item()

    @pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("available", [(3, 900), (500, 900), (500, 20), (0, 900), (0, 0)])
    def test_samples_are_the_parents_to_the_bit(self, available, fraction):
        cfg = toy_config(BASELINE, "MODEL.RPN.POSITIVE_FRACTION", fraction)
        rpn = build_model(cfg).proposal_generator
        assert isinstance(rpn, LibraRPN)
        label = torch.full((2000,), -1, dtype=torch.int8)
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
        label[order[: available[0]]], label[order[1000 : 1000 + available[1]]] = 1, 0
        torch.manual_seed(2)
        own, after = rpn._subsample_labels(label.clone()), torch.rand(1)
        torch.manual_seed(2)
        assert torch.equal(own, RPN._subsample_labels(rpn, label.clone()))
        assert torch.equal(after, torch.rand(1))  # no more and no less was drawn

    @pytest.mark.parametrize(
        ("bound", "available", "sampled"),
        [
            (5, (3, 900), (3, 15)),
            (5, (0, 900), (0, 5)),
            (5, (0, 2), (0, 2)),
            (5, (500, 900), (128, 128)),
            (1, (10, 900), (10, 10)),
            (-1, (3, 900), (3, 253)),
        ],
    )
    def test_at_most_so_many_negatives_a_positive(self, bound, available, sampled):
        assert self.labels(bound, *available) == sampled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trains_on_a_gpu_under_amp(dtype):
    cfg = small_config(LIBRA, "MODEL.BACKBONE.NAME", "build_bfp_backbone", "MODEL.DEVICE", "cuda")
    model = build_model(cfg).train()
    with EventStorage(), torch.autocast("cuda", dtype):
        losses = model(make_inputs())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
