"""Steps that are not finite, and images that can not be read."""

import torch
from formats import make_coco
from runs import at_iteration


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
