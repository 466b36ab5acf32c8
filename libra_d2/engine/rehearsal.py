"""The rehearsal of a run: all that it uses is built and used once, before anything is written."""

import contextlib
import gc
import logging
import tempfile
from collections.abc import Iterator
from itertools import islice

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from .checks import check_weights_of_run
from .plain_errors import plain_errors
from .stopping import NonFiniteError
from .trainer import LibraTrainer
from .validation import mean_losses

__all__ = ["rehearse"]


def rehearse(
    cfg: CfgNode, resume: bool = False, trainer_class: type[LibraTrainer] = LibraTrainer
) -> int:
    """Builds a run's model, optimizer, schedule, loaders and evaluators; trains and tests one step.

    In each process of the run, on its device, at its size. Nothing stays of it but images that
    ``DATALOADER.CACHE`` keeps.

    Args:
        cfg: the run's config.
        resume: whether to start from the last checkpoint.
        trainer_class: what trains it.

    Returns:
        The iteration that the run will start with.

    Raises:
        ValueError: a sentence that says what would fail, and where to look.
    """
    with tempfile.TemporaryDirectory() as folder, _quietly(), plain_errors(cfg):
        trial = cfg.clone()
        trial.defrost()
        trial.OUTPUT_DIR = folder
        seed_all_rng(cfg.SEED)
        trainer = trainer_class(trial)
        trainer.checkpointer.save_dir = cfg.OUTPUT_DIR  # to read from
        check_weights_of_run(cfg, trainer.checkpointer.model, resume=resume)
        trainer.resume_or_load(resume)
        trainer.restore_numbers()
        start = trainer.start_iter
        if start < trainer.max_iter:
            _step(trainer, cfg)
            # Its processes end now. Those that the garbage collector finds are not told to, as
            # their queues are garbage too, and are waited for for five seconds.
            trainer._trainer.reset_data_loader(lambda: None)
        trainer.model.eval()
        for name in cfg.DATASETS.TEST:
            evaluator = trainer.build_evaluator(trial, name)
            evaluator.reset()
            for batch in trainer.build_test_loader(trial, name):
                with torch.no_grad():
                    evaluator.process(batch, trainer.checkpointer.model(batch))
                break
            if cfg.TEST.LOSSES:
                first = islice(trainer.build_loss_loader(trial, name), 1)
                mean_losses(trainer.checkpointer.model, first)
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return start


def _step(trainer: LibraTrainer, cfg: CfgNode) -> None:
    trainer.iter = trainer.start_iter
    with EventStorage(trainer.start_iter):
        trainer._trainer.iter = trainer.iter
        scaler = trainer._trainer.grad_scaler
        while True:  # a scale that is too small is refused
            scale = scaler.get_scale()
            trainer._trainer.run_step()
            if scaler.get_scale() == scale:
                break  # else float16's scale was too large, and no step was taken
    broken = [n for n, p in trainer.model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise NonFiniteError(
            f"after one step {len(broken)} weights are not finite, among them {broken[0]}; "
            f"SOLVER.BASE_LR {cfg.SOLVER.BASE_LR} may be too high"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps what is built for trial out of the log."""
    logger = logging.getLogger("detectron2")
    before = logging.root.manager.disable, logger.level
    logger.setLevel(logging.INFO)  # or the trainer would set the log up, for good
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before[0])
        logger.setLevel(before[1])
