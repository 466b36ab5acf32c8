"""What a trained detector sees and predicts, on annotated images.

Shape shorthand in this module:

    G: number of ground truths of an image
    K: number of classes
    P: number of proposals of an image
    R: number of anchors of an image
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from libra_d2.engine import LazyTrainer, LibraTrainer
from libra_d2.engine.following import input_picture
from libra_d2.engine.lazy_config import RunConfig
from libra_d2.engine.own_data import register_data
from libra_d2.inference.detector import Detector
from libra_d2.modeling import Matches
from libra_d2.modeling.samplers import Predictions

__all__ = ["Candidates", "annotated_images", "candidates_of", "dense_predictions", "picture_of"]


def annotated_images(detector: Detector, number: int, start: int = 0) -> Iterator[dict]:
    """Images of the first of ``DATASETS.TEST``, resized as in tests, with ``instances``.

    Raises:
        ValueError: if there is no such data set, or no image from ``start`` on.
    """
    cfg = detector.cfg
    if not isinstance(cfg, RunConfig):  # keypoints, which are not looked at, need the training data
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.KEYPOINT_ON = False
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name a data set with --val")
    try:
        register_data(cfg, eval_only=True)
        trainer = LazyTrainer if isinstance(cfg, RunConfig) else LibraTrainer
        batches = trainer.build_loss_loader(cfg, cfg.DATASETS.TEST[0])
    except (AssertionError, KeyError, OSError) as error:
        raise ValueError(
            f"the data set '{cfg.DATASETS.TEST[0]}' cannot be read here ({error}); name another "
            "with --val"
        ) from error
    found = 0
    for batch in islice(batches, start, start + number):
        found += 1
        yield from batch
    if found == 0:
        raise ValueError(f"'{cfg.DATASETS.TEST[0]}' has no image {start}, counted from 0")


def picture_of(detector: Detector, image: dict) -> np.ndarray:
    """An image as it goes into the model, (H, W, 3) uint8, RGB."""
    return input_picture(image, detector.cfg.INPUT.FORMAT)


@dataclass
class Candidates:
    """An image's proposals, as a sampler sees them."""

    boxes: Tensor  # (P, 4) in pixels of the input
    matches: Matches
    truths: Instances


@torch.no_grad()
def candidates_of(detector: Detector, image: dict) -> Candidates:
    """The proposals of an image and what the (first) box head predicts for them.

    Labels are by the thresholds of the model's heads; proposals are as many as in tests.

    Raises:
        ValueError: if the model has no proposals.
    """
    model = detector.model
    heads = getattr(model, "roi_heads", None)
    if not isinstance(model, GeneralizedRCNN) or not isinstance(heads, StandardROIHeads):
        raise ValueError(f"a {type(model).__name__} has no proposals; give a two-stage detector")
    images = model.preprocess_image([image])
    features = model.backbone(images.tensor)
    (proposals,), _ = model.proposal_generator(images, features, None)
    truths = image["instances"].to(model.device)
    boxes = proposals.proposal_boxes
    levels = [features[name] for name in heads.box_in_features]
    if isinstance(heads, CascadeROIHeads):
        logits, deltas = heads._run_stage(levels, [proposals], 0)
        predictor = heads.box_predictor[0]
    else:
        predictor = heads.box_predictor
        logits, deltas = predictor(heads.box_head(heads.box_pooler(levels, [boxes])))
    decoded = predictor.box2box_transform.apply_deltas(deltas, boxes.tensor).unflatten(1, (-1, 4))
    rows, best = torch.arange(len(boxes), device=model.device), logits[:, :-1].argmax(dim=1)
    if decoded.shape[1] == 1:  # one box for all classes
        best = torch.zeros_like(best)
    predictions = Predictions(logits, decoded[rows, best], truths.gt_classes)
    quality = pairwise_iou(truths.gt_boxes, boxes)
    matcher = getattr(heads.proposal_matcher, "matcher", heads.proposal_matcher)
    index, labels = matcher(quality)
    ious = quality.amax(dim=0) if len(truths) else torch.zeros(len(boxes), device=model.device)
    return Candidates(boxes.tensor, Matches(ious, index, labels, predictions), truths)


@torch.no_grad()
def dense_predictions(detector: Detector, image: dict) -> tuple[Boxes, Tensor, Tensor]:
    """Anchors (R, 4), logits (R, K) and deltas (R, 4) of a RetinaNet on an image.

    Raises:
        ValueError: if the model is another.
    """
    model = detector.model
    if not isinstance(model, RetinaNet):
        raise ValueError(f"a {type(model).__name__} has no anchors of classes; give a RetinaNet")
    features = model.backbone(model.preprocess_image([image]).tensor)
    features = [features[name] for name in model.head_in_features]
    anchors = Boxes.cat(model.anchor_generator(features))
    logits, deltas = model._transpose_dense_predictions(
        model.head(features), [model.num_classes, 4]
    )
    return anchors, torch.cat(logits, dim=1)[0], torch.cat(deltas, dim=1)[0]
