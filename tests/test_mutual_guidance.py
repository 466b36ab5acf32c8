"""Mutual Guidance in LibraRetinaNet: labels, normalizers, and what is logged."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from toys import call_losses, make_inputs, one_level, small_retinanet

from libra_d2.matching import classify_to_localize, localize_to_classify
from libra_d2.modeling import MutualGuidanceMatcher, overlaps


class TestMutualGuidance:
    OPTS = ("MODEL.RETINANET.MATCHER", "mutual_guidance")

    def test_each_task_is_normalised_by_its_own_positives_once_a_step(self):
        model, anchors, logits, deltas, labels, gt_boxes = one_level(*self.OPTS)
        box_labels = torch.full_like(labels, 10)
        box_labels[:, :7] = 3
        both = call_losses(
            model,
            *(anchors, logits, deltas, labels, gt_boxes),
            box_targets=(list(box_labels), list(gt_boxes)),
        )
        num_cls = ((labels >= 0) & (labels < 10)).sum().item()
        assert model.loss_normalizer == pytest.approx(90 + num_cls / 10)
        assert model.box_loss_normalizer == pytest.approx(90 + 14 / 10)
        other = one_level()[0]
        cls_alone = call_losses(other, anchors, logits, deltas, labels, gt_boxes)
        box_alone = call_losses(one_level()[0], anchors, logits, deltas, box_labels, gt_boxes)
        assert both["loss_cls"] == cls_alone["loss_cls"]
        assert both["loss_box_reg"] == box_alone["loss_box_reg"]
        box_targets = (list(box_labels), list(gt_boxes))
        call_losses(model, anchors, logits, deltas, labels, gt_boxes, box_targets=box_targets)
        assert model.box_loss_normalizer == pytest.approx(0.9 * 91.4 + 1.4)

    def label(self, *opts, num_objects=(3, 0, 1)):
        """A model, what it predicts in a batch, and how that labels the anchors."""
        torch.manual_seed(0)
        model = build_model(small_retinanet(*self.OPTS, *opts)).train()
        inputs = make_inputs(num_objects)
        gt_instances = [x["instances"] for x in inputs]
        images = model.preprocess_image(inputs)
        features = [model.backbone(images.tensor)[f] for f in model.head_in_features]
        anchors = Boxes.cat(model.anchor_generator(features))
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(len(inputs), len(anchors), 10, generator=generator)
        deltas = torch.randn(len(inputs), len(anchors), 4, generator=generator) * 0.2
        with EventStorage() as storage:
            labels = model.prediction_matcher(
                anchors, logits, deltas, gt_instances, model.box2box_transform
            )
        logged = {k: v for k, (v, _) in storage.latest().items()}
        return model, anchors, logits, deltas, gt_instances, labels, logged

    def test_labels_are_those_of_the_matching_functions(self):
        model, anchors, logits, deltas, gt_instances, labels, logged = self.label()
        agreed, ious = 0, []
        for i, gt in enumerate(gt_instances):
            gt_labels, cls_boxes = labels[0][i], labels[1][i]
            box_labels, gt_boxes = labels[2][0][i], labels[2][1][i]
            if len(gt) == 0:
                assert (gt_labels == 10).all() and (box_labels == 10).all()
                continue
            boxes = Boxes(model.box2box_transform.apply_deltas(deltas[i], anchors.tensor))
            anchor_ious = pairwise_iou(gt.gt_boxes, anchors)
            regressed_ious = pairwise_iou(gt.gt_boxes, boxes)
            scores = logits[i].sigmoid()[:, gt.gt_classes].t()
            cls_gt, cls_labels = localize_to_classify(anchor_ious, regressed_ious)
            box_gt, expected_box = classify_to_localize(anchor_ious, scores, sigma=2.0)
            assert torch.equal(gt_labels == -1, cls_labels == -1)
            assert torch.equal(gt_labels == 10, cls_labels == 0)
            positive, regressed = cls_labels == 1, expected_box == 1
            assert torch.equal(gt_labels[positive], gt.gt_classes[cls_gt[positive]])
            assert torch.equal(cls_boxes[positive], gt.gt_boxes.tensor[cls_gt[positive]])
            assert torch.equal(box_labels < 10, regressed)
            assert torch.equal(gt_boxes[regressed], gt.gt_boxes.tensor[box_gt[regressed]])
            agreed += (positive & regressed & (cls_gt == box_gt)).sum().item()
            ious += regressed_ious[cls_gt, torch.arange(len(anchors))][positive].tolist()
        assert logged["mutual_guidance/agreed_anchors"] == pytest.approx(agreed / 3) and agreed
        assert logged["mutual_guidance/regressed_iou"] == pytest.approx(sum(ious) / len(ious))

    def test_a_batch_as_a_whole_is_labelled_as_one_by_one(self, monkeypatch):
        numbers = {"num_objects": (3, 0, 1, 7, 0)}
        one_by_one, logged = self.label(**numbers)[-2:]
        monkeypatch.setattr(overlaps, "_PAIRS_AT_ONCE", 10**9)  # as on a GPU
        whole, logged_of_whole = self.label(**numbers)[-2:]
        for a, b in zip((*one_by_one[:2], *one_by_one[2]), (*whole[:2], *whole[2]), strict=True):
            assert len(a) == 5 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert logged_of_whole == pytest.approx(logged)

    def test_options_come_from_the_config(self):
        opts = ["MODEL.RETINANET.MUTUAL_GUIDANCE.SIGMA", 3.0]
        opts += ["MODEL.RETINANET.IOU_THRESHOLDS", [0.3, 0.6]]
        matcher = build_model(small_retinanet(*self.OPTS, *opts)).prediction_matcher
        expected = MutualGuidanceMatcher(sigma=3.0, positive_iou=0.6, negative_iou=0.3)
        assert matcher == expected

    def test_half_precision_predictions_give_float32_labels(self):
        matcher = MutualGuidanceMatcher(sigma=2.0, positive_iou=0.5, negative_iou=0.4)
        model, anchors, logits, deltas, gt_instances, _, _ = self.label()
        with EventStorage():
            half, single = (
                matcher(
                    anchors,
                    logits.bfloat16().to(dtype),
                    deltas.bfloat16().to(dtype),
                    gt_instances,
                    model.box2box_transform,
                )
                for dtype in (torch.bfloat16, torch.float32)
            )
        for a, b in zip((*half[:2], *half[2]), (*single[:2], *single[2]), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def test_nothing_is_logged_of_predictions_where_there_are_no_objects(self):
        *_, logged = self.label(num_objects=(0, 0))
        assert logged == {"mutual_guidance/agreed_anchors": 0.0}
