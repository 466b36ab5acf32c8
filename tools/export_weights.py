#!/usr/bin/env python
"""Makes of a training checkpoint a file of weights to publish.

python tools/export_weights.py output/RUN/model_final.pth OUT.safetensors

Optimizer and schedule are left out. Beside OUT it writes, under its name, .json with its sha256,
names of classes, and the metrics of the checkpoint's own iteration; and .yaml, the config, with
which tools/predict.py takes OUT: if metrics.json and config.yaml lie beside the checkpoint or are
given.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from torch import Tensor

from libra_d2.checkpoint import (
    check_output,
    read_weights,
    refuse_existing,
    write_weights,
    write_whole,
)
from libra_d2.engine import load_config
from libra_d2.engine.lazy_config import is_lazy_yaml
from libra_d2.engine.run import one_sentence_errors
from libra_d2.engine.weights import class_names_of
from libra_d2.metrics import read_metrics


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="checkpoint of a run, .pth")
    parser.add_argument("output", help="file to write: .pth or .safetensors")
    parser.add_argument("--config-file", help="default: config.yaml beside the checkpoint")
    parser.add_argument("--metrics", help="default: metrics.json beside the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def find_model(content: dict, path: str) -> dict[str, Tensor]:
    model = content.get("model", content)
    if not isinstance(model, dict) or not any(isinstance(v, Tensor) for v in model.values()):
        raise ValueError(f"'{path}' is not a checkpoint of a model")
    return {name: value for name, value in model.items() if isinstance(value, Tensor)}


def read_config(given: str | None, beside: Path) -> str:
    """The config's text, checked; empty if there is none, or it came from a LazyConfig."""
    path = Path(given) if given else beside / "config.yaml"
    if not path.is_file() and given is None:
        return ""
    if path.suffix == ".py" or is_lazy_yaml(path):
        if given is None:
            return ""
        raise ValueError(
            f"'{path}' is a LazyConfig, which is code: publish the .py file itself, and leave "
            "--config-file out"
        )
    # As a whole, without the files that it is based on.
    return load_config(str(path), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]).dump()


def find_metrics(given: str | None, beside: Path, iteration: int | None) -> dict[str, float]:
    """The numbers in a run's metrics.json of the evaluation at an iteration; none if there is none.

    The evaluation at the end of a run is logged with the iteration that would come next.
    """
    path = Path(given) if given else beside / "metrics.json"
    if given is None and not path.is_file():
        return {}
    found = [
        {name: value for name, value in record.items() if "/AP" in name or name == "iteration"}
        for record in read_metrics(path)
    ]
    by_iteration = {record["iteration"]: record for record in found if len(record) > 1}
    if iteration is None:
        return {}
    return by_iteration.get(iteration) or by_iteration.get(iteration + 1, {})


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        side, config_file = (str(Path(args.output).with_suffix(end)) for end in (".json", ".yaml"))
        check_output(args.output, args.overwrite)
        read = [args.config_file, args.metrics]
        read += [str(Path(args.input).parent / name) for name in ("config.yaml", "metrics.json")]
        for path in (side, config_file):
            refuse_existing(path, args.overwrite)
            if Path(path).resolve() in [Path(name).resolve() for name in read if name]:
                raise ValueError(f"'{path}' is read itself; give another output")
        if Path(args.input).resolve() == Path(args.output).resolve():
            raise ValueError(f"'{args.input}' would replace itself; give another output")
        content = read_weights(args.input)
        model = find_model(content, args.input)
        beside = Path(args.input).parent
        iteration = content.get("iteration")
        iteration = iteration if isinstance(iteration, int) else None
        record = {
            "config": read_config(args.config_file, beside),
            "class_names": class_names_of(args.input),
            "iteration": iteration,
            "metrics": find_metrics(args.metrics, beside, iteration),
        }
        meta = {name: json.dumps(record[name]) for name in ("class_names", "iteration", "metrics")}
        meta["config"] = record["config"]
        write_weights(args.output, model, meta, args.overwrite)
        if record["config"]:
            write_whole(config_file, lambda path: Path(path).write_text(record["config"]))
        record["sha256"] = hashlib.sha256(Path(args.output).read_bytes()).hexdigest()
        write_whole(side, lambda path: Path(path).write_text(json.dumps(record, indent=1)))
    print(f"wrote {args.output} and {side}")
    print(f"sha256 {record['sha256']}")


if __name__ == "__main__":
    main()
