#!/usr/bin/env python
"""Measures speed and memory, side by side in one run, and prints a table a topic (Markdown).

python tools/benchmark.py                 # all, on the GPU if there is one
python tools/benchmark.py samplers bfp    # some
python tools/benchmark.py growth --json growth.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent), str(_HERE)]

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

import torch
from benchmarks import gpu, growth, limits, loading, models, parts, samplers, training
from benchmarks.measuring import DEVICE, TABLES

from libra_d2.checkpoint import write_whole
from libra_d2.engine.run import one_sentence_errors
from libra_d2.modeling.half import tf32

BENCHMARKS = {
    "samplers": samplers.benchmark_samplers,
    "bfp": parts.benchmark_bfp,
    "matching": parts.benchmark_matching,
    "proposals": parts.benchmark_proposals,
    "pooling": parts.benchmark_pooling,
    "reweighting": parts.benchmark_reweighting,
    "iteration": models.benchmark_iteration,
    "retinanet": models.benchmark_retinanet,
    "speed": models.benchmark_speed,
    "training": training.benchmark_training,
    "loading": loading.benchmark_loading,
    "inference": models.benchmark_inference,
    "growth": growth.benchmark_growth,
    "gpu": gpu.benchmark_gpu,
    "gpu-short": gpu.benchmark_gpu_short,
    "limits": limits.benchmark_limits,
    "export": models.benchmark_export,
}

_WITHOUT_BEING_ASKED = [name for name in BENCHMARKS if not name.startswith("gpu")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", help=f"of {', '.join(BENCHMARKS)}; if none, all but gpu and gpu-short"
    )
    parser.add_argument("--repeats", type=int, default=15, help="the median is over so many")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    unknown = [name for name in args.what if name not in BENCHMARKS]
    if unknown or args.repeats < 1:
        parser.error(
            f"there is no benchmark '{unknown[0]}'; there is {', '.join(BENCHMARKS)}"
            if unknown
            else f"--repeats must be at least 1, got {args.repeats}"
        )
    name = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {DEVICE}: {name}")
    with one_sentence_errors(parser.prog):
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise ValueError(f"--json '{args.json}' must be a file in a folder that exists")
        for what in args.what or _WITHOUT_BEING_ASKED:
            try:
                with tf32(False):  # float32 is float32, unless a table says otherwise
                    BENCHMARKS[what](args.repeats)
            finally:
                if args.json and TABLES:  # after each, as all take long
                    _write(args.json, name)


def _write(file: str, name: str) -> None:
    record = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "device": DEVICE}
    text = json.dumps({**record, "name": name, "tables": TABLES}, indent=1)
    write_whole(file, lambda path: Path(path).write_text(text))


if __name__ == "__main__":
    main()
