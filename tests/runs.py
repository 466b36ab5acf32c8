"""Runs in this process on a tiny data set, and what can be done to them."""

import json
import os

import pytest
import torch
from formats import make_coco
from toys import CONFIGS, SMALL, SMALL_RETINANET, toy_opts

from libra_d2.engine import LibraTrainer, main

LIBRA, RETINANET = "Base-Libra-RCNN-FPN.yaml", "Base-Libra-RetinaNet.yaml"


@pytest.fixture(scope="module")
def tiny_coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_coco(folder)
    return f"coco:{folder}/annotations.json"


@pytest.fixture
def run(tiny_coco, tmp_path):
    """Runs train_net.py in this process, on a toy; returns its exit status."""

    def run(*args, config=LIBRA, flags=(), output=tmp_path / "out", iterations=6, score=False):
        small = SMALL_RETINANET if config == RETINANET else SMALL
        names = ["--train", tiny_coco, "--output", str(output)]
        names += ["--val", tiny_coco] if score else []
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


def records(out):
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
