"""One step of training, whose numbers are looked at before the weights change."""

import logging
import math
import time
from collections.abc import Iterable
from itertools import chain

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from libra_d2.data.workers import LoadingError

from .stopping import NonFiniteError

__all__ = ["CheckedTrainer"]

# What SGD and AdamW do not share.
_OF_ONE_KIND = ("momentum", "betas")
# How an optimizer computes a step, which a checkpoint's state of it would settle too.
_WAYS = ("fused", "foreach")
# Of float16's gradients; it begins at 65536 and halves at each step whose gradients are infinite.
_SMALLEST_SCALE = 2.0**-10


class CheckedTrainer(SimpleTrainer):
    """detectron2's step, which changes nothing where losses or gradients are not finite.

    The numbers of a step come from the device together, in one transfer.

    Args:
        model: what is trained, wrapped for several processes if there are several.
        data_loader: of batches.
        optimizer: of the model's parameters.
        dtype: what to compute in where torch deems it safe. Gradients of float16 are scaled; of
            these, infinite ones are a matter of the scale.
        max_skipped: how many steps that are not finite may be left out.
        logs_grad_norm: whether to log the gradients' norm, before they are clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        max_skipped: int = 0,
        logs_grad_norm: bool = False,
    ):
        super().__init__(model, data_loader, optimizer)
        self.dtype = dtype
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        self.max_skipped, self.logs_grad_norm = max_skipped, logs_grad_norm
        self.num_skipped = 0

    def run_step(self) -> None:
        """Trains on one batch.

        Raises:
            LoadingError: if there is no batch.
            NonFiniteError: if it is not finite and ``max_skipped`` others were not, or if in
                float16 no gradients have been for long; no weight has changed.
        """
        start = time.perf_counter()
        batch = self._load()
        data_time = time.perf_counter() - start
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device_type, self.dtype if is_mixed else None, enabled=is_mixed):
            try:
                losses = self.model(batch)
            except FloatingPointError as error:  # an RPN's, of boxes
                what = f"{error} In iteration {self.iter}, on the images {_names(batch)}"
                raise NonFiniteError(what) from error
        if torch.is_tensor(losses):
            losses = {"total_loss": losses}
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        numbers, is_finite = self._read(losses)
        if not is_finite:
            self._leave_out(batch, numbers)
            return
        self._write_metrics({k: torch.tensor(v) for k, v in numbers.items()}, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _load(self) -> list[dict]:
        """The next batch; raises ``LoadingError`` in all processes if one has none."""
        problem = ""
        try:
            batch = next(self._data_loader_iter)
        except LoadingError as error:
            problem = str(error)
        problems = comm.all_gather(problem)
        if any(problems):
            if not problem and hasattr(self.data_loader, "take_back"):
                self.data_loader.take_back()
            raise LoadingError(next(filter(None, problems)))
        return batch

    def _read(self, losses: dict[str, torch.Tensor]) -> tuple[dict[str, float], bool]:
        """The losses, and whether those and the gradients of all processes are finite."""
        values = [loss.detach().float() for loss in losses.values()]
        is_scaled = self.grad_scaler.is_enabled()
        if self.logs_grad_norm or not is_scaled:
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            gradients = [p.grad for p in parameters if p.grad is not None]
            values.append(nn.utils.get_total_norm(gradients).float())
        scale = self.grad_scaler.scale(torch.ones_like(values[0]))  # 1 if nothing is scaled
        *numbers, scale = torch.stack([*values, scale]).tolist()
        is_finite = all(map(math.isfinite, numbers[: len(losses)] if is_scaled else numbers))
        if scale < _SMALLEST_SCALE:
            raise NonFiniteError(
                f"in iteration {self.iter} and many before it gradients were not finite in "
                f"float16, at scales down to {scale:.1g}; SOLVER.AMP.DTYPE bfloat16 reaches further"
            )
        if self.logs_grad_norm:
            get_event_storage().put_scalar("grad_norm", numbers[-1] / scale)
        if comm.get_world_size() > 1:
            is_finite = all(comm.all_gather(is_finite))
        return dict(zip(losses, numbers, strict=False)), is_finite

    def _leave_out(self, batch: list[dict], numbers: dict[str, float]) -> None:
        """Drops a step that is not finite in some process; or raises ``NonFiniteError``."""
        self.optimizer.zero_grad()
        self.num_skipped += 1
        shown = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        buffers = self.model.named_buffers()
        broken = next((n for n, b in buffers if not bool(torch.isfinite(b).all())), "")
        is_bad = not all(map(math.isfinite, numbers.values()))
        told = comm.all_gather((is_bad, f"({shown}), on the images {_names(batch)}", broken))
        # Where only gradients are not finite, they are so in all processes.
        bad = [text for is_bad, text, _ in told if is_bad] or [text for _, text, _ in told]
        broken = next(filter(None, (name for *_, name in told)), "")
        what = f"losses or gradients are not finite in iteration {self.iter} {'; '.join(bad)}"
        if self.num_skipped > self.max_skipped or broken:
            why = f", which also broke {broken}" if broken and self.max_skipped else ""
            raise NonFiniteError(
                f"{what}{why}; no weight was changed by it. A lower SOLVER.BASE_LR, a longer "
                "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help; SOLVER.MAX_SKIPPED "
                f"{self.max_skipped} such steps may be left out"
            )
        logging.getLogger(__name__).warning(
            "%s; the step is left out (%d of %d)", what, self.num_skipped, self.max_skipped
        )

    def state_dict(self) -> dict:
        """The parent's, with that of the gradients' scale."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return {**state, "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes a state of the parent's too; how steps are computed stays as it is here.

        Raises:
            ValueError: if it is of another optimizer.
        """
        optimizer = state_dict["optimizer"]
        own, saved = self.optimizer.param_groups, optimizer["param_groups"]
        if any((name in own[0]) != (name in saved[0]) for name in _OF_ONE_KIND):
            raise ValueError(
                "the checkpoint is of another optimizer; go on with the SOLVER.OPTIMIZER of the "
                "run, or start another from its weights (MODEL.WEIGHTS)"
            )
        if len(own) == len(saved):  # of others the parent says so
            # By these torch also decides where the number of steps lies.
            ways = [{name: group[name] for name in _WAYS if name in group} for group in own]
            saved = [{**group, **way} for group, way in zip(saved, ways, strict=True)]
        super().load_state_dict({**state_dict, "optimizer": {**optimizer, "param_groups": saved}})
        self._lay_out_state()
        self.num_skipped = state_dict.get("num_skipped", 0)
        if "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _lay_out_state(self) -> None:
        """Gives the optimizer's state the strides of its parameters, which a fused step relies on.

        torch leaves them as they were saved, maybe with ``MODEL.CHANNELS_LAST`` otherwise.
        """
        for parameter in chain(*(group["params"] for group in self.optimizer.param_groups)):
            state = self.optimizer.state.get(parameter, {})
            for name, value in state.items():
                is_like = torch.is_tensor(value) and value.shape == parameter.shape
                if is_like and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _names(batch: list[dict]) -> str:
    return ", ".join(str(image.get("file_name", "?")) for image in batch)
