"""Every pair of values of any two switches, in as few models as cover them all."""

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from toys import BASELINE, RETINANET, make_inputs, toy_config

OFF_ON = (False, True)
TWO_STAGE = {
    "positives": ("random", "instance_balanced", "ohem"),
    "negatives": ("random", "iou_balanced", "ohem", "score_hlr"),
    "box loss": ("smooth_l1", "giou", "balanced_l1"),
    "backbone": ("fpn", "bfp non_local", "bfp conv", "bfp none", "pafpn", "bfp of pafpn"),
    "cascade": OFF_ON,
    "mask": OFF_ON,
    "reference": ("paper", "mmdet"),
    "isr_p": OFF_ON,
    "carl": OFF_ON,
    "amp": OFF_ON,
}
ONE_STAGE = {
    "cls loss": ("focal", "balanced_ce", "ohem"),
    "box loss": ("smooth_l1", "giou", "balanced_l1"),
    "backbone": ("fpn", "bfp non_local", "bfp conv", "bfp none", "pafpn", "bfp of pafpn"),
    "matcher": ("max_iou", "mutual_guidance"),
    "reference": ("paper", "mmdet"),
    "isr_p": OFF_ON,
    "carl": OFF_ON,
    "amp": OFF_ON,
}


def pairs_of(row):
    """The pairs of (factor, value) in a row."""
    return set(itertools.combinations(sorted(row.items(), key=lambda item: item[0]), 2))


def covering_rows(factors):
    """Rows, each a value of every factor, among which every pair of values occurs.

    Greedy: each row starts with a pair that is missing and adds, factor by factor, the value that
    covers most of the missing pairs.
    """
    values = [[(name, value) for value in choices] for name, choices in sorted(factors.items())]
    missing = set()
    for a, b in itertools.combinations(values, 2):
        missing |= set(itertools.product(a, b))
    rows = []
    while missing:
        row = dict(min(missing, key=str))
        for name in sorted(factors):
            if name not in row:
                covered = {
                    value: len(pairs_of({**row, name: value}) & missing) for value in factors[name]
                }
                row[name] = max(covered, key=lambda value: (covered[value], str(value)))
        missing -= pairs_of(row)
        rows.append(row)
    return rows


def options(row, one_stage):
    """Config overrides of a row."""
    plain = "build_retinanet_resnet_{}_backbone" if one_stage else "build_resnet_{}_backbone"
    pyramid = plain.format("pafpn" if "pafpn" in row["backbone"] else "fpn")
    opts = {
        "MODEL.BACKBONE.NAME": pyramid,
        "MODEL.LIBRA.REFERENCE": row["reference"],
        "MODEL.PISA.ISR_POSITIVE.ENABLED": row["isr_p"],
        "MODEL.PISA.CARL.ENABLED": row["carl"],
        "MODEL.BACKBONE.FREEZE_AT": 0,
    }
    if "bfp" in row["backbone"]:
        opts["MODEL.BACKBONE.NAME"] = "build_bfp_backbone"
        opts["MODEL.BFP.FPN_BUILDER"] = pyramid
        opts["MODEL.BFP.REFINE_LEVEL"] = 1 if one_stage else 2
        kind = row["backbone"].removeprefix("bfp ")
        opts["MODEL.BFP.REFINE_TYPE"] = "non_local" if kind == "of pafpn" else kind
    if one_stage:
        opts["MODEL.RETINANET.CLS_LOSS_TYPE"] = row["cls loss"]
        opts["MODEL.RETINANET.BBOX_REG_LOSS_TYPE"] = row["box loss"]
        opts["MODEL.RETINANET.MATCHER"] = row["matcher"]
        opts["MODEL.RETINANET.PRIOR_PROB"] = 0.1  # so that a new model detects something
    else:
        opts["MODEL.ROI_HEADS.POSITIVE_SAMPLER"] = row["positives"]
        opts["MODEL.ROI_HEADS.NEGATIVE_SAMPLER"] = row["negatives"]
        opts["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"] = row["box loss"]
        opts["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] = 32
        opts["MODEL.MASK_ON"] = row["mask"]
        if row["cascade"]:
            opts["MODEL.ROI_HEADS.NAME"] = "LibraCascadeROIHeads"
            opts["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"] = True
    return itertools.chain(*opts.items())


def train_and_evaluate(cfg, amp, masks):
    """Two steps with SGD, then detections; returns the losses and gradients of the last step."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    inputs = make_inputs((3, 0, 2), masks=masks)
    for _ in range(2):
        optimizer.zero_grad()
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses = model(inputs)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        detections = model.eval()(inputs)
    assert len(detections) == 3
    assert all(x["instances"].pred_boxes.tensor.isfinite().all() for x in detections)
    return losses, {n: p.grad.abs().sum() for n, p in model.named_parameters()}


@pytest.mark.parametrize("factors", [TWO_STAGE, ONE_STAGE], ids=["two-stage", "one-stage"])
def test_rows_cover_every_pair(factors):
    rows = covering_rows(factors)
    covered = set().union(*map(pairs_of, rows))
    for (a, own), (b, others) in itertools.combinations(sorted(factors.items()), 2):
        assert all(((a, x), (b, y)) in covered for x, y in itertools.product(own, others))
    assert len(rows) < 40


@pytest.mark.parametrize(
    "row", covering_rows(TWO_STAGE), ids=lambda row: "-".join(str(v) for v in row.values())
)
def test_two_stage(row):
    cfg = toy_config(BASELINE, *options(row, one_stage=False))
    losses, gradients = train_and_evaluate(cfg, row["amp"], row["mask"])
    stages = [f"_stage{i}" for i in range(3)] if row["cascade"] else [""]
    expected = {f"{name}{stage}" for stage in stages for name in ("loss_cls", "loss_box_reg")}
    expected |= {f"loss_carl{stage}" for stage in stages if row["carl"]}
    expected |= {"loss_rpn_cls", "loss_rpn_loc"} | ({"loss_mask"} if row["mask"] else set())
    assert set(losses) == expected
    for name, total in gradients.items():
        if name.endswith(("cls_score.weight", "bbox_pred.weight", "predictor.weight")):
            assert total > 0, name
    if row["backbone"] in ("bfp non_local", "bfp conv", "bfp of pafpn"):
        assert any("bfp" in name and total > 0 for name, total in gradients.items())


@pytest.mark.parametrize(
    "row", covering_rows(ONE_STAGE), ids=lambda row: "-".join(str(v) for v in row.values())
)
def test_one_stage(row):
    cfg = toy_config(RETINANET, *options(row, one_stage=True))
    losses, gradients = train_and_evaluate(cfg, row["amp"], masks=False)
    expected = {"loss_cls", "loss_box_reg"} | ({"loss_carl"} if row["carl"] else set())
    assert set(losses) == expected
    assert gradients["head.cls_score.weight"] > 0 and gradients["head.bbox_pred.weight"] > 0
    if row["backbone"] in ("bfp non_local", "bfp conv", "bfp of pafpn"):
        assert any("bfp" in name and total > 0 for name, total in gradients.items())
