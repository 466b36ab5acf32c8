"""The runs of a plan, trained and scored, several at a time."""

import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from libra_d2.checkpoint import write_whole
from libra_d2.metrics import read_metrics, split_score

from .comparison import read_results, write_csv
from .output_dir import is_of_a_run, refuse_held
from .plan import ROOT, Plan, Run
from .speed import cpu_capabilities

__all__ = ["find_detections", "keep_results", "mean_logs", "run_all"]

_NO_LOGS = {"iteration", "lr", "eta_seconds", "time", "data_time", "rank_data_time"}


def find_detections(runs: Sequence[Run]) -> dict[tuple[str, int], tuple[Path, Path]]:
    """Of (row, seed): the files, in COCO's format, of its detections and what they are scored on.

    Runs that were finished elsewhere have none here.
    """
    found = {}
    for run in runs:
        file = run.folder / "inference" / "coco_instances_results.json"
        if file.is_file():
            found[run.row, run.seed] = file, Path(MetadataCatalog.get(run.test).json_file)
    return found


def keep_results(csv_file: Path, runs: Sequence[Run], plan: Plan) -> list[dict]:
    """Writes the results of runs beside those that are there, of other rows and seeds.

    Args:
        csv_file: what is there is read anew, as another ablate.py may have written it meanwhile.
        runs: of the plan.
        plan: in the order of whose rows results are written.

    Returns:
        Those of the plan's rows.
    """
    earlier = read_results(csv_file) if csv_file.is_file() else []
    results = {(result["row"], result["seed"]): result for result in earlier}
    results |= {(run.row, run.seed): result for run in runs if (result := run.result())}
    places = {row: i for i, row in enumerate(plan.rows)}
    ordered = sorted(results, key=lambda key: (places.get(key[0], len(places)), key))
    ordered = [results[key] for key in ordered]
    if ordered:
        write_whole(str(csv_file), lambda file: write_csv(ordered, Path(file)))
    return [result for result in ordered if result["row"] in places]


def run_all(runs: Sequence[Run], jobs: int) -> Iterator[Run]:
    """Trains and scores what is not finished, several at a time; yields each run as it ends.

    Each run has a GPU of its own, or its share of the CPU's threads.

    Raises:
        ValueError: if a run fails, which ends the others.
    """
    left = [run for run in runs if run.result() is None]
    places: queue.Queue[int] = queue.Queue()
    for place in range(jobs):
        places.put(place)
    stop = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_train, run, jobs, places, stop) for run in left]
        bar = tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", disable=None)
        try:
            for future in as_completed(futures):
                run = future.result()
                if run:
                    result = run.result()
                    line = f"{run.row}, seed {run.seed}: {result['seconds']:.0f} s"
                    tqdm.write(line, file=sys.stderr)
                    yield run
                bar.update()
        except BaseException:
            stop.set()
            raise
        finally:
            bar.close()


def _train(run: Run, jobs: int, places: queue.Queue, stop: threading.Event) -> Run | None:
    """Trains and scores one; returns it, or None if it was stopped."""
    if stop.is_set():
        return None
    place, start = places.get(), time.time()
    try:
        _make_folder(run)
        with open(run.folder / "output.txt", "a") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "train_net.py"), "--resume", *run.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(place, jobs),
            )
            memory = _wait(process, stop)
            seconds = _add_seconds(run, time.time() - start)
    finally:
        places.put(place)
    if memory is None:
        return None
    if process.returncode:
        lines = (run.folder / "output.txt").read_text().strip().splitlines()
        raise ValueError(
            f"row '{run.row}', seed {run.seed} failed ({run.folder}/output.txt): "
            f"{lines[-1] if lines else 'without a word'}"
        )
    result = _score(run, jobs)
    result["seconds"] = round(seconds, 1)
    result["memory_mib"] = _gpu_memory(run) or memory
    partial_file = run.file.with_suffix(".partial")
    partial_file.write_text(json.dumps(result, indent=1))
    partial_file.replace(run.file)
    return run


def _make_folder(run: Run) -> None:
    """The folder of a run: empty, or with what there is of it so far.

    Raises:
        ValueError: if it can't be made, is trained in, or holds a training of something else.
    """
    stamp, hashes = run.folder / "hashes.json", json.dumps(run.hashes)
    try:
        if not stamp.is_file() and is_of_a_run(run.folder):
            raise ValueError(
                f"'{run.folder}' holds a training of something else; give other --runs"
            )
        if stamp.is_file() and stamp.read_text() != hashes:
            refuse_held(run.folder)
            tqdm.write(
                f"{run.row}, seed {run.seed}: begun anew, as it was of other code, config or data",
                file=sys.stderr,
            )
            shutil.rmtree(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(hashes)
    except OSError as error:
        what = error.strerror or error
        raise ValueError(f"'{run.folder}' cannot be written to: {what}") from error


def _environment(place: int, jobs: int) -> dict[str, str]:
    """The environment here, with a GPU or a share of the threads for one of several jobs."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else range(torch.cuda.device_count())
        own = {"CUDA_VISIBLE_DEVICES": str(gpus[place % len(gpus)]).strip()}
    else:
        own = {"OMP_NUM_THREADS": str(_threads(jobs))}
    return {**os.environ, **own}


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def _device(jobs: int) -> str:
    """What a run was computed on; the number of threads changes the order of sums."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = cpu_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {_threads(jobs)} threads"


def _add_seconds(run: Run, seconds: float) -> float:
    """What all parts of a run have taken, which was interrupted between them."""
    file = run.folder / "seconds.txt"
    seconds += float(file.read_text()) if file.is_file() else 0.0
    write_whole(str(file), lambda path: Path(path).write_text(str(seconds)))
    return seconds


def _wait(process: subprocess.Popen, stop: threading.Event) -> int | None:
    """Waits for a process; returns its peak memory, MiB, or None if it had to be stopped."""
    pid = 0
    while not pid:
        if stop.wait(0.2):
            process.terminate()
            process.wait()
            return None
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss // 1024


def _score(run: Run, jobs: int) -> dict:
    """What a run's last evaluation says."""
    records = read_metrics(run.folder / "metrics.json")
    scored = [r for r in records if any(map(split_score, r))]
    if not scored:
        raise ValueError(f"row '{run.row}', seed {run.seed} was not scored: TEST.EVAL_PERIOD?")
    trained = [r for r in records if "total_loss" in r]
    return {
        "row": run.row,
        "seed": run.seed,
        **{key: value for key, value in scored[-1].items() if split_score(key)},
        **mean_logs(trained[-max(1, len(trained) // 4) :]),
        "iterations": 1 + max(r["iteration"] for r in trained),
        "device": _device(jobs),
        **run.hashes,
    }


def mean_logs(records: Sequence[dict]) -> dict[str, float]:
    """Means of what training has logged but for times and rates, as ``logs/loss_cls`` and others.

    Args:
        records: those of ``metrics.json`` to take.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in _NO_LOGS and "validation/" not in name and not split_score(name):
                values.setdefault(f"logs/{name}", []).append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}


def _gpu_memory(run: Run) -> int:
    """The most that a run's log tells of a GPU's memory, MiB; 0 on a CPU."""
    log = (run.folder / "output.txt").read_text()
    return max(map(int, re.findall(r"max_mem: (\d+)M", log)), default=0)
