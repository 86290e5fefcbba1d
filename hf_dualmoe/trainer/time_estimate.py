"""Estimate how long a training will take from a few steps and one evaluation of a copy of the model.

    print(estimate_time(trainer).text())

The trainer is left as it was, random numbers included: a training that follows takes the same steps to the bit.
"""

import copy
import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from ..evaluation.environment import describe_environment
from ..evaluation.memory import free_memory
from .arguments import RobustTrainingArguments
from .trainer import RobustTrainer

WITH, WITHOUT = "with the step graph", "without the step graph"
NEVER = 10**9  # steps between two logs: what is timed is a step without one


@dataclass(frozen=True)
class Effort:
    """Numbers of steps to take: `warmup` untimed ones, then `blocks` of `block` steps; the median block counts."""

    warmup: int
    block: int
    blocks: int

    @property
    def steps(self) -> int:
        """All of them, and one more: a trainer's last step also logs."""
        return self.warmup + self.block * self.blocks + 1


ACCELERATOR_EFFORT = Effort(warmup=10, block=5, blocks=3)  # captures and compilers have finished by then
CPU_EFFORT = Effort(warmup=1, block=1, blocks=2)


@dataclass(frozen=True)
class TimeEstimate:
    """Cost of a whole run.

    Args:
        steps: Optimizer steps of the run.
        evaluations: Evaluations during the run.
        step_seconds: Seconds per step, "with the step graph" and "without the step graph", where each was measured.
        evaluation_seconds: Seconds of one evaluation during training.
        hardware: What it was measured on.
        measured_steps: How many steps were timed, each way.
        no_graph: Why steps cannot be recorded; None = they can.
    """

    steps: int
    evaluations: int
    step_seconds: dict[str, float]
    evaluation_seconds: float
    hardware: str
    measured_steps: int
    no_graph: str | None = None

    def total_seconds(self, way: str) -> float:
        """Steps and evaluations of the whole run; `way` is a key of `step_seconds`."""
        return self.steps * self.step_seconds[way] + self.evaluations * self.evaluation_seconds

    def text(self) -> str:
        """A few lines for the terminal."""
        evaluation = f"{self.evaluations:,} evaluations of {self.evaluation_seconds:.3g} s"
        lines = [f"Time of the whole run, {self.steps:,} steps and {evaluation}, on {self.hardware}:"]
        for way, seconds in self.step_seconds.items():
            lines.append(f"  {way}: {duration(self.total_seconds(way))} ({1e3 * seconds:.4g} ms per step)")
        if self.no_graph is not None:
            lines.append(f"  {WITH}: not possible, since {self.no_graph}")
        lines.append(f"Measured on {self.measured_steps} steps; checkpoints and the closing report come on top.")
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def estimate_time(trainer: RobustTrainer) -> TimeEstimate:
    """Measure a few steps, with and without the step graph where steps can be recorded, and an evaluation.

    Args:
        trainer: A trainer that has not begun; all its processes must call this.

    Raises:
        ValueError: The trainer shards its weights (FSDP, DeepSpeed): there is no copy to measure on. Or a dataset
            that has to be counted is a stream without a length.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("estimate_time cannot copy sharded weights; measure without FSDP and DeepSpeed.")
    check_lengths(trainer)
    effort = CPU_EFFORT if trainer.args.device.type == "cpu" else ACCELERATOR_EFFORT
    with random_numbers_kept(trainer.args.device):
        first = measure(trainer, effort, "auto")
        step_seconds = {WITH if first.no_graph is None else WITHOUT: first.step}
        if first.no_graph is None:
            step_seconds[WITHOUT] = measure(trainer, effort, "off").step
    steps = count_steps(trainer)
    return TimeEstimate(
        steps=steps,
        evaluations=count_evaluations(trainer, steps) + closing_evaluations(trainer),
        step_seconds=step_seconds,
        evaluation_seconds=first.evaluation,
        hardware=describe_environment(trainer.args.device)["hardware"],
        measured_steps=effort.block * effort.blocks,
        no_graph=first.no_graph,
    )


def check_lengths(trainer: RobustTrainer) -> None:
    """Raise a ValueError where a dataset whose images are counted is a stream."""
    given = trainer.eval_dataset
    counted = {"eval_dataset": list(given.values()) if isinstance(given, dict) else [given]}
    if trainer.args.max_steps <= 0 or trainer.args.eval_strategy == IntervalStrategy.EPOCH:
        counted["train_dataset"] = [trainer.train_dataset]
    for name, datasets in counted.items():
        for dataset in datasets:
            if dataset is not None and not has_length(dataset):
                raise ValueError(
                    f"estimate_time must count the images of {name}, but {type(dataset).__name__} is a stream without "
                    "a length; pass a dataset with one."
                )


# --- measuring -------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Seconds of a step and of a whole evaluation, and why the steps were not recorded; None = they were."""

    step: float
    evaluation: float
    no_graph: str | None


def measure(trainer: RobustTrainer, effort: Effort, step_graph: str) -> Measured:
    """Steps and an evaluation by a trainer like this one on a copy of its model; random numbers move on.

    Args:
        trainer: Is left alone.
        effort: How many steps are taken.
        step_graph: The argument of that name.
    """
    clock = StepClock(effort, trainer.args.device)
    with tempfile.TemporaryDirectory() as folder:
        args = short_run(trainer.args, folder, effort.steps, step_graph)
        twin = type(trainer)(
            copy.deepcopy(trainer.model),  # its own optimizer will change it
            args,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            data_collator=trainer.data_collator.collator,  # it checks batches, as the twin's own will
            compute_metrics=trainer.compute_metrics,
            callbacks=[clock],
        )
        twin._choose_weights = lambda: None  # whole evaluations at the end of a training: they are counted, not made
        for callback in (PrinterCallback, ProgressCallback):
            twin.remove_callback(callback)
        twin.train()
        measured = Measured(clock.seconds(), time_evaluation(twin), why_eager(twin))
    del twin, clock
    free_memory()  # reference cycles hold the copy
    return measured


def why_eager(trainer: RobustTrainer) -> str | None:
    """Why a trainer's steps were launched one by one; None = they were recorded."""
    return trainer.step_graph.reason


def short_run(args: RobustTrainingArguments, folder: str, steps: int, step_graph: str) -> RobustTrainingArguments:
    """The same arguments for `steps` steps without logs, evaluations and checkpoints."""
    changes: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "logging_steps": NEVER,
        "logging_first_step": False,
        "eval_strategy": IntervalStrategy.NO,
        "eval_on_start": False,
        "save_strategy": SaveStrategy.NO,
        "load_best_model_at_end": False,
        "resume_from_checkpoint": None,
        "push_to_hub": False,
        "report_to": [],
        "disable_tqdm": True,
        "step_graph": step_graph,
    }
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


class StepClock(TrainerCallback):
    """Times blocks of steps; the device is waited for between blocks alone, since a training does not wait either."""

    def __init__(self, effort: Effort, device: torch.device):
        self.effort, self.device = effort, device
        self.marks: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the clock at the end of the warm-up and of each block."""
        done = state.global_step - self.effort.warmup
        if done >= 0 and done % self.effort.block == 0:
            synchronize(self.device)
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Seconds of a step in the median block."""
        return median((after - before) / self.effort.block for before, after in pairwise(self.marks))


def time_evaluation(trainer: RobustTrainer) -> float:
    """Seconds of an evaluation during training: one batch per process is measured, on an accelerator the second."""
    if trainer.eval_dataset is None:
        return 0.0
    given = trainer.eval_dataset
    datasets = list(given.values()) if isinstance(given, dict) else [given]
    count = min(len(datasets[0]), trainer.args.eval_batch_size * trainer.args.world_size)
    sample, seconds = Subset(datasets[0], range(count)), 0.0
    for _ in range(1 if trainer.args.device.type == "cpu" else 2):
        synchronize(trainer.args.device)
        started = time.perf_counter()
        trainer.evaluate(sample)
        synchronize(trainer.args.device)
        seconds = time.perf_counter() - started
    return seconds * sum(len(dataset) for dataset in datasets) / count


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Give all generators that a training draws from the state that they had before the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.accelerator.device_count()) if device.type != "cpu" else ()
    kind = {"device_type": device.type} if device.type != "cpu" else {}
    try:
        with torch.random.fork_rng(devices=devices, **kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# --- counting --------------------------------------------------------------------------------------------------------


def count_steps(trainer: RobustTrainer) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch(trainer))


def steps_per_epoch(trainer: RobustTrainer) -> int:
    """Optimizer steps of an epoch; at least one."""
    args = trainer.args
    batches = len(trainer.train_dataset) / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def closing_evaluations(trainer: RobustTrainer) -> int:
    """Evaluations that choose between the moving average and the trained weights at the end."""
    return 2 if trainer.ema is not None and trainer.eval_dataset is not None else 0


def count_evaluations(trainer: RobustTrainer, steps: int) -> int:
    """Evaluations during a run of `steps` steps, the one at its end included."""
    args = trainer.args
    if args.eval_strategy == IntervalStrategy.NO:
        return 0
    if args.eval_strategy == IntervalStrategy.EPOCH:  # not num_train_epochs, which max_steps overrules
        return math.ceil(steps / steps_per_epoch(trainer))
    every = args.eval_steps if args.eval_steps >= 1 else math.ceil(steps * args.eval_steps)  # below 1: a share
    return math.ceil(steps / every)


__all__ = ["TimeEstimate", "estimate_time"]
