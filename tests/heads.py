"""ROI heads on random proposals, and the switches of PISA and OHEM."""

import copy

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from toys import BASELINE, make_inputs, small_config

ISR_P = ("MODEL.PISA.ISR_POSITIVE.ENABLED", True)
CARL = ("MODEL.PISA.CARL.ENABLED", True)
ISR_N = ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "score_hlr")
OHEM = ("MODEL.ROI_HEADS.POSITIVE_SAMPLER", "ohem", "MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem")
CASCADE = ("MODEL.ROI_HEADS.NAME", "LibraCascadeROIHeads")
CASCADE += ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
FEW = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32)


def as_proposals(inputs, num_proposals=200):
    """Random proposals, some of them near the ground truths."""
    generator = torch.Generator().manual_seed(5)
    proposals = []
    for x in inputs:
        targets = x["instances"]
        boxes = torch.rand(num_proposals, 4, generator=generator) * 60
        boxes[:, 2:] += boxes[:, :2] + 1
        if len(targets):
            near = num_proposals // 3
            boxes[:near] = targets.gt_boxes.tensor[torch.arange(near) % len(targets)]
            boxes[:near] += torch.randn(near, 4, generator=generator) * 3
            boxes[:near, 2:] = torch.maximum(boxes[:near, 2:], boxes[:near, :2] + 1)
        image = Instances(targets.image_size)
        image.proposal_boxes = Boxes(boxes)
        image.objectness_logits = torch.zeros(num_proposals)
        proposals.append(image)
    return proposals


def run_heads(*opts, num_objects=(3, 0, 2), seed=0):
    """ROI heads with large random weights, and what they sample and lose on random proposals."""
    torch.manual_seed(seed)
    model = build_model(small_config(BASELINE, *opts)).train()
    heads = model.roi_heads
    for parameter in heads.parameters():
        parameter.data.mul_(5)
    inputs = make_inputs(num_objects)
    generator = torch.Generator().manual_seed(1)
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    shape = (len(inputs), 64)
    features = {
        name: torch.randn(*shape, 96 // s, 128 // s, generator=generator)
        for name, s in strides.items()
    }
    proposals, targets = as_proposals(inputs), [x["instances"] for x in inputs]
    torch.manual_seed(2)
    with EventStorage() as storage:
        sampled, losses = heads(None, features, copy.deepcopy(proposals), targets)
    logged = {k: v for k, (v, _) in storage.latest().items()}
    return heads, features, proposals, targets, sampled, losses, logged


def predict(heads, features, boxes):
    """Logits and deltas of boxes, a list of (P, 4) an image."""
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], list(map(Boxes, boxes)))
    return heads.box_predictor(heads.box_head(pooled))


def sampled_positions(image, candidates):
    """Which of the candidates were sampled, as a mask; no two of them are the same box."""
    equal = (image.proposal_boxes.tensor[:, None] == candidates[None]).all(dim=2)
    assert (equal.sum(dim=1) == 1).all()
    return equal.any(dim=0)
