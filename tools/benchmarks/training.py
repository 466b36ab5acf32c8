"""Whole steps of training, from files to new weights, against detectron2's own trainer."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage

from libra_d2.engine import LibraTrainer, load_config
from libra_d2.engine.own_data import take_from_data
from libra_d2.engine.speed import settle_speed

from .measuring import CONFIGS, DEVICE, measure, show, synchronize
from .models import PLAIN

_FAST = ("SOLVER.FAST", "True")
_FASTER, _LIBRA = "Demo/Base-Demo.yaml", "Demo/libra_faster_rcnn.yaml"
_RUNS = {
    "Faster R-CNN (detectron2)": (DefaultTrainer, _FASTER, PLAIN),
    "Libra Faster R-CNN": (LibraTrainer, _LIBRA, ()),
    "Faster R-CNN, SOLVER.FAST": (LibraTrainer, _FASTER, _FAST),
    "Libra Faster R-CNN, SOLVER.FAST": (LibraTrainer, _LIBRA, _FAST),
}


def benchmark_training(repeats: int) -> None:
    """The demo's steps, in turns, each run in a process: memory is kept for a whole one."""
    context, steps = get_context("spawn"), {}
    with contextlib.ExitStack() as stack:
        for name in _RUNS:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(name, there))
            process.start()
            there.close()  # or its end would not be noticed here
            stack.callback(process.join)
            stack.callback(here.send, "")
            steps[name] = partial(_ask, here)
        seconds = measure(steps, repeats, warmup=5)
    plain, batch = next(iter(seconds.values())), load_config(str(CONFIGS / _FASTER))
    batch = batch.SOLVER.IMS_PER_BATCH
    rows = [(name, s, batch / s, plain / s) for name, s in seconds.items()]
    headers = ("run", "s a step", "images/s", "times as many")
    show(f"Steps of the demo, {batch} images of 320 pixels ({DEVICE})", rows, headers)


def _ask(connection: Connection) -> None:
    connection.send("step")
    connection.recv()


def _serve(name: str, connection: Connection) -> None:
    """Makes a step whenever it is asked to, until nothing is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            step = _make_step(*_RUNS[name], folder)
        while connection.recv():
            step()
            synchronize()
            connection.send("done")


def _make_step(
    trainer: type[DefaultTrainer], config: str, opts: tuple[str, ...], folder: str
) -> Callable:
    def settle(cfg: CfgNode) -> None:
        take_from_data(cfg, opts=opts)
        settle_speed(cfg)

    opts = ("OUTPUT_DIR", folder, *opts)
    cfg = load_config(str(CONFIGS / config), opts, settle=settle)
    if cfg.FLOAT32_PRECISION:  # what detectron2's default_setup would set
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    running = trainer(cfg)

    def step() -> None:
        with EventStorage() as storage:
            running.storage = running._trainer.storage = storage
            running.iter = running._trainer.iter = 0
            running.run_step()

    return step
