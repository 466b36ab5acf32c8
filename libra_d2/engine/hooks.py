"""What a run does between its steps, where detectron2's hooks do less."""

import logging
from collections.abc import Callable
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

__all__ = ["Checkpoints", "EpochLogger", "Writer"]


class EpochLogger(logging.LoggerAdapter):
    """Puts the epoch of a trainer before what is logged."""

    def process(self, msg: str, kwargs: dict) -> tuple[str, dict]:
        trainer = self.extra["trainer"]
        epochs = trainer.cfg.SOLVER.MAX_EPOCHS
        return (
            f" epoch: {epochs * (trainer.iter + 1) / trainer.max_iter:.2f}/{epochs:g} {msg}",
            kwargs,
        )


class Writer(hooks.PeriodicWriter):
    """Writes after each evaluation too, whose numbers the next would replace.

    What can't be written, on a disk that is full, does not end a run.
    """

    def __init__(self, writer: hooks.PeriodicWriter, eval_period: int, period: int):
        super().__init__(writer._writers, period)
        self._eval_period = eval_period

    def after_step(self) -> None:
        following = self.trainer.iter + 1
        is_evaluated = self._eval_period > 0 and following % self._eval_period == 0
        if following % self._period == 0 or is_evaluated or following == self.trainer.max_iter:
            for writer in self._writers:
                self._try(writer.write)

    def after_train(self) -> None:
        for writer in self._writers:
            self._try(writer.write)
            self._try(writer.close)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            logging.getLogger(__name__).warning("metrics cannot be written: %s", error)
        except ZeroDivisionError:
            pass  # detectron2's estimate of the time, of two lines of one iteration


class Checkpoints(HookBase):
    """Saves checkpoints as detectron2's ``PeriodicCheckpointer`` does; tries again what failed.

    Unlike there all processes take part, whose random states are saved.

    Args:
        period: iterations between two checkpoints.
        max_to_keep: how many of these stay, the last ones; 0 for all.
    """

    RETRY = 20  # iterations

    def __init__(self, period: int, max_to_keep: int = 0):
        self.period, self.max_to_keep = period, max_to_keep
        self.retry_at = -1

    def after_step(self) -> None:
        following = self.trainer.iter + 1
        if following % self.period == 0 or following == self.retry_at:
            is_saved = self.trainer.save_checkpoint()
            self.retry_at = -1 if is_saved else following + self.RETRY
            if is_saved and self.max_to_keep and comm.is_main_process():
                folder = Path(self.trainer.cfg.OUTPUT_DIR)
                for file in sorted(folder.glob("model_[0-9]*.pth"))[: -self.max_to_keep]:
                    file.unlink()
            if is_saved and self.trainer.on_periodic_checkpoint:
                self.trainer.on_periodic_checkpoint()
                self.trainer.on_periodic_checkpoint = None
        if following >= self.trainer.max_iter:
            self.trainer.save_final_checkpoint()
