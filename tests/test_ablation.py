"""Plans and runs of ablations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from formats import make_coco
from tables import results
from toys import CONFIGS, TOY, load_tool, run_tool

from libra_d2.engine import ablation
from libra_d2.engine import plan as plans
from libra_d2.engine.ablation import keep_results
from libra_d2.engine.comparison import find_other_devices, read_results
from libra_d2.engine.plan import ROOT, Data, Run, check_unmixed, list_runs, read_plan

PLANS = sorted((CONFIGS.parent / "tools" / "plans").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_coco(folder)
    return f"coco:{folder}/annotations.json"


def test_tables_show_what_is_finished_so_far(data, tmp_path):
    ablate, plan = load_tool("ablate.py"), read_plan(str(PLANS[0]))
    plan.data = Data(train=data, test=data)
    base, *others = list(plan.rows)
    runs = list_runs(plan, tmp_path)
    finish(runs, others[0], 1)
    results = keep_results(tmp_path / "plan.csv", runs, plan)
    (tmp_path / "plan.csv").unlink()
    ablate.write_tables(tmp_path / "plan", plan, results)
    assert not list(tmp_path.glob("plan.*"))  # nothing to compare with yet
    finish(runs, base, 1)
    results = keep_results(tmp_path / "plan.csv", runs, plan)
    ablate.write_tables(tmp_path / "plan", plan, results)
    table = (tmp_path / "plan.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {base}", f"| {others[0]}"]
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_tables_keep_the_rows_of_other_calls(data, tmp_path):
    """Of one before, and of one at the same time."""
    ablate, plan = load_tool("ablate.py"), read_plan(str(PLANS[0]))
    plan.data, rows, file = Data(train=data, test=data), list(plan.rows), tmp_path / "plan.csv"
    runs = list_runs(plan, tmp_path)
    for row in (rows[2], rows[1], rows[0]):
        finish(runs, row, 1)
        own = [run for run in runs if run.row == row]
        results = keep_results(file, own, plan)
    assert [result["row"] for result in results] == rows[:3]
    assert read_results(file) == results
    ablate.write_tables(tmp_path / "plan", plan, results)
    assert len((tmp_path / "plan.md").read_text().splitlines()) == 2 + 3


def test_pairs_of_two_devices_are_told():
    found = results(base=[50.0, 51.0], row=[52.0, 53.0])
    assert not find_other_devices(found, "base")
    found[3]["device"] = "gpu"
    (told,) = find_other_devices(found, "base")
    assert told == "row 'row', seed 2 was computed on 'gpu' and the baseline on 'cpu'"


def test_means_of_logs():
    """Of losses and samples; not of times, scores or losses of test data."""
    records = [
        {"iteration": 9, "lr": 0.1, "loss_cls": 1.0, "rpn/num_pos_anchors": 2.0, "bbox/AP": 30.0},
        {"iteration": 19, "time": 0.2, "loss_cls": 2.0, "num_pos_anchors": 5, "a/bbox/AR@1": 1.0},
        {"iteration": 29, "validation/loss_cls": 2.0, "coco:/Annotations/validation/loss_cls": 2.0},
    ]
    means = {"logs/loss_cls": 1.5, "logs/rpn/num_pos_anchors": 2.0, "logs/num_pos_anchors": 5.0}
    assert ablation.mean_logs(records) == means


def finish(runs, row, seed):
    """Leaves the result of a run where it would be once it is finished."""
    (run,) = (run for run in runs if (run.row, run.seed) == (row, seed))
    run.folder.mkdir(parents=True)
    (result,) = results(**{row: [50.0]})
    run.file.write_text(json.dumps({**result, "seed": seed, **run.hashes}))


class TestRuns:
    """What is done with the folder and the GPUs of a run before it is trained."""

    @pytest.fixture
    def a_run(self, tmp_path):
        return Run("a", 1, tmp_path / "runs" / "a", ("--config-file", "x"), "x", {"code": "1"})

    def test_never_goes_on_with_one_of_other_code(self, a_run, monkeypatch):
        """Not even where the one that took its place ended before its first checkpoint."""
        monkeypatch.setattr(ablation, "ROOT", Path("/nowhere"))
        a_run.folder.mkdir(parents=True)
        (a_run.folder / "model_0000009.pth").touch()
        (a_run.folder / "hashes.json").write_text('{"code": "0"}')
        for _ in range(2):
            with pytest.raises(ValueError, match="failed .*No such file"):
                list(ablation.run_all([a_run], 1))
            assert not list(a_run.folder.glob("*.pth"))
        (a_run.folder / "model_0000009.pth").touch()  # its own
        with pytest.raises(ValueError, match="failed"):
            list(ablation.run_all([a_run], 1))
        assert list(a_run.folder.glob("*.pth"))

    def test_one_that_is_trained_in_is_left_alone(self, a_run):
        a_run.folder.mkdir(parents=True)
        (a_run.folder / "hashes.json").write_text('{"code": "0"}')
        code = (
            "import sys, time\nfrom pathlib import Path\n"
            "from libra_d2.engine.output_dir import hold_output_dir\n"
            "with hold_output_dir(Path(sys.argv[1])):\n    print('held', flush=True)\n"
            "    time.sleep(60)\n"
        )
        command = [sys.executable, "-c", code, str(a_run.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
            try:
                assert holder.stdout.readline() == "held\n"
                with pytest.raises(ValueError, match="is in use: process .* trains there"):
                    list(ablation.run_all([a_run], 1))
                assert (a_run.folder / "hashes.json").read_text() == '{"code": "0"}'
            finally:
                holder.kill()

    def test_a_training_of_something_else_is_kept(self, a_run):
        a_run.folder.mkdir(parents=True)
        (a_run.folder / "model_0000009.pth").touch()
        with pytest.raises(ValueError, match="holds a training of something else"):
            list(ablation.run_all([a_run], 1))
        assert [file.name for file in a_run.folder.iterdir()] == ["model_0000009.pth"]

    @pytest.mark.timeout(60)
    def test_a_folder_that_cannot_be_made_ends_all(self, a_run):
        a_run.folder.parent.mkdir()
        a_run.folder.touch()
        with pytest.raises(ValueError, match="cannot be written to"):
            list(ablation.run_all([a_run] * 3, 1))

    def test_the_parts_of_an_interrupted_one_add_up(self, a_run):
        a_run.folder.mkdir(parents=True)
        assert ablation._add_seconds(a_run, 1.5) == 1.5
        assert ablation._add_seconds(a_run, 2.0) == 3.5

    def test_gpus_are_those_that_are_visible(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        gpus = [ablation._environment(i, 3)["CUDA_VISIBLE_DEVICES"] for i in range(3)]
        assert gpus == ["0", "1", "0"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5")
        gpus = [ablation._environment(i, 3)["CUDA_VISIBLE_DEVICES"] for i in range(3)]
        assert gpus == ["GPU-a", "5", "GPU-a"]


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_shipped_plans_are_valid(plan, data, tmp_path):
    plan = read_plan(str(plan))
    plan.data = Data(train=data, test=data)
    runs = list_runs(plan, tmp_path)
    assert not any(run.result() for run in runs)
    assert {run.row for run in runs} == set(plan.rows)
    configs = {run.hashes["config"] for run in runs}
    assert len(configs) == len(plan.rows)  # each row changes something, and a seed nothing
    assert {run.hashes["code"] for run in runs} == {plans.hash_code()}


def test_where_images_are_kept_makes_no_other_result(data, tmp_path):
    plan = read_plan(str(PLANS[0]))
    plan.data, plan.seeds = Data(train=data, test=data), [1]
    before = [run.hashes for run in list_runs(plan, tmp_path)]
    plan.opts = [*plan.opts, "DATALOADER.CACHE", str(tmp_path / "kept")]
    assert [run.hashes for run in list_runs(plan, tmp_path)] == before


def test_a_run_is_what_solver_fast_comes_to(data, tmp_path, monkeypatch):
    plan = read_plan(str(PLANS[0]))
    plan.data, plan.seeds, plan.opts = Data(train=data, test=data), [1], ["SOLVER.FAST", True]
    fast = {"SOLVER.AMP.ENABLED": True}
    monkeypatch.setattr(plans, "choose_speed", lambda cfg: fast)
    before = [run.hashes for run in list_runs(plan, tmp_path)]
    fast["SOLVER.KEEP_MEMORY"] = True
    assert [run.hashes for run in list_runs(plan, tmp_path)] == before
    fast["SOLVER.AMP.ENABLED"] = False  # a machine that it is slow on
    assert all(run.hashes not in before for run in list_runs(plan, tmp_path))


def test_folds_hold_each_image_out_once(data, tmp_path):
    plan = read_plan(str(PLANS[0]))
    plan.data, plan.seeds = Data(all=data, folds=4), [1, 2, 3, 4]
    plan.rows = dict(list(plan.rows.items())[:1])
    runs = list_runs(plan, tmp_path)
    assert len({run.hashes["data"] for run in runs}) == 4
    held_out = []
    for i in range(1, 5):
        parts = [
            {image["id"] for image in json.loads(file.read_text())["images"]}
            for file in sorted((tmp_path / "folds").glob(f"fold{i}_*.json"))
        ]
        assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 8
        held_out += parts[0]
    assert sorted(held_out) == list(range(1, 9))


def test_a_seed_has_its_fold_whatever_the_others(data, tmp_path):
    plan = read_plan(str(PLANS[0]))
    plan.data, plan.rows = Data(all=data, folds=4), dict(list(plan.rows.items())[:1])
    plan.seeds = [1, 2, 3, 4]
    hashes = {run.seed: run.hashes for run in list_runs(plan, tmp_path)}
    plan.seeds = [7]
    (alone,) = list_runs(plan, tmp_path)
    assert alone.hashes == hashes[3]
    plan.seeds = [1, 5]
    with pytest.raises(ValueError, match="seeds 1 and 5 would have the same of 4 folds"):
        list_runs(plan, tmp_path)


def test_folds_of_other_sizes_go_on(data, tmp_path):
    """With epochs they have another number of iterations each, hence another config."""
    plan = read_plan(str(PLANS[0]))
    plan.data, plan.seeds = Data(all=data, folds=3), [1, 2, 3]
    plan.rows = dict(list(plan.rows.items())[:2])
    plan.opts = ["SOLVER.MAX_EPOCHS", 4]
    runs = list_runs(plan, tmp_path)
    assert len({run.hashes["config"] for run in runs}) > 2
    found = [{**run.hashes, "row": run.row, "seed": run.seed} for run in runs]
    check_unmixed(found, runs, tmp_path)
    for key, other in (("config", found[-1]["config"]), ("data", found[-1]["data"]), ("code", "x")):
        with pytest.raises(ValueError, match=f"a result of other {key}"):
            check_unmixed([{**found[0], key: other}], runs, tmp_path)


def test_runs_are_made_once_and_never_mixed(data, tmp_path, monkeypatch):
    plan = {
        "config": "configs/Demo/Base-Demo.yaml",
        "data": {"train": data, "test": data},
        "seeds": [1],
        "opts": [opt for opt in TOY[:-2] if "NUM_CLASSES" not in str(opt) and opt != 10],
        "rows": {"base": {}, "ball": {"opts": ["MODEL.RPN.NEGATIVE_POSITIVE_UB", 5]}},
    }
    plan["opts"] += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    file, output = tmp_path / "plan.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    begun = run_tool("ablate.py", file, "--output", output, "--rows", "base")
    assert begun.returncode == 0, begun.stderr
    stamps = _stamps(output)
    # It goes on with what is missing, and then there is nothing more to be made.
    first = run_tool("ablate.py", file, "--output", output)
    assert first.returncode == 0, first.stderr
    assert "over images" in first.stdout and "With one seed" in first.stdout
    records = read_results(output / "plan.csv")
    assert [r["row"] for r in records] == ["base", "ball"]
    assert all(r["seconds"] > 1 and r["memory_mib"] > 100 for r in records)
    assert all(r["logs/loss_cls"] > 0 for r in records)
    assert len(stamps) == 1 and stamps.items() < _stamps(output).items()
    stamps = _stamps(output)
    again = run_tool("ablate.py", file, "--output", output)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert _stamps(output) == stamps
    assert "warning" not in again.stderr
    (ball,) = output.glob("runs/plan/ball/*/result.json")
    result = ball.read_text()
    ball.write_text(json.dumps({**json.loads(result), "device": "another"}))
    mixed = run_tool("ablate.py", file, "--output", output)
    ball.write_text(result)
    assert "warning: row 'ball', seed 1 was computed on 'another' and the base" in mixed.stderr
    assert run_tool("ablate.py", file, "--output", output).stdout == first.stdout
    opts = ("SOLVER.BASE_LR", "1e-6")
    other = run_tool("ablate.py", file, "--output", output, "--opts", *opts)
    assert other.returncode == 2 and "a result of other config" in other.stderr
    # Nor of rows and seeds that are not asked for now.
    for args in (("--rows", "ball"), ("--seeds", "2")):
        other = run_tool("ablate.py", file, "--output", output, *args, "--opts", *opts)
        assert other.returncode == 2 and "a result of other config" in other.stderr
    # A run of the same code, config, data and seed that a table has is not made again.
    plan["rows"] = {"plain": {}, "bounded": plan["rows"]["ball"]}
    other_file = tmp_path / "other.yaml"
    other_file.write_text(yaml.safe_dump(plan, sort_keys=False))
    second = run_tool("ablate.py", other_file, "--output", output, "--seeds", "1")
    assert second.returncode == 0 and not (output / "runs" / "other").exists()
    renamed = [{**r, "row": n} for r, n in zip(records, ("plain", "bounded"), strict=True)]
    assert str(read_results(output / "other.csv")) == str(renamed)  # NaN equals nothing
    # Results of other seeds stay in a table.
    lines = (output / "plan.csv").read_text().splitlines(keepends=True)
    (output / "plan.csv").write_text("".join(lines[:2]) + lines[1].replace("base,1,", "base,2,"))
    third = run_tool("ablate.py", file, "--output", output)
    assert third.returncode == 0 and "| base | 2 |" in third.stdout
    found = [(r["row"], r["seed"]) for r in read_results(output / "plan.csv")]
    assert found == [("base", 1), ("base", 2), ("ball", 1)]


def _stamps(output):
    return {f: f.stat().st_mtime_ns for f in output.rglob("model_final.pth")}


@pytest.mark.parametrize(
    ("change", "args", "match"),
    [
        ("rows: []", (), "expected object, got array"),
        ("rows: {a: {optz: []}}", (), "optz"),
        ("rows: {}", (), "must have rows and seeds"),
        ("rows: {a: {opts: [MODEL.NO, 1]}}", (), "row 'a': override: there is no key MODEL.NO"),
        ("data: {train: x}", (), "data must have train and test, or all and at least two folds"),
        ("rows: [", (), "is not valid yaml"),
        ("", ("--rows", "z"), "there is no row 'z'; there is a"),
        ("", ("--jobs", "0"), "--jobs must be at least 1"),
        ("", ("--train", "x"), "give --train and --test, or --folds"),
        ("", ("--folds", "x", "y"), "--folds must be a data set and a number"),
        ("", ("--folds", "digits_vall", "2"), "'digits_vall' is not registered (did you mean"),
        ("data: {train: digits_vall, test: digits_val}", (), "'digits_vall' is not registered"),
        ("data: {train: coco_2017_val, test: digits_val}", (), "'coco_2017_val' cannot be read"),
        ("rows: {a/b: {}, a b: {}}", (), "rows 'a/b' and 'a b' have the same folder"),
    ],
)
def test_bad_plans(change, args, match, tmp_path):
    plan = {
        "config": "config: configs/Demo/Base-Demo.yaml",
        "data": "data: {train: digits_val, test: digits_val}",
        "rows": "rows: {a: {}}",
    }
    plan[change.partition(":")[0] or "rows"] = change or plan["rows"]
    file = tmp_path / "plan.yaml"
    file.write_text("\n".join(plan.values()))
    result = run_tool("ablate.py", file, "--output", tmp_path / "out", *args)
    assert result.returncode == 2 and match.lower() in result.stderr.lower(), result.stderr
    assert not (tmp_path / "out").exists()
