"""What ``train_net.py`` does: arguments, setup, training or evaluation."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from libra_d2 import data, modeling  # noqa: F401  (imported to register)
from libra_d2.data.sources import FORMS
from libra_d2.quiet import silence_known_warnings

from .checks import check_run
from .config_file import load_config
from .launch import check_processes, count_processes, is_main_process, launch
from .output_dir import remove_run
from .own_data import register_data, take_from_data
from .trainer import LibraTrainer
from .weights import WeightsCheckpointer

__all__ = ["main", "make_parser", "one_sentence_errors"]

# detectron2's dumps of several hundred lines; they go to log.txt alone.
_NOT_FOR_THE_SCREEN = (
    "Command line arguments",
    "Contents of args.config_file",
    "Environment info",
    "Model:",
    "Rank of current process",
    "Running with full config",
)


def make_parser() -> argparse.ArgumentParser:
    """detectron2's arguments and two more."""
    parser = default_argument_parser()
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        help="number of CPU processes per machine, with --num-gpus 0",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a training run that OUTPUT_DIR holds"
    )
    what = "a data set: a registered name, " + ", ".join(FORMS.values()) + "; may be repeated"
    for name, group in (("--train", "DATASETS.TRAIN"), ("--val", "DATASETS.TEST")):
        parser.add_argument(name, action="append", metavar="DATA", help=f"{group}: {what}")
    parser.add_argument("--output", metavar="FOLDER", help="OUTPUT_DIR: where the run is kept")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Trains, or with ``--eval-only`` evaluates.

    Args:
        argv: the command line without the program's name; None for this process's own.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence_errors(parser.prog):
        if not args.config_file:
            raise ValueError("give a config with --config-file")
        num_processes = count_processes(args)
        # First, so that a device given on the command line counts.
        opts = ["MODEL.DEVICE", "cpu"] if args.num_gpus == 0 else []
        for key, value in (("DATASETS.TRAIN", args.train), ("DATASETS.TEST", args.val)):
            opts += [key, str(tuple(value))] if value else []
        opts += ["OUTPUT_DIR", args.output] if args.output else []
        opts += args.opts
        settle = partial(take_from_data, eval_only=args.eval_only, opts=opts)
        cfg = load_config(args.config_file, opts, settle=settle)
        check_processes(args, cfg.MODEL.DEVICE)
        if is_main_process():
            check_run(
                cfg,
                config_file=args.config_file,
                eval_only=args.eval_only,
                resume=args.resume,
                overwrite=args.overwrite,
                num_processes=num_processes,
            )
    if args.overwrite and not args.eval_only and is_main_process():
        remove_run(Path(cfg.OUTPUT_DIR))
    launch(_run, args, cfg.MODEL.DEVICE, (cfg, args))


@contextlib.contextmanager
def one_sentence_errors(program: str) -> Iterator[None]:
    """Turns a ``ValueError`` into one sentence and exit status 2, an interrupt into 130."""
    try:
        yield
    except ValueError as error:
        if is_main_process():
            print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """One process's part."""
    silence_known_warnings()
    register_data(cfg, args.eval_only)
    _setup(cfg, args)
    if args.eval_only:
        model = LibraTrainer.build_model(cfg)
        checkpointer = WeightsCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = LibraTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(LibraTrainer.test_with_augmentation(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    trainer = LibraTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def _setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """detectron2's default setup, with its dumps kept off the screen."""
    if args.eval_only:
        # The folder may hold a training run, whose config and log must stay as they are.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / "inference")
    # Called with the very arguments of default_setup, which makes each logger only once.
    make_logger = partial(setup_logger, cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    for logger in (make_logger(name="fvcore"), make_logger(), make_logger(name="libra_d2")):
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.addFilter(lambda r: not r.getMessage().startswith(_NOT_FOR_THE_SCREEN))
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu" and not torch.cuda.is_available():
        logging.getLogger("libra_d2").info("no GPU found: running on the CPU")
