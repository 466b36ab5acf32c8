"""Runs that are interrupted, damaged or wrong: what is lost, and what is said."""

import contextlib
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from detectron2.utils.logger import setup_logger
from formats import make_coco
from toys import CONFIGS, SMALL, SMALL_RETINANET, toy_opts

from libra_d2.engine import LibraTrainer, main, weights
from libra_d2.engine import run as run_module
from libra_d2.engine.stopping import REQUEUE_STATUS

LIBRA, RETINANET = "Base-Libra-RCNN-FPN.yaml", "Base-Libra-RetinaNet.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_coco(folder)
    return f"coco:{folder}/annotations.json"


@pytest.fixture(autouse=True)
def fresh_loggers():
    yield
    for name in ("detectron2", "fvcore", "libra_d2"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
    setup_logger.cache_clear()


@pytest.fixture
def run(data, tmp_path):
    """Runs train_net.py in this process, on a toy; returns its exit status."""

    def run(*args, config=LIBRA, flags=(), output=tmp_path / "out", iterations=6, score=False):
        small = SMALL_RETINANET if config == RETINANET else SMALL
        names = ["--train", data, "--output", str(output)]
        names += ["--val", data] if score else []
        opts = [] if score else ["DATASETS.TEST", ()]
        opts += ["SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", 2, *small, *args]
        opts += ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.3]  # few detections, soon scored
        drop = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")
        opts = toy_opts(*opts)
        opts = [o for i, o in enumerate(opts) if opts[i - i % 2] not in drop]
        argv = ["--config-file", str(CONFIGS / config), *flags, *names, *opts]
        try:
            main(argv)
        except SystemExit as exit_:
            return exit_.code or 0
        return 0

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def at_iteration(monkeypatch, iteration, act, before=True):
    """Lets ``act`` happen in a step of training, but not in its rehearsal."""
    step = LibraTrainer.run_step

    def run_step(self):
        if before and self.iter == iteration:
            act(self)
        step(self)
        if not before and self.iter == iteration:
            act(self)

    monkeypatch.setattr(LibraTrainer, "run_step", run_step)


def send(number):
    return lambda trainer: os.kill(os.getpid(), number)


def model_of(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    """What a run has left, but for the log, which all runs of this process write to."""
    found = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "log.txt")
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


@contextlib.contextmanager
def small_files(size=200_000):
    """Lets no file of this process grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestResume:
    @pytest.mark.parametrize("config", [LIBRA, RETINANET])
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

    def test_to_a_whole_group_of_processes(self, data, tmp_path):
        """As SLURM sends them: those that load images must not end before the run has saved."""
        out = tmp_path / "out"
        opts = toy_opts(*SMALL, "SOLVER.MAX_ITER", 100000, "DATALOADER.NUM_WORKERS", 2)
        names = ["--train", data, "--val", data, "--output", str(out)]
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


class TestFolder:
    def test_of_a_run_that_works_is_not_taken(self, run, out, capsys):
        code = (
            "import sys, time\nfrom pathlib import Path\n"
            "from libra_d2.engine.output_dir import hold_output_dir\n"
            "with hold_output_dir(Path(sys.argv[1])):\n    print(1, flush=True); time.sleep(60)"
        )
        holder = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
        try:
            holder.stdout.readline()
            for flags in ([], ["--resume"], ["--overwrite"]):
                assert run(flags=flags) == 2
                assert f"is in use: process {holder.pid} on" in capsys.readouterr().err
        finally:
            holder.kill()
            holder.wait()
        assert run() == 0  # a lock whose holder was killed is none

    def test_whose_lock_is_a_link(self, run, out, tmp_path, capsys):
        (tmp_path / "victim").write_text("mine")
        out.mkdir()
        (out / ".lock").symlink_to(tmp_path / "victim")
        assert run() == 2
        assert (tmp_path / "victim").read_text() == "mine"

    def test_of_a_run_that_began_meanwhile(self, run, out, monkeypatch, capsys):
        """While this one rehearsed: the check is made again by who holds the folder."""
        rehearse = run_module.rehearse

        def rehearse_slowly(cfg, resume):
            with monkeypatch.context() as context:
                context.setattr(run_module, "rehearse", rehearse)
                assert run(iterations=2) == 0
            return rehearse(cfg, resume)

        monkeypatch.setattr(run_module, "rehearse", rehearse_slowly)
        assert run() == 2
        assert "holds a training run" in capsys.readouterr().err
        assert (out / "model_0000001.pth").exists() and not (out / "model_0000005.pth").exists()

    def test_leftovers_of_a_kill_are_removed(self, run, out):
        out.mkdir()
        (out / "model_0000001.pth.partial").write_text("half")
        (out / "mine.partial").write_text("mine")
        assert run() == 0
        assert [f.name for f in out.glob("*.partial")] == ["mine.partial"]

    def test_a_start_that_fails_leaves_nothing(self, run, out):
        assert run("SOLVER.BASE_LR", 1e30) == 2
        assert not out.exists()

    @pytest.mark.parametrize(
        "opts", [("SOLVER.BASE_LR", 1e30), ("MODEL.ROI_HEADS.IN_FEATURES", ["p9"])]
    )
    def test_an_old_run_survives_a_failing_start(self, run, out, opts):
        assert run(iterations=2) == 0
        before = files(out)
        assert run(*opts, flags=["--overwrite"]) == 2
        assert files(out) == before

    def test_an_old_run_survives_until_the_first_checkpoint(self, run, out, monkeypatch, capsys):
        assert run(iterations=2) == 0
        (out / "model_best_mine.pth").write_text("mine")
        before = files(out)

        def fail(trainer):
            assert model_of(out / "old-1")  # where it is meanwhile
            raise RuntimeError("a card fell off the bus")

        with monkeypatch.context() as context:
            at_iteration(context, 1, fail)
            with pytest.raises(RuntimeError):
                run(flags=["--overwrite"])
        assert files(out) == before and not (out / "old-1").exists()
        assert run(flags=["--overwrite"]) == 0
        assert not (out / "old-1").exists()
        assert (out / "model_best_mine.pth").read_text() == "mine"
        assert (out / "model_0000005.pth").exists()

    def test_what_a_run_reads_is_not_moved(self, run, out, capsys):
        assert run(iterations=2) == 0
        weights = f"{out}/model_final.pth?matching_heuristics=True"
        assert run("MODEL.WEIGHTS", weights, flags=["--overwrite"]) == 2
        assert "which this run reads" in capsys.readouterr().err

    def test_a_start_that_crashed_blocks_nothing(self, run, out, monkeypatch):
        def crash(trainer):
            raise RuntimeError("crash")

        with monkeypatch.context() as context:
            at_iteration(context, 1, crash)
            with pytest.raises(RuntimeError):
                run()
        assert (out / "log.txt").exists()
        with monkeypatch.context() as context:
            at_iteration(context, 1, crash)
            with pytest.raises(RuntimeError):
                run(flags=["--resume"])
        assert run() == 0

    def test_an_evaluation_leaves_a_run_as_it_is(self, run, out):
        assert run(iterations=2) == 0
        before = files(out)
        weights = str(out / "model_0000001.pth")
        assert run("MODEL.WEIGHTS", weights, flags=["--eval-only"], score=True) == 0
        after = files(out)
        assert {k: v for k, v in after.items() if not k.startswith("evaluation/")} == before
        assert "evaluation/coco_instances_results.json" in after


class TestDisk:
    def test_full_for_a_while(self, run, out, monkeypatch):
        save, calls = weights._save, []

        def save_on_full_disk(content, path):
            calls.append(path)
            with small_files() if len(calls) == 1 else contextlib.nullcontext():
                save(content, path)

        monkeypatch.setattr(weights, "_save", save_on_full_disk)
        assert run() == 0
        assert (
            "model_0000001.pth' cannot be written: File too large" in (out / "log.txt").read_text()
        )
        assert sorted(f.name for f in out.glob("model_*")) == [
            "model_0000003.pth",
            "model_0000005.pth",
            "model_final.pth",
        ]

    def test_full_at_the_end(self, run, out, monkeypatch, capsys):
        save = weights._save

        def save_on_full_disk(content, path):
            with small_files() if "final" in path else contextlib.nullcontext():
                save(content, path)

        monkeypatch.setattr(weights, "_save", save_on_full_disk)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        assert run() == 2
        message = capsys.readouterr().err
        assert "the trained model could not be saved" in message and "model_0000005" in message
        monkeypatch.undo()
        assert run(flags=["--resume"]) == 0
        assert same_weights(model_of(out, "model_0000005.pth"), model_of(out))

    def test_a_folder_that_cannot_be_written(self, run, capsys):
        assert run(output=Path("/proc/run")) == 2
        assert "OUTPUT_DIR '/proc/run' cannot be written to" in capsys.readouterr().err


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


class Evil:
    """A pickle that runs code when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def server(tmp_path):
    """Serves ``tmp_path``; its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


class TestSecurity:
    @pytest.mark.parametrize(
        ("kind", "flags"),
        [
            *((kind, ()) for kind in ("file", "address", "pyth", "torch", "heuristics")),
            ("file", ("--eval-only",)),
            ("address", ("--eval-only",)),
        ],
    )
    def test_weights_run_no_code(self, run, tmp_path, server, monkeypatch, capsys, kind, flags):
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        marker = tmp_path / "marker"
        content = {"model": Evil(marker), "__author__": "x"}
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
        torch.save(content, tmp_path / "evil.pth")
        torch.save(content, tmp_path / "evil.pyth")
        weights = {
            "file": f"{tmp_path}/evil.pkl",
            "address": f"{server}/evil.pkl",
            "pyth": f"{tmp_path}/evil.pyth",
            "torch": f"{tmp_path}/evil.pth",
            "heuristics": f"{tmp_path}/evil.pth?matching_heuristics=True",
        }[kind]
        assert run("MODEL.WEIGHTS", weights, flags=flags, score=True) == 2
        message = capsys.readouterr().err
        assert "evil" in message and "Traceback" not in message
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["evil.pkl", "../evil.pkl", "../evil.pth", "/etc/passwd"])
    def test_the_note_of_the_last_checkpoint(self, run, out, tmp_path, capsys, name):
        marker = tmp_path / "marker"
        for file in (out / "evil.pkl", tmp_path / "evil.pkl"):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(pickle.dumps({"model": Evil(marker)}))
        torch.save({"model": Evil(marker)}, tmp_path / "evil.pth")
        (out / "last_checkpoint").write_text(name)
        assert run(flags=["--resume"]) == 2
        assert "must name a .pth file of its folder" in capsys.readouterr().err
        assert not marker.exists()

    @pytest.mark.parametrize("kind", ["file", "address"])
    def test_proposals_run_no_code(self, run, tmp_path, server, monkeypatch, capsys, kind):
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        marker = tmp_path / "marker"
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"ids": Evil(marker)}))
        place = f"{tmp_path}/evil.pkl" if kind == "file" else f"{server}/evil.pkl"
        opts = ("MODEL.LOAD_PROPOSALS", True, "MODEL.PROPOSAL_GENERATOR.NAME")
        opts += ("PrecomputedProposals", "DATASETS.PROPOSAL_FILES_TRAIN", (place,))
        opts += ("DATASETS.PROPOSAL_FILES_TEST", (place,))
        assert run(*opts, config="Base-RCNN-FPN.yaml", score=True) == 2
        assert "not only lists and numpy arrays" in capsys.readouterr().err
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg"])
    def test_images_stay_in_their_folder(self, run, tmp_path, capsys, name):
        content = make_coco(tmp_path / "own")
        image = tmp_path / "own" / "images" / content["images"][0]["file_name"]
        (tmp_path / "own" / "secret.jpg").write_bytes(image.read_bytes())
        content["images"][0]["file_name"] = name
        file = tmp_path / "own" / "annotations.json"
        file.write_text(json.dumps(content))
        spec = (f"coco:{file}:{tmp_path}/own/images",)
        assert run("DATASETS.TRAIN", spec, "DATASETS.TEST", ()) == 2
        assert f"'{name}', which is not in" in capsys.readouterr().err
        if name.startswith(".."):
            opts = ("DATASETS.TRAIN", spec, "DATASETS.TEST", (), "DATASETS.ALLOW_OUTSIDE", True)
            assert run(*opts) == 0
