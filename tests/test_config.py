"""Values of configs: those shipped, and what is refused in one sentence."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from toys import CONFIGS, LIBRA, RETINANET, toy_config

from libra_d2.engine import load_config
from libra_d2.modeling import ScoreHlrSampler

SHIPPED = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("config", SHIPPED)
def test_shipped_configs_are_valid(config):
    cfg = load_config(str(CONFIGS / config), ["MODEL.DEVICE", "cpu"])
    assert cfg.is_frozen() and cfg.SOLVER.MAX_ITER > 0


@pytest.mark.parametrize(
    "config", [c for c in SHIPPED if not Path(c).name.startswith("Base") and "Demo" not in c]
)
def test_shipped_configs_write_to_folders_of_their_own(config):
    cfg = load_config(str(CONFIGS / config), ["MODEL.DEVICE", "cpu"])
    assert Path(cfg.OUTPUT_DIR).name == Path(config).stem


def test_schedules_are_those_of_the_paper():
    cfg = load_config(str(CONFIGS / LIBRA))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((60000, 80000), 90000)
    assert cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE == 256 and cfg.MODEL.RPN.NEGATIVE_POSITIVE_UB == 5
    assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 512
    assert cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION == 0.25


def test_device_is_what_there_is_unless_given():
    assert load_config(str(CONFIGS / LIBRA)).MODEL.DEVICE == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    assert toy_config(LIBRA, "MODEL.DEVICE", "cpu").MODEL.DEVICE == "cpu"


CASCADE = ["MODEL.ROI_HEADS.NAME", "LibraCascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        (["MODEL.BFP.REFINE_LEVL", 1], "no key MODEL.BFP.REFINE_LEVL.*'MODEL.BFP.REFINE_LEVEL'"),
        (["MODEL.BFP"], "pairs KEY VALUE"),
        (["MODEL.BFP.REFINE_LEVEL", "high"], "REFINE_LEVEL must be an int such as 2, got high"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR must be a float such as 0.02, got fast"),
        (["SOLVER.MAX_ITER", None], "SOLVER.MAX_ITER must be an int such as 40000, got None"),
        (["MODEL.LIBRA.REFERENCE", "mmdetection"], "did you mean 'mmdet'.*paper, mmdet"),
        (["MODEL.BFP.REFINE_TYPE", "nonlocal"], "did you mean 'non_local'"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balanced_11"], "did you mean 'balanced_l1'"),
        (
            ["MODEL.ROI_BOX_HEAD.BALANCED_L1.ALPHA", 0.0],
            "ROI_BOX_HEAD.BALANCED_L1.ALPHA must be a positive",
        ),
        (
            ["MODEL.ROI_BOX_HEAD.BALANCED_L1.GAMMA", -1.0],
            "BALANCED_L1.GAMMA must be a positive number",
        ),
        (
            ["MODEL.ROI_BOX_HEAD.BALANCED_L1.BETA", 0.0],
            "BALANCED_L1.BETA must be a positive number",
        ),
        (
            ["MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.5],
            r"ROI_HEADS.POSITIVE_FRACTION must be in \[0.0, 1.0\]",
        ),
        (["MODEL.RPN.POSITIVE_FRACTION", -0.5], r"RPN.POSITIVE_FRACTION must be in \[0.0, 1.0\]"),
        (["MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_FRACTION", 2.0], "FLOOR_FRACTION must be in"),
        (["MODEL.ROI_HEADS.IOU_BALANCED.FLOOR_IOU", 0.7], "FLOOR_IOU must be below"),
        (
            ["MODEL.ROI_HEADS.IOU_BALANCED.NUM_BINS", 0],
            r"NUM_BINS must be in \[1, 100\]",
        ),
        (["SOLVER.OPTIMIZER", "Adam"], "did you mean 'AdamW'"),
        (
            ["NEGATIVE_SAMPLER", "ohem"],
            "did you mean 'MODEL.RPN.NEGATIVE_SAMPLER' or 'MODEL.ROI_HEADS.NEGATIVE_SAMPLER'",
        ),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"], "did you mean 'WarmupCosineLR'"),
        (["SOLVER.IMS_PER_BATCH", 0], r"SOLVER.IMS_PER_BATCH must be in \[1, .*, got 0"),
        (["SOLVER.MAX_ITER", -1], r"SOLVER.MAX_ITER must be in \[1, "),
        (["MODEL.BFP.NORM", "XX"], "MODEL.BFP.NORM 'XX' does not exist"),
        (["MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1]], "ROI_HEADS.IOU_LABELS must be one more than"),
        (
            ["MODEL.ROI_BOX_HEAD.BALANCED_L1.ALPHA", 0.01],
            "GAMMA must be between",
        ),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "MODEL.ROI_HEADS.NAME.*LibraROIHeads"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RPN"], "NEGATIVE_POSITIVE_UB 5 needs.*LibraRPN"),
        (["MODEL.DEVICE", "gpu"], "a device of torch such as cuda or cpu, got 'gpu'"),
        (
            ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"],
            "SOLVER.AMP.DTYPE float16 needs a GPU; on MODEL.DEVICE cpu use bfloat16",
        ),
        (["SOLVER.AMP.DTYPE", "half"], "SOLVER.AMP.DTYPE 'half' does not exist"),
        (
            ["MODEL.RETINANET.MATCHER", "mutual_guidance"],
            "MATCHER mutual_guidance needs MODEL.META_ARCHITECTURE LibraRetinaNet, got Generalized",
        ),
        (["MODEL.PISA.ISR_POSITIVE.K", 0.0], "MODEL.PISA.ISR_POSITIVE.K must be greater than 0"),
        (["MODEL.PISA.CARL.BIAS", 1.5], r"MODEL.PISA.CARL.BIAS must be in \[0, 1\], got 1.5"),
        (["MODEL.ROI_HEADS.SCORE_HLR.K", -1.0], "MODEL.ROI_HEADS.SCORE_HLR.K must be"),
        (["MODEL.ROI_HEADS.SCORE_HLR.K", "abc"], "SCORE_HLR.K must be a number, got abc"),
        (
            ["MODEL.ROI_HEADS.SCORE_HLR.K", 1.0, "MODEL.PISA.ISR_NEGATIVE.K", 3.0],
            "SCORE_HLR.K 1.0 is the former name of MODEL.PISA.ISR_NEGATIVE.K, which is 3.0",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "ProposalNetwork"],
            "needs .* of a two-stage detector, got ProposalNetwork",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "SemanticSegmentor"],
            "needs .* of a two-stage detector, got SemanticSegmentor",
        ),
        (["MODEL.ROI_HEADS.SCORE_HLR.NMS_THRESH", 1.5], "SCORE_HLR.NMS_THRESH must be in"),
        (
            ["MODEL.PISA.ISR_NEGATIVE.BIAS", 2.0],
            "PISA.ISR_NEGATIVE.BIAS must be in",
        ),
        (["MODEL.RPN.NEGATIVE_SAMPLER", "iou"], "RPN.NEGATIVE_SAMPLER 'iou' does not exist"),
        (["MODEL.RPN.IOU_BALANCED.FLOOR_IOU", 0.4], "RPN.IOU_BALANCED.FLOOR_IOU must be below"),
        (["MODEL.RPN.IOU_BALANCED.UPPER_IOU", "max"], "UPPER_IOU 'max' .*auto, background, image_"),
        (["MODEL.RPN.BALANCED_L1.FORM", "papers"], "RPN.BALANCED_L1.FORM .*did you mean 'paper'"),
        (
            ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.NEGATIVE_SAMPLER", "iou_balanced"],
            "needs MODEL.PROPOSAL_GENERATOR.NAME LibraRPN, got RPN",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "LibraRetinaNet"],
            "needs .* of a two-stage detector, got LibraRetinaNet",
        ),
        ([*CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.4)], "IOUS must be ascending"),
        (["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**20], r"must be in \[1, 1000000000\]"),
        (["MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]], "RPN.IOU_THRESHOLDS must be ascending"),
    ],
)
def test_bad_values_are_one_sentence(opts, match):
    with pytest.raises(ValueError, match=match) as error:
        load_config(str(CONFIGS / LIBRA), [str(opt) for opt in opts])
    assert "\n" not in str(error.value)


GUIDED = ["MODEL.RETINANET.MATCHER", "mutual_guidance"]
DETECTRON2S = ["MODEL.META_ARCHITECTURE", "RetinaNet"]


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        ([*GUIDED, *DETECTRON2S], "MATCHER mutual_guidance needs MODEL.META_ARCH.*got RetinaNet"),
        (["MODEL.RETINANET.CLS_LOSS_TYPE", "ohem", *DETECTRON2S], "needs.*LibraRetinaNet"),
        (
            ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1", *DETECTRON2S],
            "BBOX_REG_LOSS_TYPE balanced_l1 needs MODEL.META_ARCHITECTURE LibraRetinaNet",
        ),
        (
            ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_balanced"],
            "needs.*of a two-stage.*got LibraRetin",
        ),
        (["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "l1"], "BBOX_REG_LOSS_TYPE 'l1' does not exist"),
        (
            [*GUIDED, "MODEL.RETINANET.MUTUAL_GUIDANCE.SIGMA", 1.0],
            "GUIDANCE.SIGMA must be greater",
        ),
        ([*GUIDED, "MODEL.RETINANET.IOU_THRESHOLDS", [0.5, 0.4]], "must be ascending numbers"),
        ([*GUIDED, "MODEL.RETINANET.IOU_THRESHOLDS", [0.4, 1.5]], r"ascending numbers in \(0, 1\]"),
        (
            ["MODEL.RETINANET.IOU_THRESHOLDS", ["a", "b"]],
            "IOU_THRESHOLDS must be ascending numbers",
        ),
        (["MODEL.RETINANET.IOU_LABELS", [0, 2, 1]], r"IOU_LABELS must be 0 \(negative\)"),
        ([*GUIDED, "MODEL.RETINANET.IOU_LABELS", [0, 0, 1]], r"and IOU_LABELS \[0, -1, 1\]"),
        (["MODEL.RETINANET.IN_FEATURES", ["p4", "p3"]], "the finest first and each once"),
        (
            ["MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 1.0)],
            "BBOX_REG_WEIGHTS must be four positive",
        ),
        (["MODEL.MASK_ON", True], "MODEL.MASK_ON must be False for a one-stage"),
        (["MODEL.RETINANET.OHEM.NEGATIVE_POSITIVE_UB", 10**20], "must be -1"),
        (
            [
                *(*GUIDED, "MODEL.RETINANET.IOU_THRESHOLDS", [0.5]),
                *("MODEL.RETINANET.IOU_LABELS", [0, 1]),
            ],
            "IOU_THRESHOLDS must be two for MATCHER mutual_guidance",
        ),
        (["MODEL.RETINANET.IOU_LABELS", [0, 1]], "RETINANET.IOU_LABELS must be one more than"),
        (["MODEL.RETINANET.BALANCED_L1.ALPHA", 0.0], "RETINANET.BALANCED_L1.ALPHA must be"),
        (["MODEL.RETINANET.OHEM.NMS_THRESH", 1.5], r"OHEM.NMS_THRESH must be in \[0, 1\]"),
        (
            ["MODEL.RETINANET.OHEM.BATCH_SIZE_PER_IMAGE", 0],
            "PER_IMAGE must be at least 1",
        ),
        (["MODEL.RETINANET.OHEM.NEGATIVE_POSITIVE_UB", 0], r"must be -1 \(no bound\)"),
        (
            ["MODEL.RETINANET.PRIOR_PROB", 0.0],
            r"PRIOR_PROB must be in \[1e-09, 1\)",
        ),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", 1.5], r"FOCAL_LOSS_ALPHA must be in \[0, 1\]"),
        (["MODEL.RETINANET.FOCAL_LOSS_GAMMA", -1.0], "FOCAL_LOSS_GAMMA must not be negative"),
        (["MODEL.RETINANET.NUM_CONVS", 0], r"NUM_CONVS must be in \[1, "),
        (
            ["MODEL.RETINANET.CLIP_BOXES", "before_nms", *DETECTRON2S],
            "CLIP_BOXES before_nms needs MODEL.META_ARCHITECTURE LibraRetinaNet",
        ),
    ],
)
def test_bad_values_of_a_retinanet_are_one_sentence(opts, match):
    with pytest.raises(ValueError, match=match) as error:
        load_config(str(CONFIGS / RETINANET), [str(opt) for opt in opts])
    assert "\n" not in str(error.value)


SIGMOID = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]


@pytest.mark.parametrize(
    ("config", "opts", "match"),
    [
        (LIBRA, ["MODEL.RPN.NEGATIVE_POSITIVE_UB", 0], r"RPN.NEGATIVE_POSITIVE_UB must be -1 \(no"),
        (LIBRA, ["MODEL.RPN.LOSS_NORMALIZER", "mean"], "NORMALIZER 'mean' .*batch_size, sampled"),
        (LIBRA, ["MODEL.RPN.NEGATIVE_SAMPLER", "ohem"], "OhemSampler.* not for MODEL.RPN"),
        (LIBRA, ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "score_hlr", *SIGMOID], "ScoreHlr.*softmax"),
        (LIBRA, ["MODEL.ROI_HEADS.POSITIVE_SAMPLER", "ohem", *SIGMOID], "OhemSampler.*softmax"),
        (LIBRA, ["MODEL.PISA.CARL.ENABLED", True, *SIGMOID], "Carl.*needs the softmax"),
        (LIBRA, ["MODEL.PISA.ISR_POSITIVE.ENABLED", True, *SIGMOID], "IsrPositive.*the softmax"),
        (LIBRA, CASCADE[:2], "CLS_AGNOSTIC_BBOX_REG must be True with LibraCascadeROIHeads"),
        (LIBRA, [*CASCADE, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.6]], "the first of .*CASCADE_HEAD"),
        (
            LIBRA,
            [*CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6)],
            "BBOX_REG_WEIGHTS must be four positive numbers for each of the 2 stages",
        ),
        (RETINANET, ["MODEL.RETINANET.P7_ACTIVATION", "gelu"], "'gelu' .*auto, relu, none"),
        (RETINANET, ["MODEL.RETINANET.CLIP_BOXES", "no"], "'no' .*auto, after_nms, before_nms"),
        (RETINANET, ["MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT", -1.0], "WEIGHT must not be negative"),
    ],
)
def test_what_a_class_refuses_is_said_when_the_model_is_built(config, opts, match):
    with pytest.raises(ValueError, match=match) as error:
        build_model(toy_config(config, *opts))
    assert "\n" not in str(error.value)


def test_former_names_of_isr_negative_count():
    opts = ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "score_hlr", "MODEL.PISA.ISR_NEGATIVE.K", 3.0)
    former = ("MODEL.ROI_HEADS.SCORE_HLR.BIAS", 0.25, "MODEL.ROI_HEADS.SCORE_HLR.NMS_THRESH", 0.3)
    heads = build_model(toy_config(LIBRA, *opts, *former)).roi_heads
    expected = ScoreHlrSampler(score_thresh=0.05, nms_thresh=0.3, k=3.0, bias=0.25)
    assert heads.proposal_matcher.negative_sampler == expected


def test_focal_ablations_are_the_papers_table():
    """Each alpha, gamma, batch and threshold of table 1 (a), (b) and (d), on one baseline."""
    found = set()
    for config in SHIPPED:
        if "focal/table1" not in config:
            continue
        cfg = load_config(str(CONFIGS / config))
        options, depth = cfg.MODEL.RETINANET, cfg.MODEL.RESNETS.DEPTH
        assert cfg.INPUT.MIN_SIZE_TRAIN == (600,) and cfg.INPUT.MIN_SIZE_TEST == 600
        numbers = {
            "balanced_ce": (options.FOCAL_LOSS_ALPHA,),
            "focal": (options.FOCAL_LOSS_ALPHA, options.FOCAL_LOSS_GAMMA),
            "ohem": tuple(options.OHEM.values()),
        }[options.CLS_LOSS_TYPE]
        found.add((options.CLS_LOSS_TYPE, depth, *numbers))
    alphas = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
    gammas = ((0.75, 0.1), (0.75, 0.2), (0.5, 0.5), (0.25, 1.0), (0.25, 2.0), (0.25, 5.0))
    ohem = [(batch, nms, -1) for batch in (128, 256, 512) for nms in (0.5, 0.7)]
    ohem += [(batch, 0.5, 3) for batch in (128, 256, 512)]
    assert found == {
        *(("balanced_ce", 50, alpha) for alpha in alphas),
        *(("focal", 50, *pair) for pair in gammas),
        *(("ohem", 101, *numbers) for numbers in ohem),
        ("focal", 101, 0.25, 2.0),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="MODEL.DEVICE is cuda but torch finds 0 GPUs"):
        load_config(str(CONFIGS / LIBRA), ["MODEL.DEVICE", "cuda"])
