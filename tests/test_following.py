"""What shows how a run goes: averages of weights, losses and pictures."""

import signal
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from runs import LIBRA, RETINANET, at_iteration, model_of, records, same_weights, send
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toys import (
    CONFIGS,
    SMALL,
    make_inputs,
    small_config,
    small_retinanet,
    toy_config,
    toy_opts,
)

from libra_d2.drawing import draw_groups, shrink
from libra_d2.engine import LibraTrainer, main
from libra_d2.engine.average import WeightAverage
from libra_d2.engine.following import SampledRois
from libra_d2.engine.validation import mean_losses

AVERAGE = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5, "SOLVER.BASE_LR", 1e-3)


class TestAverage:
    def test_by_hand(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        average = WeightAverage(model, 0.3)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        for step in range(5):
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter))
            model(torch.randn(4, 3))
            average.update()
            share = min(0.3, (1 + step) / (10 + step)) if step else 0.0  # the first is copied
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    expected[name] = share * expected[name] + (1 - share) * value
        got = average.module.state_dict()
        assert all(torch.allclose(got[n], v) for n, v in expected.items() if v.is_floating_point())
        assert not average.module.training and model.training

    def test_checkpoints_have_it_and_go_on_from_it(self, run, out, tmp_path, monkeypatch):
        run = partial(run, *AVERAGE)
        assert run(output=tmp_path / "whole") == 0
        with monkeypatch.context() as context:
            at_iteration(context, 2, send(signal.SIGTERM))
            assert run() == 143
        assert run(flags=["--resume"]) == 0
        whole, resumed = (
            torch.load(folder / "model_final.pth", weights_only=True)
            for folder in (tmp_path / "whole", out)
        )
        assert same_weights(whole["model"], resumed["model"])
        assert same_weights(whole["average"]["trained"], resumed["average"]["trained"])
        assert not same_weights(whole["average"]["trained"], whole["model"])
        assert resumed["average"]["steps"] == 6

    def test_it_is_what_is_evaluated(self, run, out, tiny_coco):
        assert run(*AVERAGE, "TEST.LOSSES", True, "TEST.EVAL_PERIOD", 6, score=True) == 0
        measured = records(out)[-1]["validation/total_loss"]
        weights = ("MODEL.WEIGHTS", out / "model_final.pth")
        seen = {}

        class Measures(LibraTrainer):
            @classmethod
            def test(cls, cfg, model, evaluators=None):
                loader = cls.build_loss_loader(cfg, cfg.DATASETS.TEST[0])
                seen.update(mean_losses(model, loader))
                return super().test(cfg, model, evaluators)

        argv = (out / "config.yaml", "--eval-only", "--output", out / "other", *weights)
        main(["--config-file", *map(str, argv)], trainer_class=Measures)
        assert seen["total_loss"] == pytest.approx(measured, rel=1e-5)

    def test_it_may_begin_and_end_with_a_resumed_run(self, run, out, monkeypatch):
        assert run(iterations=4) == 0
        before = model_of(out)
        assert run(*AVERAGE, flags=["--resume"], iterations=6) == 0
        last = torch.load(out / "model_final.pth", weights_only=True)
        assert last["average"]["steps"] == 2 and not same_weights(before, last["model"])
        seen = {}

        def look(trainer):
            seen.update({k: v.clone() for k, v in trainer.model.state_dict().items()})

        at_iteration(monkeypatch, 6, look)
        assert run(flags=["--resume"], iterations=7) == 0
        assert same_weights(seen, last["average"]["trained"])
        assert "average" not in torch.load(out / "model_final.pth", weights_only=True)


PISA = "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"


class TestLosses:
    @pytest.mark.parametrize("kind", ["libra", "pisa", "retinanet", "mutual_guidance"])
    def test_what_training_would_give_and_nothing_changed(self, kind):
        cfg = {
            "libra": lambda: small_config(LIBRA),
            "pisa": lambda: small_config(PISA),
            "retinanet": small_retinanet,
            "mutual_guidance": lambda: small_retinanet(
                *("MODEL.META_ARCHITECTURE", "LibraRetinaNet"),
                *("MODEL.RETINANET.MATCHER", "mutual_guidance"),
            ),
        }[kind]()
        torch.manual_seed(0)
        model = build_model(cfg).train()
        batches = [make_inputs((3, 1)), make_inputs((2,), size=(64, 96))]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        losses = mean_losses(model, batches)
        assert model.training and torch.equal(state, torch.get_rng_state())
        assert same_weights(before, model.state_dict())
        assert "loss_normalizer" not in vars(model)
        assert mean_losses(model, batches) == losses
        for module in model.modules():
            module.training = not isinstance(module, nn.BatchNorm2d)
        torch.manual_seed(0)
        with EventStorage(), torch.no_grad():
            by_hand = [model(batch) for batch in batches]
        for name, mean in losses.items():
            if name != "total_loss":
                expected = (2 * by_hand[0][name] + by_hand[1][name]) / 3
                assert mean == pytest.approx(float(expected), rel=1e-6), name
        assert losses["total_loss"] == pytest.approx(
            sum(v for k, v in losses.items() if k != "total_loss")
        )

    def test_a_model_that_is_broken_ends_no_run(self, caplog):
        model = build_model(small_config(LIBRA)).train()
        nn.init.constant_(model.proposal_generator.rpn_head.anchor_deltas.bias, float("nan"))
        assert mean_losses(model, [make_inputs((3, 1))]) == {}
        assert "losses cannot be measured: Predicted boxes" in caplog.text
        assert model.training

    def test_they_are_measured_at_every_evaluation(self, run, out):
        assert run("TEST.EVAL_PERIOD", 2, "TEST.LOSSES", True, "TEST.AP_PER_CLASS", False,
                   score=True, config=RETINANET) == 0  # fmt: skip
        measured = [r for r in records(out) if "validation/loss_cls" in r]
        assert [r["iteration"] for r in measured] == [1, 3, 6]
        assert not any(name.startswith("bbox/AP-") for r in measured for name in r)


class TestPictures:
    def test_tensorboard_gets_them(self, run, out):
        opts = ("VIS_PERIOD", 3, "TEST.NUM_SHOWN", 2, "TEST.EVAL_PERIOD", 3)
        assert run(*opts, score=True) == 0
        (file,) = out.glob("events*")
        events = EventAccumulator(str(file), size_guidance={"images": 0})
        events.Reload()
        for tag, steps in (("sampled_rois", 2), ("predictions", 2)):
            assert len(events.Images(tag)) == steps, tag

    def test_heads_that_keep_their_samples_show_none(self):
        """As detectron2's C4 heads do."""
        hook = SampledRois(1)
        hook._watching = ()
        assert hook._show(None, (), ([], {})) is None

    def test_groups_of_boxes(self):
        image = np.zeros((100, 200, 3), np.uint8)
        groups = [("a", (255, 0, 0), np.array([[10.0, 10, 50, 50]])), ("b", (0, 255, 0), [])]
        drawn = draw_groups(image, groups)
        assert drawn.shape[0] > 100 and drawn.shape[1:] == (200, 3)
        assert drawn[10, 30].tolist() == [255, 0, 0] and not image.any()
        assert shrink(image, 50).shape == (25, 50, 3) and shrink(image, 400) is image


class TestHooksOfOnesOwn:
    def test_a_class_and_hooks(self, tiny_coco, tmp_path):
        seen = []

        class Own(LibraTrainer):
            def run_step(self):
                seen.append(self.iter)
                super().run_step()

        class Count(HookBase):
            def after_step(self):
                self.trainer.storage.put_scalar("own", 7)

        argv = ["--config-file", str(CONFIGS / LIBRA), "--train", tiny_coco]
        argv += ["--output", str(tmp_path / "out"), *toy_opts(*SMALL, "DATASETS.TEST", ())]
        drop = argv.index("MODEL.ROI_HEADS.NUM_CLASSES")
        del argv[drop : drop + 2]
        main(argv, trainer_class=Own, make_hooks=[lambda cfg: Count()])
        assert seen == [0, 1]
        assert records(tmp_path / "out")[-1]["own"] == 7

    def test_a_class_that_does_not_fit(self):
        with pytest.raises(TypeError, match="trainer_class must be a LazyTrainer"):
            main(["--config-file", "x.py"], trainer_class=LibraTrainer)


def test_the_norm_of_gradients_is_that_of_the_step(run, out, monkeypatch):
    seen = []

    def measure(trainer):
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        seen.append(nn.utils.get_total_norm(gradients).item())
        seen.append(trainer.storage.latest()["grad_norm"][0])

    at_iteration(monkeypatch, 5, measure, before=False)
    assert run("SOLVER.LOG_GRAD_NORM", True) == 0
    assert seen[0] == pytest.approx(seen[1], rel=1e-6) and seen[0] > 0
    assert "grad_norm" in records(out)[-1]


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        (("SOLVER.EMA.DECAY", 1.0), r"SOLVER.EMA.DECAY must be in \[0.0, 1.0\), got 1.0"),
        (("TEST.PATIENCE", 3), "TEST.PATIENCE must be 0 without a TEST.BEST_METRIC, got 3"),
        (("TEST.BEST_METRIC", "bbox/AP"), "TEST.BEST_METRIC bbox/AP needs a TEST.EVAL_PERIOD"),
        (("TEST.NUM_SHOWN", 4), "TEST.NUM_SHOWN 4 needs a TEST.EVAL_PERIOD above 0"),
    ],
)
def test_bad_values(opts, match):
    with pytest.raises(ValueError, match=match):
        toy_config(LIBRA, *opts)
