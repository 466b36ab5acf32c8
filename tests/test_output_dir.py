"""Who has an output folder, what becomes of the run that it holds, and disks that are full."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from runs import at_iteration, files, model_of, same_weights

from libra_d2.engine import run as run_module
from libra_d2.engine import weights


@contextlib.contextmanager
def small_files(size=200_000):
    """Lets no file of this process grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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

        def rehearse_slowly(*args):
            with monkeypatch.context() as context:
                context.setattr(run_module, "rehearse", rehearse)
                assert run(iterations=2) == 0
            return rehearse(*args)

        monkeypatch.setattr(run_module, "rehearse", rehearse_slowly)
        assert run() == 2
        assert "holds a training run" in capsys.readouterr().err
        assert (out / "model_0000001.pth").exists() and not (out / "model_0000005.pth").exists()

    def test_is_as_open_to_a_group_as_its_umask_says(self, run, out):
        before = os.umask(0o002)
        try:
            assert run(iterations=2) == 0
        finally:
            os.umask(before)
        assert (out / ".lock").stat().st_mode & 0o777 == 0o664

    def test_that_may_not_be_looked_into(self, run, tmp_path, monkeypatch, capsys):
        def exists(path, before=Path.exists):
            if path.name == "out":  # as of a folder that may not be searched
                raise PermissionError(13, "Permission denied")
            return before(path)

        monkeypatch.setattr(Path, "exists", exists)
        assert run() == 2
        assert "cannot be written to: Permission denied" in capsys.readouterr().err

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
