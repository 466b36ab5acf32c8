"""What ``train_net.py`` does: arguments, setup, training or evaluation."""

import argparse
import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from libra_d2 import data, modeling  # noqa: F401  (imported to register)
from libra_d2.checkpoint import read_weights
from libra_d2.data.sources import FORMS
from libra_d2.quiet import silence_known_warnings

from .checks import check_run
from .config_file import load_config, tell_changes
from .launch import check_processes, count_processes, is_main_process, launch
from .lazy_config import RunConfig, in_places, load_lazy_config, to_save
from .lazy_trainer import LazyTrainer
from .output_dir import (
    drop_metrics_from,
    hold_output_dir,
    is_of_a_run,
    is_restarted,
    replaced_run,
)
from .own_data import register_data, take_from_data
from .plain_errors import plain_errors
from .rehearsal import rehearse
from .speed import settle_speed
from .stopping import Signals, StoppedError
from .trainer import LibraTrainer
from .weights import WeightsCheckpointer, find_checkpoint

__all__ = ["main", "make_parser", "one_sentence_errors"]

# Seconds after which a process speaks that is not the first. Where they all fail alike, the first
# has ended the job by then.
_PATIENCE = 5
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
    """detectron2's arguments, and those of data, output, CPU processes and errors."""
    parser = default_argument_parser()
    parser.allow_abbrev = False
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        help="number of CPU processes per machine, with --num-gpus 0",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a training run that OUTPUT_DIR holds; it is moved aside until the new one "
        "has a checkpoint",
    )
    what = "a data set: a registered name, " + ", ".join(FORMS.values()) + "; may be repeated"
    for name, group in (("--train", "DATASETS.TRAIN"), ("--val", "DATASETS.TEST")):
        parser.add_argument(name, action="append", metavar="DATA", help=f"{group}: {what}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--output", metavar="FOLDER", help="OUTPUT_DIR: where the run is kept")
    return parser


def main(
    argv: list[str] | None = None,
    *,
    trainer_class: type[LibraTrainer] | None = None,
    make_hooks: Sequence[Callable[[CfgNode], HookBase]] = (),
) -> None:
    """Trains, or with ``--eval-only`` evaluates.

    Args:
        argv: the command line without the program's name; None for this process's own.
        trainer_class: instead of :class:`LibraTrainer`, or of :class:`LazyTrainer` for a
            LazyConfig, of which it is a subclass.
        make_hooks: functions from the run's config to a hook that the trainer gets beside its own;
            with several processes, of a module's own, to be handed on.

    Raises:
        TypeError: if the class does not fit the config.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    is_lazy = str(args.config_file).endswith(".py")
    default_class = LazyTrainer if is_lazy else LibraTrainer
    trainer_class = trainer_class or default_class
    if not issubclass(trainer_class, default_class):
        raise TypeError(f"trainer_class must be a {default_class.__name__}, got {trainer_class}")
    with one_sentence_errors(parser.prog, args.debug, in_places if is_lazy else str):
        if not args.config_file:
            raise ValueError("give a config with --config-file")
        num_processes = count_processes(args)
        # First, so that a device given on the command line counts.
        opts = ["MODEL.DEVICE", "cpu"] if args.num_gpus == 0 else []
        opts += ["SOLVER.AMP.ENABLED", "False"] if args.eval_only else []  # it is of training
        for key, value in (("DATASETS.TRAIN", args.train), ("DATASETS.TEST", args.val)):
            opts += [key, str(tuple(value))] if value else []
        # As text, whatever it looks like.
        opts += ["OUTPUT_DIR", repr(args.output)] if args.output else []
        opts += args.opts
        settle = partial(_settle, eval_only=args.eval_only, opts=opts)
        if is_lazy:
            cfg = load_lazy_config(args.config_file, opts, settle=settle)
        else:
            cfg = load_config(args.config_file, opts, settle=settle)
        check_processes(args, cfg.MODEL.DEVICE)
        if not args.eval_only and is_restarted(Path(cfg.OUTPUT_DIR)):
            args.resume, args.overwrite = True, False
        if is_main_process():
            check_run(
                cfg,
                config_file=args.config_file,
                eval_only=args.eval_only,
                resume=args.resume,
                overwrite=args.overwrite,
                num_processes=num_processes,
                builds_model=args.eval_only or num_processes > 1,
                trainer_class=trainer_class,
            )
        main_args = (cfg, args, parser.prog, trainer_class, make_hooks)
        launch(_run_and_tell, args, cfg.MODEL.DEVICE, main_args)


@contextlib.contextmanager
def one_sentence_errors(
    program: str, debug: bool = False, rename: Callable[[str], str] = str
) -> Iterator[None]:
    """Turns a ``ValueError`` into one sentence and exit status 2, an interrupt into 130.

    Args:
        program: the name to put before it.
        debug: whether to print the traceback too.
        rename: gives the sentence other names of keys.
    """
    try:
        yield
    except (ValueError, StoppedError) as error:
        if debug:
            traceback.print_exc()
        is_stopped = isinstance(error, StoppedError)
        if not is_main_process():
            time.sleep(_PATIENCE)
        what = error.sentence if is_stopped else f"error: {error}"
        print(f"{program}: {rename(what)}", file=sys.stderr)
        raise SystemExit(error.code if is_stopped else 2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _settle(cfg: CfgNode, eval_only: bool, opts: Sequence[str]) -> None:
    """Fills in what data and machine settle, in place."""
    take_from_data(cfg, eval_only=eval_only, opts=opts)
    if not eval_only:
        settle_speed(cfg)


def _run_and_tell(
    cfg: CfgNode,
    args: argparse.Namespace,
    program: str,
    trainer_class: type[LibraTrainer],
    make_hooks: Sequence[Callable[[CfgNode], HookBase]],
) -> None:
    """One process's part."""
    silence_known_warnings()
    rename = in_places if isinstance(cfg, RunConfig) else str
    with one_sentence_errors(program, args.debug, rename):
        cfg = _with_seed(cfg, args.resume)
        register_data(cfg, args.eval_only)
        if args.eval_only:
            with plain_errors(cfg):
                _evaluate(cfg, args, trainer_class)
        else:
            _train(cfg, args, trainer_class, make_hooks)


def _evaluate(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[LibraTrainer]) -> None:
    output = Path(cfg.OUTPUT_DIR)
    # What a training run has left stays as it is.
    folder = output / ("evaluation" if is_of_a_run(output) else "inference")
    _setup(cfg, args, folder)
    model = trainer_class.build_model(cfg)
    checkpointer = WeightsCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    evaluators = [trainer_class.build_evaluator(cfg, n, str(folder)) for n in cfg.DATASETS.TEST]
    results = trainer_class.test(cfg, model, evaluators)
    if cfg.TEST.AUG.ENABLED:
        results.update(trainer_class.test_with_augmentation(cfg, model, str(folder)))
    if comm.is_main_process():
        verify_results(cfg, results)


def _train(
    cfg: CfgNode,
    args: argparse.Namespace,
    trainer_class: type[LibraTrainer],
    make_hooks: Sequence[Callable[[CfgNode], HookBase]],
) -> None:
    output, is_main = Path(cfg.OUTPUT_DIR), comm.is_main_process()
    alone = contextlib.nullcontext
    with Signals() as signals:
        signals.at_once = True  # until there is something to save
        if is_main:
            print("rehearsing one step; nothing is written before it has worked", flush=True)
        rehearse(cfg, args.resume, trainer_class)
        with (
            hold_output_dir(output) if is_main else alone(),
            replaced_run(output, args.resume, args.overwrite) if is_main else alone() as remove,
        ):
            if is_main and args.resume:
                tell_changes(output, to_save(cfg))
            comm.synchronize()
            _setup(cfg, args, output)
            trainer = trainer_class(cfg)
            trainer.add_hooks([make_hook(cfg) for make_hook in make_hooks])
            trainer.signals, trainer.on_periodic_checkpoint = signals, remove
            trainer.resume_or_load(resume=args.resume)
            if is_main:
                is_extended = trainer.start_iter < trainer.max_iter
                drop_metrics_from(output, trainer.start_iter, keep_score=is_extended)
            trainer.train()


def _with_seed(cfg: CfgNode, resume: bool) -> CfgNode:
    """The config with the seed of the run, which a negative one leaves open."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    checkpoint = find_checkpoint(Path(cfg.OUTPUT_DIR)) if resume else ""
    drawn = comm.shared_random_seed() % 2**31
    cfg.SEED = read_weights(checkpoint).get("seed", drawn) if checkpoint else drawn
    cfg.freeze()
    return cfg


def _setup(cfg: CfgNode, args: argparse.Namespace, folder: Path) -> None:
    """detectron2's default setup, in a folder, with its dumps kept off the screen."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    for name in ("fvcore", "detectron2", "libra_d2"):
        _make_logger(name, cfg.OUTPUT_DIR)
    default_setup(to_save(cfg), args)
    if cfg.MODEL.DEVICE == "cpu" and not torch.cuda.is_available():
        logging.getLogger("libra_d2").info("no GPU found: running on the CPU")


# Of the loggers of runs of this process, by logger and folder.
_handlers: dict[tuple[str, str], list[logging.Handler]] = {}


def _make_logger(name: str, folder: str) -> None:
    """A logger on the screen and in a run's folder, no longer in those of runs before."""
    logger = logging.getLogger(name)
    former = [h for (other, _), own in _handlers.items() if other == name for h in own]
    logger.handlers = [h for h in logger.handlers if h not in former]
    kept = list(logger.handlers)
    # Called with the very arguments of default_setup, which makes each only once.
    named = {} if name == "detectron2" else {"name": name}
    setup_logger(folder, distributed_rank=comm.get_rank(), **named)
    made = _handlers.setdefault((name, folder), [h for h in logger.handlers if h not in kept])
    logger.handlers = [*kept, *made]
    for handler in made:
        handler.handleError = partial(_tell_of_error, handler)
        if getattr(handler, "stream", None) is sys.stdout and not handler.filters:
            handler.addFilter(lambda r: not r.getMessage().startswith(_NOT_FOR_THE_SCREEN))


def _tell_of_error(handler: logging.Handler, record: logging.LogRecord) -> None:
    """A log that can't be written, on a disk that is full, is no reason for a traceback a line."""
    if not isinstance(sys.exc_info()[1], OSError):
        logging.Handler.handleError(handler, record)
