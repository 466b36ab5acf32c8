"""Steps that are not finite, and images that can not be read."""

import pytest
import torch
from formats import make_coco
from runs import at_iteration
from torch import nn

from libra_d2.engine.speed import fuse
from libra_d2.engine.step import CheckedTrainer
from libra_d2.engine.stopping import NonFiniteError


def make_trainer(kind, is_fast):
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 3, bias=False)
    if is_fast:
        model.to(memory_format=torch.channels_last)
    optimizer = kind(
        model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {})
    )
    if is_fast:
        fuse(optimizer)
    trainer = CheckedTrainer(model, [], optimizer)
    trainer.iter = 0
    return trainer


def take_steps(trainer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        weight = trainer.model.weight
        weight.grad = torch.empty_like(weight).copy_(torch.randn(4, 4, 3, 3, generator=generator))
        trainer.optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("was_fast", [False, True])
def test_steps_go_on_in_another_layout_and_way(kind, was_fast):
    """Of SOLVER.FUSED and MODEL.CHANNELS_LAST; torch takes both from the checkpoint."""
    whole, first, second = (make_trainer(kind, fast) for fast in (False, was_fast, not was_fast))
    take_steps(whole, [1, 2, 3, 4])
    take_steps(first, [1, 2])
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert bool(second.optimizer.param_groups[0]["fused"]) is not was_fast
    take_steps(second, [3, 4])
    torch.testing.assert_close(second.model.weight, whole.model.weight, check_stride=False)


def test_groups_keep_ways_of_their_own_and_optimizers_what_they_add():
    """An optimizer of a LazyConfig's may have both."""
    ways = [{"fused": True}, {"fused": False, "foreach": True}]

    def make():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        groups = [{"params": m.parameters(), **way} for m, way in zip(model, ways, strict=True)]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        optimizer.state["seen"] = {"batches": torch.ones(1)}
        trainer = CheckedTrainer(model, [], optimizer)
        trainer.iter = 0
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return trainer

    trainer = make()
    trainer.load_state_dict(make().state_dict())
    own = [(bool(g["fused"]), bool(g["foreach"])) for g in trainer.optimizer.param_groups]
    assert own == [(True, False), (False, True)]
    assert trainer.optimizer.state["seen"]["batches"].item() == 1
    state = make().state_dict()
    del state["optimizer"]["param_groups"][1]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        trainer.load_state_dict(state)


def test_another_optimizer_does_not_go_on(run, out, capsys):
    assert run(iterations=2) == 0
    assert run("SOLVER.OPTIMIZER", "AdamW", iterations=4, flags=["--resume"]) == 2
    assert "is of another optimizer; go on with the SOLVER.OPTIMIZER" in capsys.readouterr().err
    assert run(iterations=4, flags=["--resume"]) == 0


def test_gradients_that_stay_infinite_in_float16_stop_it():
    trainer = make_trainer(torch.optim.SGD, False)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-9)
    losses = {"loss": torch.ones(())}
    assert trainer._read(losses) == ({"loss": 1.0}, True)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-11)
    with pytest.raises(NonFiniteError, match="not finite in float16, at scales down to 0.0005"):
        trainer._read(losses)


def test_a_rehearsal_takes_a_step_though_float16s_scale_is_too_large(run, out, monkeypatch):
    scaler, scales = torch.amp.GradScaler, []

    def of_a_gpu(device, enabled):
        return scaler("cpu", init_scale=2.0**126)

    run_step = CheckedTrainer.run_step

    def step(self):
        run_step(self)
        scales.append(self.grad_scaler.get_scale())

    monkeypatch.setattr(torch.amp, "GradScaler", of_a_gpu)
    monkeypatch.setattr(CheckedTrainer, "run_step", step)
    assert run("MODEL.RPN.LOSS_WEIGHT", 1000.0, iterations=1) == 0
    assert len(scales) > 3 and scales[-2] == scales[-3] < scales[0]


def test_a_rehearsal_ends_where_no_step_can_be_left_out(run, out, monkeypatch, capsys):
    """As the run would, whatever SOLVER.MAX_SKIPPED; and with nothing written."""

    def diverge(self):
        raise NonFiniteError("gradients were not finite in float16, at scales down to 0.0005")

    monkeypatch.setattr(CheckedTrainer, "run_step", diverge)
    assert run("SOLVER.MAX_SKIPPED", 5) == 2
    assert "scales down to 0.0005" in capsys.readouterr().err and not out.exists()


class TestNumbers:
    @staticmethod
    def _break(trainer):
        with torch.no_grad():
            trainer.model.roi_heads.box_predictor.cls_score.bias[0] = float("nan")

    def test_losses_that_are_not_finite_stop_it(self, run, out, monkeypatch, capsys):
        at_iteration(monkeypatch, 3, self._break)
        assert run() == 2
        message = capsys.readouterr().err
        for part in ("iteration 3 (loss_cls nan", ".jpg", "model_0000001.pth'", "no weight was"):
            assert part in message

    def test_boxes_that_are_not_finite(self, run, out, monkeypatch, capsys):
        def break_boxes(trainer):
            with torch.no_grad():
                trainer.model.proposal_generator.rpn_head.anchor_deltas.bias[0] = float("nan")

        at_iteration(monkeypatch, 3, break_boxes)
        assert run() == 2
        message = capsys.readouterr().err
        for part in ("Inf/NaN", "In iteration 3", ".jpg", "model_0000001.pth'"):
            assert part in message

    def test_some_steps_may_be_left_out(self, run, out, monkeypatch):
        """One step whose gradients are broken changes no weight."""
        seen = {}

        def break_step(trainer):
            seen["before"] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
            weight = trainer.model.roi_heads.box_predictor.cls_score.weight
            seen["hook"] = weight.register_hook(lambda gradient: gradient * float("inf"))

        def compare(trainer):
            seen["hook"].remove()
            parameters = dict(trainer.model.named_parameters())
            seen["same"] = all(torch.equal(seen["before"][k], p) for k, p in parameters.items())

        at_iteration(monkeypatch, 3, break_step)
        at_iteration(monkeypatch, 3, compare, before=False)
        assert run("SOLVER.MAX_SKIPPED", 1) == 0
        assert seen["same"] and "the step is left out (1 of 1)" in (out / "log.txt").read_text()

    def test_weights_that_are_not_finite_are_not_saved(self, run, out, monkeypatch, capsys):
        at_iteration(monkeypatch, 5, self._break, before=False)
        assert run() == 2
        message = capsys.readouterr().err
        assert "1 of " in message and "box_predictor.cls_score.bias" in message
        assert not (out / "model_final.pth").exists()


def test_images_that_break_in_the_middle(run, out, tmp_path, monkeypatch, capsys):
    make_coco(tmp_path / "own", num_images=2)
    images = sorted((tmp_path / "own" / "images").iterdir())
    content = images[0].read_bytes()
    at_iteration(monkeypatch, 3, lambda trainer: images[0].write_bytes(content[:500]))
    names = ("DATASETS.TRAIN", (f"coco:{tmp_path}/own/annotations.json",))
    assert run(*names, "DATASETS.TEST", ()) == 2
    message = capsys.readouterr().err
    assert f"'{images[0]}' cannot be read" in message and "--resume" in message
    last = (out / "last_checkpoint").read_text()
    assert int(last[6:13]) >= 2  # what was trained is saved
    images[0].write_bytes(content)
    monkeypatch.undo()
    at_iteration(monkeypatch, 5, lambda trainer: images[0].write_bytes(content[:500]))
    assert run(*names, "DATALOADER.MAX_BAD_IMAGES", 1, flags=["--resume"], iterations=9) == 0
