"""Plans of trainings that are compared: rows and seeds, and the runs that they come to."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from libra_d2.config import set_key
from libra_d2.data.sources import check_registered, is_source, open_data, open_source
from libra_d2.data.splits import make_folds

from .config_file import load_config
from .own_data import take_from_data
from .speed import choose_speed

__all__ = [
    "ROOT",
    "Data",
    "Plan",
    "Run",
    "add_former",
    "check_unmixed",
    "list_runs",
    "read_plan",
]

ROOT = Path(__file__).resolve().parents[2]
# What makes a run the same as another.
_IDENTITY = ("code", "config", "data", "seed")
# Of what SOLVER.FAST comes to on a machine.
_CHANGES_NOTHING = ("DATALOADER.NUM_WORKERS", "DATALOADER.PIN_MEMORY", "SOLVER.KEEP_MEMORY")


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """What one row changes."""

    config: str | None = None
    opts: list[Any] = []
    seeds: list[int] | None = None


class Data(msgspec.Struct, forbid_unknown_fields=True):
    """What is trained on and scored; or one data set in so many folds."""

    train: str | None = None
    test: str | None = None
    all: str | None = None
    folds: int = 0


class Plan(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Rows to compare with a baseline, over seeds.

    Args:
        config: of the rows that name none, relative to this project.
        rows: by name; the first is the baseline.
        data: "train" and "test", or "all" and "folds".
        seeds: of each row; with folds, seed 1 has the first, and each a fold of its own.
        opts: overrides for all rows.
        metric: what is compared.
    """

    config: str
    rows: dict[str, Row]
    data: Data
    seeds: list[int] = msgspec.field(default_factory=lambda: [1, 2, 3])
    opts: list[Any] = []
    metric: str = "bbox/AP"

    @property
    def baseline(self) -> str:
        """The row that others are compared with."""
        return next(iter(self.rows))


def read_plan(path: str) -> Plan:
    """Reads a plan.

    Raises:
        ValueError: naming what is wrong with it.
    """
    try:
        plan = msgspec.convert(yaml.safe_load(Path(path).read_text()), Plan)
    except FileNotFoundError:
        raise ValueError(f"plan '{path}' does not exist") from None
    except OSError as error:
        raise ValueError(f"plan '{path}' cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"plan '{path}' is not valid yaml") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"plan '{path}': {str(error).replace('`', '')}") from None
    if not plan.rows or not plan.seeds:
        raise ValueError(f"plan '{path}' must have rows and seeds")
    return plan


@dataclass(frozen=True)
class Run:
    """One training and its score."""

    row: str
    seed: int
    folder: Path
    command: tuple[str, ...]
    test: str
    hashes: dict[str, str]
    known: dict | None = None

    @property
    def file(self) -> Path:
        """Its result, once it is finished here."""
        return self.folder / "result.json"

    def result(self) -> dict | None:
        """Its result; None if it is not finished."""
        return json.loads(self.file.read_text()) if self.file.is_file() else self.known


def list_runs(plan: Plan, folder: Path, known: Sequence[dict] = ()) -> list[Run]:
    """All runs of a plan, seed by seed, so that pairs are complete early.

    Args:
        plan: what to run.
        folder: where runs are kept.
        known: results of this plan or others; a run of the same code, config, data and seed as one
            of them is finished, whatever its row is called.

    Raises:
        ValueError: if a row's config or data are wrong; if two rows have the same folder; or if a
            result in the folder is of other code, config or data.
    """
    places: dict[str, str] = {}
    for name in plan.rows:
        other = places.setdefault(_safe(name), name)
        if other != name:
            raise ValueError(f"rows '{other}' and '{name}' have the same folder; rename one")
    seeds = sorted({seed for row in plan.rows.values() for seed in row.seeds or plan.seeds})
    splits = _splits(plan.data, seeds, folder)
    same = {tuple(result[key] for key in _IDENTITY): result for result in known}
    code = hash_code()
    data = {names: _hash(*map(_hash_data, names)) for names in set(splits.values())}
    runs, configs = [], {}
    for seed in seeds:
        for name, row in plan.rows.items():
            if seed not in (row.seeds or plan.seeds):
                continue
            train, test = splits[seed]
            config = str(ROOT / (row.config or plan.config))
            opts = [str(opt) for opt in (*plan.opts, *row.opts)]
            place = folder / _safe(name) / f"seed{seed}"
            arguments = ["DATASETS.TRAIN", str((train,)), "DATASETS.TEST", str((test,)), *opts]
            if (name, train, test) not in configs:  # it takes time, as the data are read
                try:
                    configs[name, train, test] = _hash_config(config, arguments)
                except ValueError as error:
                    raise ValueError(f"row '{name}': {error}") from None
            hashes = {"code": code, "config": configs[name, train, test], "data": data[train, test]}
            command = ("--config-file", config, "--train", train, "--val", test)
            command += ("--output", str(place), *opts, "SEED", str(seed))
            result = same.get(tuple({**hashes, "seed": seed}[key] for key in _IDENTITY))
            result = {**result, "row": name} if result else None
            run = Run(name, seed, place, command, test, hashes, result)
            if run.file.is_file():
                check_unmixed([run.result()], [run], place)
            runs.append(run)
    return runs


def add_former(
    plan: Plan, asked: dict[str, Sequence[int]], results: Sequence[dict]
) -> dict[str, Row]:
    """The rows that are asked for, and those of former calls, all with the seeds of both.

    Args:
        plan: what there is to ask for.
        asked: seeds of each row; the first row is compared with.
        results: of former calls.
    """
    seeds = {row: set(asked.get(row, ())) for row in dict.fromkeys([next(iter(asked)), *plan.rows])}
    for result in results:
        seeds.get(result["row"], set()).add(result["seed"])
    rows = {
        row: msgspec.structs.replace(plan.rows[row], seeds=sorted(s)) for row, s in seeds.items()
    }
    return {name: row for name, row in rows.items() if row.seeds}


def check_unmixed(results: Sequence[dict], runs: Sequence[Run], where: Path) -> None:
    """Checks that results are those of runs.

    Args:
        results: those of other rows and seeds than the runs' are not looked at.
        runs: of a plan.
        where: the results lie.

    Raises:
        ValueError: if one is of other code, of another config of its row, or of other data.
    """
    hashes = {(run.row, run.seed): run.hashes for run in runs}
    for result in results:
        row, seed = result["row"], result["seed"]
        expected = hashes.get((row, seed), {})
        other = [key for key, value in expected.items() if value != result[key]]
        if other:
            raise ValueError(
                f"'{where}' holds a result of other {' and '.join(other)} (row '{row}', seed "
                f"{seed}); results are never mixed: give another --output, or remove it"
            )


def hash_code() -> str:
    """Of all that decides what a run computes: this package and the versions of others."""
    files = sorted((ROOT / "libra_d2").rglob("*.py"))
    packages = ("torch", "torchvision", "detectron2", "fvcore", "numpy", "opencv-python", "pillow")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return _hash(*versions, *(file.read_text() for file in files))


def _hash_config(config_file: str, opts: Sequence[str]) -> str:
    """Of what a config comes to, but for the seed, the output, and what data are called."""
    cfg = load_config(config_file, opts, settle=take_from_data)
    content = cfg.clone()
    content.defrost()
    content.OUTPUT_DIR, content.SEED = "", 0
    content.DATALOADER.CACHE = ""  # which changes nothing
    for key, value in choose_speed(cfg).items():
        if key not in _CHANGES_NOTHING:
            set_key(content, key, value)
    content.DATASETS.TRAIN = content.DATASETS.TEST = ()  # which have a hash of their own
    return _hash(content.dump())


def _hash_data(name: str) -> str:
    """Of a data set's annotations, and of the names and sizes of its images."""
    if is_source(name):
        source = open_source(name)
        content, root = msgspec.json.encode(source.coco), source.image_root
        files = [root / (image.file_name or "") for image in source.coco.images]
    else:
        check_registered(name)
        try:
            records = DatasetCatalog.get(name)  # draws an embedded one
            json_file = MetadataCatalog.get(name).get("json_file")
            content = Path(json_file).read_bytes() if json_file else repr(records).encode()
        except OSError as error:
            raise ValueError(f"data set '{name}' cannot be read: {error}") from error
        files = [Path(record["file_name"]) for record in records]
    sizes = [f"{file.name} {file.stat().st_size}" for file in files if file.is_file()]
    return _hash(content.decode("utf-8", "replace"), *sizes)


def _splits(data: Data, seeds: Sequence[int], output: Path) -> dict[int, tuple[str, str]]:
    """What each seed trains on and is scored on."""
    if data.train and data.test and not data.all:
        return dict.fromkeys(seeds, (data.train, data.test))
    if not (data.all and data.folds > 1) or data.train or data.test:
        raise ValueError("data must have train and test, or all and at least two folds")
    source = open_data(data.all)
    try:
        folds = make_folds(source, data.folds, output / "folds")
    except OSError as error:
        raise ValueError(f"'{output}' cannot be written to: {error.strerror}") from error
    of_fold: dict[int, int] = {}
    for seed in seeds:
        fold = (seed - 1) % data.folds
        if of_fold.setdefault(fold, seed) != seed:
            raise ValueError(
                f"seeds {of_fold[fold]} and {seed} would have the same of {data.folds} folds; "
                "intervals are over folds: give each its own"
            )
    return {seed: folds[fold] for fold, seed in of_fold.items()}


def _hash(*texts: str) -> str:
    value = hashlib.sha256()
    for text in texts:
        value.update(text.encode())
        value.update(b"\0")
    return value.hexdigest()[:12]


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
