"""Models on another device than the CPU, one that only pretends: numbers are those of the CPU."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from pretended import DEVICE, needs_pretence
from toys import BASELINE, LIBRA, PLAIN, SMALL, make_inputs, toy_config, train_step

from libra_d2 import Detector

pytestmark = needs_pretence

COCO = "COCO-Detection/{}_R_50_FPN_1x.yaml"
CASES = {
    "detectron2": (BASELINE, PLAIN),
    "libra": (LIBRA, ()),
    "pisa": (COCO.format("libra_pisa_faster_rcnn"), ()),
    "ohem": (COCO.format("ohem_faster_rcnn"), ()),
    "fast": (COCO.format("libra_fast_rcnn"), ()),
    "rpn": (COCO.format("libra_rpn"), ()),
    "pafpn": (COCO.format("balanced_pafpn_faster_rcnn"), ()),
    "mask": ("COCO-InstanceSegmentation/pisa_mask_rcnn_R_50_FPN_1x.yaml", ()),
    "cascade": ("COCO-InstanceSegmentation/libra_cascade_mask_rcnn_R_50_FPN_1x.yaml", ()),
    "retinanet": ("Base-Libra-RetinaNet.yaml", ()),
    "retinanet-ohem": ("Ablations/focal/table1d_ohem_1to3_batch128_nms0.5.yaml", ()),
    "retinanet-pisa": (COCO.format("pisa_retinanet"), ()),
    "mutual-guidance": (COCO.format("mutual_guidance_retinanet"), ()),
}


class TestThePretence:
    def test_tensors_of_two_devices_do_not_mix(self):
        here, there = torch.ones(2), torch.ones(2, device=DEVICE)
        for mix in (
            lambda: here + there,
            lambda: torch.cat([there, here]),
            lambda: here[there.long()],
            lambda: here.index_put_((torch.zeros(2, dtype=torch.int64),), there),
            lambda: torch.nn.Linear(2, 2).to(DEVICE)(here),
        ):
            with pytest.raises(RuntimeError, match="of tensors of two devices"):
                mix()
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()

    def test_what_a_gpu_allows(self):
        there = torch.arange(3.0, device=DEVICE)
        for allowed in (there * torch.tensor(2.0), there[torch.tensor([0, 2])], there[there > 0]):
            assert allowed.device.type == DEVICE
        assert there.cpu().device.type == "cpu" and there.tolist() == [0.0, 1.0, 2.0]
        assert there.unsqueeze_(0).shape == (1, 3) and there.sum().item() == 3.0

    def test_gradients_are_there_too(self):
        layer = torch.nn.Linear(2, 1).to(DEVICE)
        layer(torch.ones(3, 2, device=DEVICE)).sum().backward()
        assert layer.weight.grad.device.type == DEVICE
        assert layer.weight.grad.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("case", CASES)
def test_models_train_and_find_there_what_they_do_here(case, generator):
    config, opts = CASES[case]
    cfg = toy_config(config, *opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    inputs = make_inputs(masks=cfg.MODEL.MASK_ON)
    for image in inputs if cfg.MODEL.LOAD_PROPOSALS else ():
        image["proposals"] = Instances(image["image"].shape[1:])
        image["proposals"].proposal_boxes = Boxes(torch.rand(30, 4, generator=generator).cumsum(1))
        image["proposals"].proposal_boxes.scale(40, 40)
        image["proposals"].objectness_logits = torch.zeros(30)

    losses, gradients, logged, model = train_step(cfg, inputs)
    theirs = train_step(cfg, inputs, build=lambda cfg: build_model(cfg).to(DEVICE))
    assert {loss.device.type for loss in theirs[0].values()} == {DEVICE}
    # A batch is matched as a whole there, and layouts in memory differ: sums in another order.
    _assert_close(theirs[0], losses, 1e-6)
    _assert_close(theirs[1], gradients, 1e-5)
    assert theirs[2] == pytest.approx(logged, rel=1e-6)

    found = [m.eval()(inputs) for m in (model, theirs[3])]
    for here, there in zip(*found, strict=True):
        _assert_close(_fields(there), _fields(here), 1e-4)


def _fields(output):
    """Tensors of what is found in an image, or proposed."""
    fields = next(iter(output.values())).get_fields().items()
    return {name: getattr(value, "tensor", value).detach().double() for name, value in fields}


def _assert_close(theirs, ours, tolerance):
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert value.device.type == DEVICE, name
        largest = ours[name].abs().max().item() if ours[name].numel() else 0.0
        torch.testing.assert_close(value.cpu(), ours[name], rtol=0, atol=tolerance * largest)


def test_a_run_trains_scores_resumes_and_predicts_there(run, out):
    opts = [*SMALL, "MODEL.DEVICE", DEVICE, "TEST.EVAL_PERIOD", 2]
    opts += ["SOLVER.EMA.ENABLED", True, "TEST.LOSSES", True, "TEST.NUM_SHOWN", 1]
    assert run(*opts, score=True, iterations=2) == 0
    assert run(*opts, score=True, iterations=4, flags=["--resume"]) == 0
    image = (torch.rand(96, 128, 3) * 255).to(torch.uint8).numpy()
    there, here = (Detector(out, device=d, threshold=0.0)(image) for d in (DEVICE, "cpu"))
    assert len(here.scores) and there.scores == pytest.approx(here.scores, rel=1e-5)
