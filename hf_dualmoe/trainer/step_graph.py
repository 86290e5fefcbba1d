"""A whole training step as one CUDA graph: augmentation, attack, forward, loss, backward and what the log sums up.

Launched one by one, the thousands of small kernels of an adversarial step keep a fast GPU idle most of the time. Here
they are recorded once and replayed: a batch is copied into static tensors, one launch does the step, and its gradients
are handed to the optimizer. What keeps that the same training:

- The first `WARMUP_STEPS` steps are ordinary ones, made by the function that is recorded later (`StaticStep.run`).
- Random numbers: a replay draws what an eager step would have drawn, and moves the generator as far. So a checkpoint
  keeps their state as ever, and a run that is resumed draws as one that was not.
- Radii that change (`eps_warmup_ratio`), the batch and the number of accumulated steps are tensors that are filled.
- Weights and BatchNorm's statistics are changed in place, by the optimizer and by replays: evaluations, checkpoints
  and moving averages in between see them, and the graph sees what those leave behind.
- Where shapes would depend on values (hard routing), all experts run on all images (`static_shapes`). An expert that
  no image of a batch went to has zero gradients then, not none: weight decay and momentum go on.
- The first replays are compared with an eager step on the same batch. A graph is never used on trust.

What cannot be recorded trains as before, and one line of the log says why.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import logging

from ..attacks.folding import flow_key
from .nonfinite import copy_buffers, restore_buffers
from .static_step import StaticStep, StepResult, WaitWatch
from .step_parts import recomputes_activations

if TYPE_CHECKING:
    from .trainer import RobustTrainer

WARMUP_STEPS = 3  # libraries set themselves up lazily, which cannot be recorded
CHECKED_REPLAYS = 2  # the second has another batch: an input that was recorded as a constant shows
LARGEST_DIFFERENCE = 0.25  # of the norm of the gradient; a graph that reads stale numbers is off by about 1
MOST_CHANGES = 10  # of a model: layers that begin to learn, switches; each takes a few eager steps
OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile

logger = logging.get_logger(__name__)


def why_eager(trainer: "RobustTrainer") -> str | None:
    """Why this trainer's steps cannot be recorded; None = they can, as far as its settings tell."""
    args = trainer.args
    optimizer = str(args.optim)
    overridden = _overridden(trainer)
    reasons = {
        "it needs a CUDA GPU": args.device.type != "cuda",
        "DeepSpeed has steps of its own": trainer.is_deepspeed_enabled,
        "FSDP gathers weights within the step": trainer.is_fsdp_enabled,
        "on_nan_loss='skip' looks at each loss": args.on_nan_loss == "skip",
        "float16 looks at each gradient for its loss scale (bf16 does not)": args.fp16
        or trainer.accelerator.mixed_precision == "fp16",
        f"torch_compile_mode={args.torch_compile_mode!r} has CUDA graphs of its own": args.torch_compile
        and args.torch_compile_mode in OWN_GRAPHS,
        "gradient checkpointing runs parts of the step again": recomputes_activations(args, trainer.model),
        f"optim={optimizer!r} works within the backward pass": "lomo" in optimizer or "layerwise" in optimizer,
        f"{' and '.join(overridden)} of the trainer is overridden": bool(overridden),
        "several processes or GPUs exchange gradients within the step": args.parallel_mode
        != ParallelMode.NOT_PARALLEL,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _overridden(trainer: "RobustTrainer") -> list[str]:
    """Methods that an ordinary step calls and a recorded one does not, where a subclass has its own."""
    homes = {"compute_loss": f"{__package__}.trainer", "_prepare_inputs": Trainer.__module__}
    return [name for name, home in homes.items() if getattr(type(trainer), name).__module__ != home]


# --- recording -------------------------------------------------------------------------------------------------------


class CudaRecorder:
    """Records a function on a side stream as a CUDA graph.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graph_bytes = 0

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run on the side stream, as recording will."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, function: Callable[[], StepResult]) -> tuple[StepResult, Callable[[], None]]:
        """Record a function: return its result, still without values, and the call that computes it."""
        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        pool = torch.cuda.graph_pool_handle()  # named: a graph whose recording failed does not tell its own
        torch.cuda.empty_cache()  # so that what is reserved from here on is the graph's
        reserved = torch.cuda.memory_reserved(self.device)
        try:
            # thread_local: threads that load data may allocate pinned memory meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function()
        except BaseException:
            torch.cuda.set_stream(outer)  # torch leaves its own where it cannot end the recording
            self._recover(pool)
            raise
        self.graph_bytes = torch.cuda.memory_reserved(self.device) - reserved
        return result, graph.replay

    def _recover(self, pool: tuple[int, int]) -> None:
        """Undo what torch leaves behind where it cannot end a recording: memory that nobody else may take, and a
        generator that believes to be recorded and refuses to draw."""
        torch.cuda.synchronize(self.device)
        for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):  # where the recording was ended
                undo(self.device.index or 0, pool)
        generator = torch.cuda.default_generators[self.device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())

    def has_room(self) -> bool:
        """Whether an eager step fits beside the graph."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused > 2.5 * self.graph_bytes  # the graph's own included


# --- the steps of a training -----------------------------------------------------------------------------------------


class StepGraphCallback(TrainerCallback):
    """A graph is of one training: another one has other batches, and its memory is free for evaluations after it."""

    def __init__(self, graph: "Callable[[], StepGraph]"):
        self.graph = graph

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See whether steps can be recorded."""
        self.graph().begin()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the graph."""
        self.graph().end()


class StepGraph:
    """Makes the steps of a `RobustTrainer`, from a graph where that works.

    Args:
        trainer: Whose steps these are.
        recorder: What records; None = CUDA graphs. A test on a CPU has its own.
    """

    def __init__(self, trainer: "RobustTrainer", recorder: Any = None):
        self.trainer = trainer
        self.recorder = recorder
        self.reason: str | None = None  # why steps are eager from now on
        self.captures = self._changes = 0
        self._is_given = recorder is not None
        self._has_begun = False
        self._forget()

    def _forget(self) -> None:
        self.step: StaticStep | None = None
        self._key: tuple | None = None
        self._result: StepResult | None = None
        self._replay: Callable[[], None] | None = None
        self._steps = self._replays = 0

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed by now."""
        return self._replay is not None

    def begin(self) -> None:
        """Before the first step of a training: see whether its steps can be recorded, and say so if not."""
        self._forget()
        self._has_begun, self.captures, self._changes, self._other_shapes = True, 0, 0, set()
        self.reason = None if self._is_given else why_eager(self.trainer)
        if self.trainer.args.step_graph == "off":
            self.reason = "step_graph='off'"
        elif self.reason is not None:
            self._say(f"step_graph: steps are launched one by one, since {self.reason}.")
        elif not self._is_given:
            self.recorder = CudaRecorder(self.trainer.args.device)

    def end(self) -> None:
        """After the last step: what comes then may need the memory."""
        self.flush()
        self._forget()
        self._has_begun = False

    def takes(self, batch: dict[str, Any]) -> bool:
        """Whether `training_step` makes the step on this batch; else the trainer does, as ever."""
        if not self._has_begun:
            self.begin()
        if self.reason is None and set(batch) != {"pixel_values", "labels"}:
            self._give_up(f"batches hold {', '.join(sorted(batch))}, not pixel_values and labels alone")
        if self.reason is not None:
            return False
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        key = (shape, self._state_of_model())
        if self.step is None:
            self._begin_step(batch, key)
        if self._key == key:
            return True
        if self._key[0] != shape:
            if shape not in self._other_shapes:
                self._other_shapes.add(shape)
                self._say(
                    f"step_graph: batches of {len(batch['labels'])} images are launched one by one; the graph is of "
                    f"{len(self.step.batch['labels'])}."
                )
            return False
        return self._begin_again(batch, key)

    def _state_of_model(self) -> tuple:
        """All that a graph takes for granted: how data flows, where the weights are, and which of them learn."""
        model = self.trainer.model
        weights = tuple((p.data_ptr(), p.requires_grad) for p in model.parameters())  # a graph writes to addresses
        return flow_key(model), weights, tuple(b.data_ptr() for b in model.buffers())

    def _begin_step(self, batch: dict[str, Tensor], key: tuple) -> None:
        self.step, self._key = StaticStep(self.trainer, batch), key

    def _begin_again(self, batch: dict[str, Tensor], key: tuple) -> bool:
        """The model is another: record it anew."""
        self.flush()
        self._forget()
        self._changes += 1
        if self._changes > MOST_CHANGES:
            self._give_up(f"the model was changed {self._changes} times, as its modules' attributes and weights tell")
            return False
        self._begin_step(batch, key)
        return True

    def training_step(self, batch: dict[str, Tensor]) -> StepResult:
        """One step on this batch: gradients go to `.grad`, the rest is returned."""
        self.step.fill(batch)
        self._steps += 1
        if self._steps > WARMUP_STEPS and not self.is_recorded and self.reason is None:
            result = self._record()
        elif self.is_recorded:
            result = self._replayed()
        else:
            # the last one: by then nothing is set up any more
            result = self._eager(watched=self._steps == WARMUP_STEPS)
        self._hand_over(result.gradients)
        return result

    # --- eager steps, recording, replays -----------------------------------------------------------------------------

    def _eager(self, watched: bool = False) -> StepResult:
        watch = WaitWatch()
        with self.recorder.warming_up(), watch if watched else nullcontext():
            result = self.step.run()
        if watch.names:
            self._give_up(f"a step waits for the device in {', '.join(sorted(set(watch.names)))}")
        return result

    def _record(self) -> StepResult:
        """Record the step, after an eager one on the same batch that the first replay is compared with."""
        expected, undo = self._compared()
        try:
            self._result, self._replay = self.recorder.record(self.step.run)
        except Exception as error:  # whatever it is, training can go on without a graph
            undo(True)
            self._give_up(f"recording failed ({_first_cause(error)})")
            return expected
        self.captures += 1
        return self._checked_replay(expected, undo)

    def _replayed(self) -> StepResult:
        if self._replays < CHECKED_REPLAYS and self.recorder.has_room():
            return self._checked_replay(*self._compared())
        self._replays += 1
        self._replay()
        return self._result

    def _compared(self) -> tuple[StepResult, Callable[[bool], None]]:
        """An eager step, and what puts random numbers, BatchNorm and sums back: to before, or (True) to after it."""
        before = self._moving_state()
        expected = self._eager()
        after = self._moving_state()
        self._restore(before)  # the replay has to start where the eager step did
        return expected, lambda done: self._restore(after if done else before)

    def _checked_replay(self, expected: StepResult, undo: Callable[[bool], None]) -> StepResult:
        self._replays += 1
        self._replay()
        difference = relative_difference(self._result.gradients, expected.gradients)
        if difference <= LARGEST_DIFFERENCE:  # also false for NaN
            return self._result
        if any(not g.isfinite().all() for g in expected.gradients if g is not None):
            return self._result  # nothing to compare with: the watch over numbers that are not finite has the word
        undo(True)
        self._give_up(
            f"a replay differed from the step that it recorded (gradients by {difference:.2g} of their norm)"
        )
        return expected

    def _moving_state(self) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
        sums = {name: total.clone() for name, total in self.step.sums.items()}
        return copy_buffers(self.trainer.model), sums, _random_state(self.trainer.args.device)

    def _restore(self, state: tuple[list[Tensor], dict[str, Tensor], Tensor]) -> None:
        buffers, sums, random_state = state
        restore_buffers(self.trainer.model, buffers)
        for name, total in self.step.sums.items():
            total.copy_(sums[name]) if name in sums else total.zero_()
        _set_random_state(self.trainer.args.device, random_state)

    # --- gradients, sums, words --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _hand_over(self, gradients: list[Tensor | None]) -> None:
        """Add to `.grad`. The graph writes into the same tensors each time: only one that is alone may be lent."""
        found = [(p, g) for p, g in zip(self.step.parameters, gradients, strict=True) if g is not None]
        if self.trainer.args.gradient_accumulation_steps == 1 and all(p.grad is None for p, _ in found):
            for parameter, gradient in found:
                parameter.grad = gradient
            return
        self._add([(p, g) for p, g in found if p.grad is not None])
        fresh = [(p, g) for p, g in found if p.grad is None]
        for parameter, gradient in fresh:
            parameter.grad = torch.empty_like(gradient)
        if fresh:
            torch._foreach_copy_([p.grad for p, _ in fresh], [g for _, g in fresh])  # one launch for all

    def _add(self, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
        if pairs:
            torch._foreach_add_([p.grad for p, _ in pairs], [g for _, g in pairs])

    def flush(self) -> None:
        """Give the trainer the sums of its log."""
        if self.step is not None:
            self.trainer.add_sums(self.step.take_sums())

    def release(self, reason: str) -> bool:
        """Give the memory of a graph back, and make steps without one from now on; False if there is none."""
        if not self.is_recorded:
            return False
        self.flush()
        self._give_up(reason)
        return True

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._replay = self._result = None
        self._say(f"step_graph: steps are launched one by one from now on, since {reason}.")

    def _say(self, words: str) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(words)


@torch.no_grad()
def relative_difference(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Norm of the difference of two lists of gradients over the norm of the second; waits for the device."""
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None and e is not None]
    if len(pairs) != sum(g is not None for g in (*actual, *expected)) / 2:
        return float("inf")
    difference = torch.stack([(a - e).float().norm() for a, e in pairs]).norm()
    size = torch.stack([e.float().norm() for _, e in pairs]).norm()
    return float(difference / size.clamp_min(torch.finfo(torch.float32).tiny))


def _first_cause(error: BaseException) -> str:
    """The error that the others followed from, in one line: a recording that cannot be ended hides it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


__all__ = ["StepGraph", "StepGraphCallback", "why_eager"]
