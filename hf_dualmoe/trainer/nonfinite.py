"""NaN and infinite numbers in training: stop and name them, or skip that update.

The first step at which each loss term was not finite is kept in a tensor on the device. `stop` reads it where the
trainer waits for the device anyway (a log, an evaluation, a checkpoint), so no step waits for it. `skip` has to know
before the update: one wait per step, and a copy of the buffers (BatchNorm statistics), which the forward pass moved.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .checkpoints import list_checkpoints
from .step_parts import several_processes

POLICIES = ("stop", "skip")
NEVER = 2**62  # later than any step
SHOWN = 4  # names in a message

logger = logging.get_logger(__name__)


class NonFiniteWatch(TrainerCallback):
    """Notes what is not finite, and stops or skips.

    Args:
        policy: stop or skip.
        max_skipped_steps: Updates in a row that may be skipped.
        output_dir: Where the checkpoints are; for the message.
        gradients: Whether to look at gradients, too. Float16 training scales them and skips infinite ones itself.
    """

    def __init__(self, policy: str, max_skipped_steps: int, output_dir: str, gradients: bool = True):
        self.policy, self.max_skipped_steps, self.output_dir = policy, max_skipped_steps, output_dir
        self.looks_at_gradients = gradients
        self.skipped = 0  # in the whole run
        self.in_a_row = 0
        self._first: dict[tuple[str, ...], Tensor] = {}  # first step at which each was not finite
        self._buffers: list[Tensor] = []

    def note(self, step: int, values: dict[str, Tensor]) -> None:
        """Remember which of these scalars are not finite at this step; waits for nothing."""
        self.note_all(step, tuple(values), torch.stack([value.detach().float() for value in values.values()]))

    def note_all(self, step: int, names: tuple[str, ...], values: Tensor) -> None:
        """`note` of values (N,) that are together already."""
        finite = values.isfinite()
        steps = torch.where(finite, NEVER, step)
        # the earliest
        self._first[names] = torch.minimum(self._first[names], steps) if names in self._first else steps

    def found(self) -> dict[str, int]:
        """First step at which each name was not finite on any process, for those that ever were; waits."""
        if not self._first:
            return {}
        first = torch.cat(list(self._first.values()))
        if several_processes():
            dist.all_reduce(first, op=dist.ReduceOp.MIN)  # all processes must stop or skip together
        names = [name for group in self._first for name in group]
        return {name: step for name, step in zip(names, first.tolist(), strict=True) if step < NEVER}

    def check(self, model: nn.Module | None = None) -> None:
        """Stop if anything noted, or a weight of `model`, is not finite.

        Raises:
            FloatingPointError: Says the step, the terms and where the last checkpoint is.
        """
        if found := self.found():
            self._first.clear()
            step = min(found.values())
            self._stop(step, [name for name, first in found.items() if first == step])
        if model is not None and (names := non_finite_tensors(model)):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise FloatingPointError(
                f"The weights are not finite (NaN or infinite): {', '.join(names[:SHOWN])}{more}. {self._advice()}"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Keep what the forward passes of this step will move."""
        if self.policy == "skip":
            self._buffers = copy_buffers(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the gradients, and take them away where the update is to be skipped: optimizers leave them alone."""
        gradients = [_own_part(p.grad) for p in model.parameters() if p.grad is not None]
        if self.looks_at_gradients and gradients:  # DeepSpeed keeps them to itself
            self.note(state.global_step + 1, {"grad_norm": get_total_norm(gradients)})
        if self.policy != "skip":
            return
        found = self.found()
        if not found:
            self.in_a_row = 0
            return
        self._first.clear()
        for parameter in model.parameters():
            parameter.grad = None
        restore_buffers(model, self._buffers)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        step = state.global_step + 1
        if self.in_a_row > self.max_skipped_steps:
            self._stop(step, list(found), f" {self.max_skipped_steps} updates in a row were skipped before it.")
        if args.process_index == 0:
            logger.warning(
                f"Step {step}: not finite: {', '.join(found)}; its update was skipped ({self.skipped} so far)."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Stop where the norm of finite gradients overflows: clipping makes them zero, and nothing is learned."""
        if self.policy == "stop" and self.looks_at_gradients and not math.isfinite(logs.get("grad_norm", 0.0)):
            self._stop(state.global_step, ["grad_norm"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training."""
        self._first.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Do not hand over a model that is not finite."""
        self.check(model)

    def _stop(self, step: int, names: list[str], more: str = "") -> None:
        raise FloatingPointError(
            f"Step {step}: not finite (NaN or infinite): {', '.join(names)}.{more} {self._advice()}"
        )

    def _advice(self) -> str:
        last = list(list_checkpoints(self.output_dir).values())[-1:]
        where = f"The last checkpoint, {last[0]}, was written before." if last else "There is no checkpoint yet."
        skip = "" if self.policy == "skip" else ", or leave such updates out with on_nan_loss='skip'"
        return f"{where} The same run would end the same way: lower learning_rate, look at the images{skip}."

    # --- what a checkpoint keeps -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _own_part(gradient: Tensor) -> Tensor:
    """The part of an FSDP gradient that this process holds."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


@torch.no_grad()
def non_finite_tensors(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold NaN or infinity; waits for the device once."""
    named = [(n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()]
    if not named:
        return []
    finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()
    return [name for (name, _), ok in zip(named, finite, strict=True) if not ok]


@torch.no_grad()
def copy_buffers(model: nn.Module) -> list[Tensor]:
    """Copies of all buffers, in order."""
    return [buffer.clone() for buffer in model.buffers()]


@torch.no_grad()
def restore_buffers(model: nn.Module, copies: list[Tensor]) -> None:
    """Put back what `copy_buffers` kept."""
    for buffer, copy in zip(model.buffers(), copies, strict=True):
        buffer.copy_(copy)


__all__ = ["NonFiniteWatch", "non_finite_tensors"]
