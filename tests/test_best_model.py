"""The best checkpoint of a run, and when to stop."""

import signal
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from runs import LIBRA, at_iteration, files, records, send
from toys import (
    toy_config,
)

from libra_d2.engine import LibraTrainer
from libra_d2.engine.following import BestModel, check_best_metric
from libra_d2.engine.stopping import FinishedEarly


class Scripted(LibraTrainer):
    """Whose evaluations give these numbers, one after the other."""

    scores = ()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return OrderedDict(bbox={"AP": cls.scores.pop(0), "AP-cell": 1.0})


class TestBest:
    @pytest.fixture
    def scored(self, run, monkeypatch):
        def scored(scores, *opts, **kwargs):
            monkeypatch.setattr(Scripted, "scores", list(scores))
            monkeypatch.setattr("libra_d2.engine.run.LibraTrainer", Scripted)
            opts = ("TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "bbox/AP", *opts)
            return run(*opts, score=True, **kwargs)

        return scored

    def test_the_best_is_kept_and_the_run_ends(self, scored, out):
        assert scored([10, 30, 20, 25], "TEST.PATIENCE", 2, iterations=8) == 0
        best = torch.load(out / "model_best.pth", weights_only=True)
        final = torch.load(out / "model_final.pth", weights_only=True)
        assert (best["iteration"], final["iteration"]) == (1, 3)
        assert (out / "last_checkpoint").read_text() == "model_final.pth"
        assert [r["bbox/AP"] for r in records(out)] == [10, 30, 20, 25]
        assert (
            "bbox/AP has not improved for 2 evaluations; the best, 30, was after iteration 1"
            in (out / "log.txt").read_text()
        )
        before = files(out)
        assert scored([], "TEST.PATIENCE", 2, iterations=8, flags=["--resume"]) == 0
        assert {n: c for n, c in files(out).items() if "events" not in n} == {
            n: c for n, c in before.items() if "events" not in n
        }
        assert scored([24, 31, 5, 6], iterations=8, flags=["--resume"]) == 0
        assert torch.load(out / "model_best.pth", weights_only=True)["iteration"] == 5

    def test_a_resumed_run_knows_the_best(self, scored, out, monkeypatch):
        with monkeypatch.context() as context:
            at_iteration(context, 3, send(signal.SIGTERM))
            assert scored([10, 30, 20], iterations=6) == 143
        assert scored([25, 28], iterations=6, flags=["--resume"]) == 0
        assert torch.load(out / "model_best.pth", weights_only=True)["iteration"] == 1

    def test_nothing_is_counted_before_there_is_a_number(self, scored, out):
        nan = float("nan")
        assert scored([nan, nan, nan, 5, nan, 4], "TEST.PATIENCE", 2, iterations=9) == 0
        best = torch.load(out / "model_best.pth", weights_only=True)
        assert best["iteration"] == 3 and len(records(out)) >= 6
        assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 5

    @pytest.mark.parametrize(
        ("metric", "is_lowest"),
        [
            ("bbox/AP", False),
            ("coco:/data/blossom/a.json/bbox/AP", False),
            ("bbox/AP-glossy", False),
            ("validation/total_loss", True),
            ("a/validation/loss_cls", True),
        ],
    )
    def test_what_is_better(self, metric, is_lowest):
        assert BestModel(2, None, metric)._compare(1, 2) == is_lowest

    def test_all_processes_learn_that_it_is_over(self, monkeypatch, tmp_path):
        """One that has no numbers makes no step either, and evaluates nothing."""
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        monkeypatch.setattr(comm, "all_gather", lambda own: [(True, (30.0, 1)), own])
        hook = BestModel(1, None, "bbox/AP", patience=2)
        cfg = SimpleNamespace(OUTPUT_DIR=str(tmp_path))
        hook.trainer = SimpleNamespace(cfg=cfg, start_iter=4, iter=4, max_iter=5)
        with pytest.raises(FinishedEarly):
            hook.before_train()
        assert hook.trainer.iter == 3

    def test_a_best_one_that_can_not_be_saved_is_none(self, scored, out, monkeypatch):
        def refuse(self, name, **extra):
            return name != "model_best"

        monkeypatch.setattr("libra_d2.engine.following._Beside.save", refuse)
        assert scored([10, 30], iterations=2) == 0
        assert "best bbox/AP so far" not in (out / "log.txt").read_text()

    def test_one_that_is_not_measured(self, scored, out):
        assert scored([1, 2], "TEST.BEST_METRIC", "bbox/AP-a", iterations=2) == 0
        told = (out / "log.txt").read_text()
        assert "'bbox/AP-a' was not measured (did you mean 'bbox/AP'?); there is bbox/AP" in told
        assert not (out / "model_best.pth").exists()


@pytest.mark.parametrize(
    ("metric", "tests", "match"),
    [
        ("bbox/AP", ("a",), ""),
        ("b/segm/AP50", ("a", "b"), ""),
        ("a/validation/total_loss", ("a", "b"), ""),
        ("bbox/AP-cat", ("a",), ""),
        ("box_proposals/AR@100", ("a",), ""),
        ("mine/accuracy", ("a",), ""),
        ("bbox/AP", (), "needs test data: DATASETS.TEST, or --val"),
        ("bbox/ap", ("a",), r"'bbox/ap' is not measured \(did you mean 'bbox/AP'"),
        ("bbox/APx", ("a",), "'bbox/APx' is not measured"),
        ("c/bbox/AP", ("a",), "'c/bbox/AP' is not measured"),
        ("bbox/AP", ("a", "b"), "of one of the test sets, such as a/bbox/AP, got 'bbox/AP'"),
        ("a/bbox/AP", ("a",), "must be bbox/AP, of the one test set"),
    ],
)
def test_which_metric_can_be_the_best(metric, tests, match):
    cfg = toy_config(LIBRA, "TEST.BEST_METRIC", metric, "TEST.EVAL_PERIOD", 1, "TEST.LOSSES", True)
    cfg.defrost()
    cfg.DATASETS.TEST = tests
    if match:
        with pytest.raises(ValueError, match=match):
            check_best_metric(cfg)
    else:
        check_best_metric(cfg)
    cfg.TEST.LOSSES, cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST = (
        False,
        "validation/total_loss",
        ("a",),
    )
    with pytest.raises(ValueError, match="needs TEST.LOSSES True"):
        check_best_metric(cfg)
