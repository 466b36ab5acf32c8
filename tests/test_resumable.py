"""Runs that are interrupted, and go on as if they had not been."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from detectron2.engine import HookBase
from runs import LIBRA, RETINANET, at_iteration, files, model_of, same_weights, send
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from toys import CONFIGS, SMALL, toy_opts

from libra_d2.data.workers import LoadingError
from libra_d2.engine import LibraTrainer
from libra_d2.engine.stopping import REQUEUE_STATUS


def kill_a_loader(trainer):
    """Lets a process that loads images be killed in the midst of a step."""

    def forward(images):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(30)

    trainer.model.forward = forward


def test_a_loader_that_is_killed_during_a_step(run, out, monkeypatch, capsys):
    at_iteration(monkeypatch, 3, kill_a_loader)
    assert run("DATALOADER.NUM_WORKERS", 1) == 2
    message = capsys.readouterr().err
    assert "a lower DATALOADER.NUM_WORKERS helps" in message and "Traceback" not in message
    assert f"The last checkpoint is '{out}/model_0000001.pth'; go on with" in message
    assert [file.name for file in out.glob("*.pth")] == ["model_0000001.pth"]


def test_a_hook_that_cannot_load(run, out, monkeypatch, capsys):
    """Such as precise batch norm, which has a loader of its own."""

    class Hook(HookBase):
        def after_step(self):
            if self.trainer.iter == 4:
                raise LoadingError("image 'a.jpg' cannot be read: it is cut off")

    build_hooks = LibraTrainer.build_hooks
    monkeypatch.setattr(LibraTrainer, "build_hooks", lambda self: [*build_hooks(self), Hook()])
    assert run() == 2
    message = capsys.readouterr().err
    assert "a.jpg" in message and f"The last checkpoint is '{out}/model_0000004.pth'" in message


class TestResume:
    @pytest.mark.parametrize("config", [LIBRA, pytest.param(RETINANET, marks=pytest.mark.slow)])
    def test_goes_on_to_the_last_bit(self, run, tmp_path, monkeypatch, config, capsys):
        opts = ("INPUT.MIN_SIZE_TRAIN", (64, 96), "TEST.EVAL_PERIOD", 3, "SOLVER.BASE_LR", 1e-3)
        run = partial(run, *opts, config=config, score=True)
        assert run(output=tmp_path / "whole") == 0
        with monkeypatch.context() as context:
            at_iteration(context, 2, send(signal.SIGTERM))
            assert run("DATALOADER.NUM_WORKERS", 1) == 143
        assert run(flags=["--resume"]) == 0
        assert same_weights(model_of(tmp_path / "whole"), model_of(tmp_path / "out"))
        whole, resumed = (
            [json.loads(x) for x in (tmp_path / n / "metrics.json").read_text().splitlines()]
            for n in ("whole", "out")
        )
        scores = [{k: v for k, v in r.items() if "/AP" in k} for r in (whole[-1], resumed[-1])]
        assert str(scores[0]) == str(scores[1]) and scores[0]  # NaN equals nothing
        assert [r["iteration"] for r in resumed] == sorted({r["iteration"] for r in resumed})

    def test_a_random_seed_is_kept(self, run, out, tmp_path, monkeypatch):
        with monkeypatch.context() as context:
            at_iteration(context, 1, send(signal.SIGTERM))
            assert run("SEED", -1) == 143
        seed = next(x for x in (out / "config.yaml").read_text().splitlines() if "SEED" in x)
        assert run("SEED", -1, flags=["--resume"]) == 0
        assert seed in (out / "config.yaml").read_text().splitlines() and "-1" not in seed
        assert run(*seed.replace(":", "").split(), output=tmp_path / "whole") == 0
        assert same_weights(model_of(tmp_path / "whole"), model_of(out))

    @pytest.mark.parametrize("damage", ["cut", "changed"])
    def test_from_the_last_whole_checkpoint(self, run, out, damage):
        assert run() == 0
        expected = model_of(out)
        for name in ("model_final.pth", "model_0000005.pth"):
            content = bytearray((out / name).read_bytes())
            content[len(content) // 2] ^= 255
            half = content[: len(content) // 2]
            damaged = {"cut": half, "changed": content}[damage]
            (out / name).write_bytes(damaged)
        (out / "metrics.json").write_bytes((out / "metrics.json").read_bytes()[:-30])
        assert run(flags=["--resume"]) == 0
        assert same_weights(expected, model_of(out))
        assert "going on from 'model_0000003.pth'" in (out / "log.txt").read_text()
        assert all(json.loads(x) for x in (out / "metrics.json").read_text().splitlines())

    def test_of_a_trained_model_that_was_not_saved(self, run, out):
        assert run() == 0
        expected = model_of(out)
        (out / "model_final.pth").write_bytes(b"")
        assert run(flags=["--resume"]) == 0
        assert same_weights(expected, model_of(out))

    @pytest.mark.parametrize("note", ["\0\0\0", None])
    def test_without_a_note_of_the_last(self, run, out, note):
        assert run() == 0
        before = (out / "model_0000003.pth").stat().st_mtime_ns
        (out / "last_checkpoint").unlink()
        if note is not None:
            (out / "last_checkpoint").write_text(note)
        assert run(flags=["--resume"], iterations=8) == 0
        assert (out / "model_0000003.pth").stat().st_mtime_ns == before

    def test_of_another_model_changes_nothing(self, run, out, capsys):
        assert run() == 0
        before = files(out)
        assert run("MODEL.FPN.OUT_CHANNELS", 32, flags=["--resume"]) == 2
        assert "has no weights for 'backbone.fpn_lateral2.weight'" in capsys.readouterr().err
        assert files(out) == before

    def test_a_launchers_restart(self, run, out, monkeypatch, capsys):
        """Goes on if the launcher's first start had taken the folder, and never else."""
        assert run(iterations=2) == 0
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert run() == 2
        assert "holds a training run" in capsys.readouterr().err
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        with monkeypatch.context() as context:
            at_iteration(context, 3, send(signal.SIGTERM))
            assert run(flags=["--overwrite"]) == 143
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert run(flags=["--overwrite"]) == 0
        records = (out / "metrics.json").read_text().splitlines()
        assert [json.loads(x)["iteration"] for x in records][-1] >= 5
        assert (out / "model_0000001.pth").exists() and not list(out.glob("old*"))

    @pytest.mark.parametrize("flags", [(), ("--overwrite",)])
    def test_a_launchers_restart_after_a_refusal(self, run, out, monkeypatch, flags):
        """A former job with the same name and port is another, also if this one came to nothing."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("MASTER_PORT", "29501")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert run(iterations=2) == 0
        before = model_of(out)
        refused = ("SOLVER.BASE_LR", 1e30) if flags else ()
        assert run(*refused, flags=flags) == 2
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert run(*refused, flags=flags) == 2
        assert same_weights(before, model_of(out))

    def test_a_longer_one_keeps_the_score_of_the_shorter(self, run, out):
        assert run(score=True) == 0
        assert run(flags=["--resume"], iterations=8, score=True) == 0
        records = [json.loads(x) for x in (out / "metrics.json").read_text().splitlines()]
        scored = [r["iteration"] for r in records if any("/AP" in key for key in r)]
        assert scored == [6, 8]

    def test_a_model_that_was_not_saved_last(self, run, out):
        """An older one of the same name is not taken for it."""
        assert run() == 0
        first = (out / "model_final.pth").read_bytes()
        assert run(flags=["--resume"], iterations=8) == 0
        expected = model_of(out)
        (out / "model_final.pth").write_bytes(first)
        (out / "last_checkpoint").write_text("model_0000007.pth")
        assert run(flags=["--resume"], iterations=8) == 0
        assert same_weights(expected, model_of(out))


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "status"),
        [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, REQUEUE_STATUS)],
    )
    def test_end_a_run_after_its_step(self, run, out, monkeypatch, capsys, number, status):
        before = signal.getsignal(number)
        at_iteration(monkeypatch, 2, send(number))
        assert run() == status
        message = capsys.readouterr().err
        assert (
            f"stopped by {number.name}. The last checkpoint is '{out}/model_0000002.pth'" in message
        )
        assert "--resume" in message and len(message.strip().splitlines()) == 2
        assert signal.getsignal(number) is before

    def test_leave_an_evaluation(self, run, out, monkeypatch, capsys):
        build, scored = LibraTrainer.build_evaluator, []

        def build_evaluator(cls, cfg, name, folder=None):
            evaluator = build(cfg, name, folder)

            def process(inputs, outputs):
                scored.append(inputs)
                os.kill(os.getpid(), signal.SIGTERM)

            if cfg.OUTPUT_DIR == str(out):  # not in the rehearsal
                evaluator.process = process
            return evaluator

        monkeypatch.setattr(LibraTrainer, "build_evaluator", classmethod(build_evaluator))
        assert run("TEST.EVAL_PERIOD", 3, score=True) == 143
        assert len(scored) == 1 and (out / "model_0000002.pth").exists()

    def test_before_an_evaluation(self, run, out, monkeypatch):
        at_iteration(monkeypatch, 2, send(signal.SIGTERM))
        monkeypatch.setattr(LibraTrainer, "test", None)
        assert run("TEST.EVAL_PERIOD", 3, score=True) == 143
        assert (out / "model_0000002.pth").exists()

    def test_before_the_first_step_replace_nothing(self, run, out, monkeypatch, capsys):
        assert run(iterations=2) == 0
        before = files(out)
        build = LibraTrainer.build_train_loader

        def build_train_loader(cls, cfg):
            if cfg.OUTPUT_DIR == str(out):  # where the old run has been moved away
                assert not (out / "last_checkpoint").exists()
                os.kill(os.getpid(), signal.SIGTERM)
            return build(cfg)

        monkeypatch.setattr(LibraTrainer, "build_train_loader", classmethod(build_train_loader))
        assert run(flags=["--overwrite"]) == 143
        assert "stopped by SIGTERM before the first step" in capsys.readouterr().err
        assert files(out) == before

    def test_after_a_step_keep_what_was_replaced(self, run, out, monkeypatch, capsys):
        """Until the new run has a checkpoint that was due."""
        assert run(iterations=2) == 0
        before = model_of(out)
        at_iteration(monkeypatch, 0, send(signal.SIGINT))
        assert run("SOLVER.BASE_LR", 1e-3, flags=["--overwrite"]) == 130
        assert f"is still in '{out}/old-1'" in capsys.readouterr().err
        assert same_weights(before, model_of(out / "old-1"))

    @pytest.mark.slow  # what a signal does is the same as to one process
    def test_to_a_whole_group_of_processes(self, tiny_coco, tmp_path):
        """As SLURM sends them: those that load images must not end before the run has saved."""
        out = tmp_path / "out"
        opts = toy_opts(*SMALL, "SOLVER.MAX_ITER", 100000, "DATALOADER.NUM_WORKERS", 2)
        names = ["--train", tiny_coco, "--val", tiny_coco, "--output", str(out)]
        command = [sys.executable, str(CONFIGS.parent / "train_net.py"), "--config-file"]
        command += [str(CONFIGS / LIBRA), *names, *opts]
        process = subprocess.Popen(
            command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        log = out / "log.txt"
        while process.poll() is None:
            if log.exists() and "Starting training" in log.read_text():
                break
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGTERM)
        message = process.communicate()[1].decode()
        assert process.returncode == 143, message
        assert "Traceback" not in message and list(out.glob("model_*.pth"))

    def test_a_second_one_stops_at_once(self, run, monkeypatch, capsys):
        def twice(trainer):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGINT)

        at_iteration(monkeypatch, 3, twice)
        assert run() == 130
        assert capsys.readouterr().err.strip().endswith("interrupted")


def test_no_process_that_loads_is_left_to_the_garbage_collector(run, monkeypatch):
    """It would not be told to end, and be waited for, for five seconds of every run."""
    shut_down, is_collecting = [], []
    end = _MultiProcessingDataLoaderIter._shutdown_workers

    def record(loader):
        shut_down.append(bool(is_collecting))
        end(loader)

    def follow(phase, info):
        is_collecting.append(1) if phase == "start" else is_collecting.clear()

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", record)
    gc.callbacks.append(follow)
    try:
        assert run("DATALOADER.NUM_WORKERS", 1, iterations=2, score=True) == 0
    finally:
        gc.callbacks.remove(follow)
    assert shut_down and not any(shut_down)
