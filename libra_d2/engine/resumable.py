"""detectron2's default trainer, which can be stopped and goes on as if it had not been."""

import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator, inference_context
from detectron2.utils import comm
from torch import nn

from libra_d2.checkpoint import is_disk_full
from libra_d2.data.workers import LoadingError, death_of_worker

from .average import WeightAverage
from .following import show_predictions
from .hooks import Checkpoints, Writer
from .random_state import (
    get_random_state,
    get_running_numbers,
    kept_random_state,
    set_random_state,
    set_running_numbers,
)
from .stopping import (
    STATUSES,
    FinishedEarly,
    NonFiniteError,
    Signals,
    StoppedError,
    how_to_resume,
)
from .validation import mean_losses
from .weights import find_checkpoint, has_final_checkpoint

__all__ = ["ResumableTrainer"]


class ResumableTrainer(DefaultTrainer):
    """Saves all that decides how training goes on, and ends a run with a sentence, not a traceback.

    A subclass's constructor makes the parts of detectron2's, ``signals`` and ``average``.
    """

    signals: Signals
    average: WeightAverage | None

    # What is called once, when the first checkpoint that was due is saved.
    on_periodic_checkpoint: Callable[[], None] | None = None
    _resumed: dict | None = None

    def build_hooks(self) -> list[HookBase]:
        """The parent's, with checkpoints, an evaluation and writers that end no run by failing."""
        period = self.cfg.TEST.EVAL_PERIOD
        ret = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.EvalHook):
                # Checkpoints before the evaluation, which may fail.
                solver = self.cfg.SOLVER
                ret.append(Checkpoints(solver.CHECKPOINT_PERIOD, solver.MAX_TO_KEEP))
                hook = hooks.EvalHook(period, self._evaluate)
            if isinstance(hook, hooks.PeriodicWriter):
                hook = Writer(hook, period, self.cfg.SOLVER.LOG_PERIOD)
            if not isinstance(hook, hooks.PeriodicCheckpointer):
                ret.append(hook)
        return ret

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict:
        """The parent's; training draws the same random numbers whether or not it was called."""
        with kept_random_state():
            results = super().test(cfg, model, evaluators)
        return results if cfg.TEST.AP_PER_CLASS else _without_classes(results)

    @property
    def tested_model(self) -> nn.Module:
        """What is evaluated: the average of the weights where there is one."""
        return self.average.module if self.average else self.model

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last whole checkpoint, if it is to be resumed from; or ``MODEL.WEIGHTS``.

        A run resumed with as many processes goes on exactly as it would have.
        """
        # That which the first process sees: file systems may show others another.
        last = comm.all_gather(self.checkpointer.get_checkpoint_file() if resume else "")[0]
        if not last:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            if self.average:
                self.average.reset()
            return
        rest = self.checkpointer.load(last)
        if self.average and not self.average.is_loaded:  # it was not kept then
            self.average.reset()
        if "average" in rest:  # it is no longer kept: goes on with what was trained
            self.checkpointer.model.load_state_dict(rest["average"]["trained"])
        self.start_iter = self.iter + 1
        states = rest.get("processes", [])
        loader = self._trainer.data_loader
        if len(states) == comm.get_world_size():
            self._resumed = states[comm.get_rank()]
            loader_state = self._resumed["loader"]
        else:
            logging.getLogger(__name__).warning(
                "'%s' was not saved by as many processes: what is random is drawn anew", last
            )
            loader_state = {"position": self.start_iter, "bad_images": {}}
        if loader_state and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(loader_state)

    def before_train(self) -> None:
        """The parent's; last, a resumed run's random numbers are set."""
        super().before_train()
        self.restore_numbers()

    def restore_numbers(self) -> None:
        """Lets a resumed run draw the random numbers that it would have drawn."""
        if self._resumed:
            set_running_numbers(self.checkpointer.model, self._resumed["running"])
            set_random_state(self._resumed["random"])

    def save_checkpoint(self, name: str = "") -> bool:
        """Saves all that a run needs to go on; called in all processes at once.

        Args:
            name: of the file; ``model_`` and the iteration's number unless it is given.

        Returns:
            Whether it could be written; if not, a warning says why.

        Raises:
            StoppedError: if the weights are not finite.
        """
        loader = self._trainer.data_loader
        states = comm.gather(
            {
                "random": get_random_state(),
                "running": get_running_numbers(self.checkpointer.model),
                "loader": loader.state_dict() if hasattr(loader, "state_dict") else None,
            }
        )
        problem, is_final = "", False
        if comm.is_main_process():
            try:
                name = name or f"model_{self.iter:07d}"
                extra = {"iteration": self.iter, "seed": self.cfg.SEED, "processes": states}
                self.checkpointer.save(name, **extra)
            except NonFiniteError as error:
                problem, is_final = f"after iteration {self.iter} {error}; they are not saved", True
            except ValueError as error:
                problem = str(error)
        problem, is_final = comm.all_gather((problem, is_final))[0]
        if is_final:
            raise StoppedError(f"{problem}. {self._last()}")
        if problem:
            logging.getLogger(__name__).warning("%s; it will be tried again", problem)
            return False
        return True

    def save_final_checkpoint(self, waits: Sequence[float] = (0, 5, 15)) -> None:
        """Saves ``model_final.pth``, with an attempt after each of the waits, seconds.

        Raises:
            StoppedError: if none succeeds.
        """
        for wait in waits:
            time.sleep(wait)
            if self.save_checkpoint("model_final"):
                return
        raise StoppedError(f"the trained model could not be saved. {self._last()}")

    def train(self) -> dict | None:
        """Trains; SIGINT, SIGTERM and SIGUSR1 end it after a step, with a checkpoint.

        Raises:
            StoppedError: if it ended before its time.
        """
        with self.signals:
            self.signals.at_once = False
            is_trained, output = 0 < self.start_iter >= self.max_iter, Path(self.cfg.OUTPUT_DIR)
            is_saved = is_trained and has_final_checkpoint(output, self.start_iter - 1)
            if is_trained and not comm.all_gather(is_saved)[0]:
                self.iter = self.start_iter - 1
                self.save_final_checkpoint()
            try:
                return super().train()
            except FinishedEarly as finished:
                self._finish_early(finished.reason)
                return getattr(self, "_last_eval_results", None)

    def _finish_early(self, reason: str) -> None:
        logging.getLogger(__name__).info("finished early: %s", reason)
        if self.iter < self.start_iter:  # found out before the first step
            is_saved = has_final_checkpoint(Path(self.cfg.OUTPUT_DIR), self.iter)
            if comm.all_gather(is_saved)[0]:
                return
        self.save_final_checkpoint()

    def run_step(self) -> None:
        """A step; what makes it fail is told with how to go on."""
        try:
            super().run_step()
        except NonFiniteError as error:
            raise StoppedError(f"{error}. {self._last()}") from error
        except LoadingError as error:
            self.iter -= 1  # the last one that was finished
            self._stop(str(error), 2)
        except RuntimeError as error:
            self._stop_if_loader_died(error)  # of half a step nothing is saved
            raise

    def after_step(self) -> None:
        """The parent's; then ends the run if a signal has come to any process."""
        try:
            super().after_step()
        except LoadingError as error:  # of the loader that precise batch norm has
            self._stop_loading(error)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        received = max(comm.all_gather(self.signals.received))
        if received and self.iter + 1 < self.max_iter:
            self._stop_by_signal(received)

    def _stop_by_signal(self, number: int) -> None:
        self._stop(f"stopped by {signal.Signals(number).name}", STATUSES[number])

    def _stop(self, why: str, status: int) -> None:
        """Saves what is trained and ends the run."""
        if self.start_iter <= self.iter < self.max_iter:
            self.save_checkpoint()
        raise StoppedError(f"{why}. {self._last()}", status)

    def _stop_loading(self, error: LoadingError) -> None:
        """Ends the run, after a step, if one process can't load images."""
        if comm.get_world_size() > 1:  # the others don't know, and would not save with this one
            raise StoppedError(f"{error}. {self._last()}") from error
        self._stop(str(error), 2)

    def _stop_if_loader_died(self, error: RuntimeError) -> None:
        """Ends the run without saving, if this is how torch tells that a loading process died."""
        if death := death_of_worker(error):
            raise StoppedError(f"{death}. {self._last()}") from error

    def _last(self) -> str:
        """Where the last checkpoint is, and how to go on from it."""
        last = find_checkpoint(Path(self.cfg.OUTPUT_DIR))
        if not last:
            return "There is no checkpoint yet."
        return f"The last checkpoint is '{last}'; go on with:\n  {how_to_resume()}"

    def _evaluate(self) -> dict:
        self._last_eval_results = {}
        self._last_eval_results = self.or_stop(self._measure)
        return self._last_eval_results

    def or_stop(self, measure: Callable[[], dict]) -> dict:
        """What an evaluation after a step gives; a signal and what fails end it, and the run.

        Returns:
            Its results; none if they can't be written.

        Raises:
            StoppedError: if it ended before its time.
        """
        self._stop_if_asked()
        # Nothing is lost where a single process leaves an evaluation: its step is finished.
        self.signals.at_once = comm.get_world_size() == 1
        try:
            return measure()
        except StoppedError:
            self._stop_by_signal(self.signals.received)
        except LoadingError as error:
            self._stop_loading(error)
        except RuntimeError as error:
            self._stop_if_loader_died(error)
            raise
        except OSError as error:
            if not is_disk_full(error):
                raise
            logging.getLogger(__name__).warning("this evaluation cannot be written: %s", error)
            return {}
        finally:
            self.signals.at_once = False

    def _measure(self) -> dict:
        """Scores, and what else the keys of ``TEST`` ask for."""
        cfg, model = self.cfg, self.tested_model
        results = self.test(cfg, model)
        with kept_random_state():  # a loader draws
            # An average has no running numbers of its own.
            set_running_numbers(model, get_running_numbers(self.checkpointer.model))
            for name in cfg.DATASETS.TEST if cfg.TEST.LOSSES else ():
                losses = mean_losses(model, self.build_loss_loader(cfg, name))
                told = ", ".join(f"{k} {v:.4g}" for k, v in losses.items())
                logging.getLogger(__name__).info("losses on %s: %s", name, told)
                of_set = results if len(cfg.DATASETS.TEST) == 1 else results.setdefault(name, {})
                of_set["validation"] = losses
            if cfg.TEST.NUM_SHOWN and cfg.DATASETS.TEST and comm.is_main_process():
                loader = self.build_test_loader(cfg, cfg.DATASETS.TEST[0])
                with inference_context(model):
                    show_predictions(cfg, model, loader, self.storage.put_image)
        return results


def _without_classes(results: dict) -> dict:
    """Results without the AP of single classes, at whatever depth."""
    return type(results)(
        (name, _without_classes(value) if isinstance(value, dict) else value)
        for name, value in results.items()
        if not name.startswith("AP-")
    )
