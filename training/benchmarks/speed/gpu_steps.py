"""Training steps for gpu.py: how long they take, and whether recorded ones give the numbers of eager ones.

Every function takes `Size`, so that a rehearsal on a CPU runs the same lines on tiny networks.
"""

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_dualmoe.data import DataSplits, ImageTensorDataset
from hf_dualmoe.trainer import RobustTrainer
from hf_dualmoe.trainer.time_estimate import StepClock, synchronize, why_eager
from training.benchmarks.shared.recipes import parse_recipe
from training.benchmarks.speed.gpu_sizes import SINGLE, THIN, Case, Size
from training.run import create_model

COMPARED = 20  # steps after which weights are compared
TOLERANCE = {"loss": 0.02, "gradient": 0.05, "weights": 0.05}
NOISE = 3  # times the difference between two eager runs are allowed, too


# --- trainers on random images ---------------------------------------------------------------------------------------


@cache
def random_splits(size: Size) -> DataSplits:
    """Random images of CIFAR's shape with random labels."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> ImageTensorDataset:
        shape = (count, 3, size.image_size, size.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return ImageTensorDataset(images, torch.randint(10, (count,), generator=generator), list("0123456789"))

    return DataSplits(part(size.images), part(20), part(20), name="random")


def create_trainer(
    recipe: str, settings: dict[str, Any], size: Size, folder: str, steps: int, graph: bool
) -> RobustTrainer:
    """The trainer of training/run.py for a recipe with other settings, without logs, evaluations and checkpoints."""
    settings = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "report_to": "none",
        "warmup_steps": 0,
        "max_steps": steps,
        "output_dir": folder,
        **settings,
        **({} if size.width is None else {"width": size.width}),
    }
    settings["step_graph"] = "auto" if graph else "off"
    _, model_args, args, _ = parse_recipe(recipe, **settings)
    data = random_splits(size)
    set_seed(args.seed)
    trainer = RobustTrainer(create_model(model_args, args, data), args, train_dataset=data.train)
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_recorded(trainer: RobustTrainer, graph: bool, size: Size) -> None:
    """Refuse to take eager steps for recorded ones; a rehearsal has no others.

    Raises:
        RuntimeError: Says why the steps were not recorded.
    """
    if graph and size.device == "cuda" and (reason := why_eager(trainer)):
        raise RuntimeError(f"steps were launched one by one, since {reason}")


@contextlib.contextmanager
def cleaned(device: str) -> Iterator[str]:
    """A temporary folder for a block after which the device's memory is free again."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# --- training steps --------------------------------------------------------------------------------------------------


class Profile(TrainerCallback):
    """Profiles the last steps: share of the time in which the device works, its kernels, and waits for it."""

    def __init__(self, first: int, count: int):
        self.first, self.count, self.found = first, count, {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start before the first step to profile."""
        if state.global_step == self.first and args.device.type == "cuda":
            synchronize(args.device)
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
            self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop after the last one, and sum up."""
        if state.global_step == self.first + self.count and args.device.type == "cuda":
            synchronize(args.device)
            wall = time.perf_counter() - self.started
            self.profiler.stop()
            self.found = self.summary(self.profiler.events(), wall)

    def summary(self, events: list, wall: float) -> dict[str, float]:
        """Busy share of `wall` seconds, and kernels and waits per step."""
        work = [event for event in events if is_device_work(event)]
        waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize") for event in events)
        spans = [(event.time_range.start, event.time_range.end) for event in work]
        busy = covered(spans) / 1e6 / wall
        return {"busy": busy, "kernels": len(work) / self.count, "waits": waits / self.count}


def is_device_work(event: Any) -> bool:
    """Whether a profiler's event is something that the device did, and no range that the host marked on it."""
    return str(event.device_type).endswith("CUDA") and "#" not in event.name and "ProfilerStep" not in event.name


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def time_steps(case: Case, size: Size, graph: bool) -> dict[str, float]:
    """Milliseconds of a training step, peak memory in GiB, and what the profiler found."""
    effort = size.graph if graph else size.eager
    with cleaned(size.device) as folder:
        batch = size.batch(case.batch)
        settings = {**case.settings, "per_device_train_batch_size": batch, "attack_steps": size.steps(10)}
        steps = effort.steps + size.profiled + 1  # the last one also logs
        trainer = create_trainer(case.recipe, settings, size, folder, steps, graph)
        clock, profile = FirstSteps(effort, trainer.args.device), Profile(effort.steps, size.profiled)
        for callback in (clock, profile):
            trainer.add_callback(callback)
        if size.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        check_recorded(trainer, graph, size)
        found = {"ms": 1e3 * clock.seconds(), "batch": batch, **profile.found}
        if size.device == "cuda":
            found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return found


class FirstSteps(StepClock):
    """A clock that stops before the profiler slows the steps down."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step < self.effort.steps:
            super().on_step_end(args, state, control, **kwargs)


# --- equal numbers ---------------------------------------------------------------------------------------------------


class Record(TrainerCallback):
    """Keeps the gradients of the last step."""

    def __init__(self, last: int):
        self.last, self.gradient = last, torch.zeros(0)

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs) -> None:
        """Before the optimizer uses them."""
        if state.global_step == self.last - 1:
            self.gradient = flat(p.grad for p in model.parameters() if p.grad is not None)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All tensors as one vector of doubles on the CPU."""
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors])


def trained(method: str, attack: str, size: Size, graph: bool, steps: int) -> dict[str, Tensor]:
    """Losses, last gradient, and how far the weights moved in a short float32 training."""
    recipe = THIN if method in ("rt_er", "jtdmoe") else SINGLE
    settings = {"method": method, "training_attack": attack, "attack_steps": 2, "bf16": False, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": size.batch(64), "width": "16,32,32,64"}
    settings |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "ema_decay": 0}
    with cleaned(size.device) as folder:
        trainer = create_trainer(recipe, settings, size, folder, steps, graph)
        start, record = flat(trainer.model.parameters()), Record(steps)
        trainer.add_callback(record)
        trainer.train()
        check_recorded(trainer, graph, size)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        moved = flat(trainer.model.parameters()) - start
    return {"loss": torch.tensor(losses, dtype=torch.float64), "gradient": record.gradient, "weights": moved}


def distances(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """How far two trainings are apart, each against the length of the first: losses, last gradient, weights moved."""
    return {name: float((one[name] - other[name]).norm() / one[name].norm()) for name in TOLERANCE}


def compare_steps(method: str, attack: str, size: Size) -> dict[str, Any]:
    """Twenty graphed steps against twenty eager ones from one start; where they differ, against eager ones, too."""
    steps = COMPARED if size.device == "cuda" else 2
    with deterministic():
        eager = trained(method, attack, size, graph=False, steps=steps)
        found = distances(eager, trained(method, attack, size, graph=True, steps=steps))
        holds = all(found[name] <= limit for name, limit in TOLERANCE.items())
        if holds:
            return {**found, "steps": steps, "holds": True}
        noise = distances(eager, trained(method, attack, size, graph=False, steps=steps))
    holds = all(found[name] <= max(limit, NOISE * noise[name]) for name, limit in TOLERANCE.items())
    return {**found, "steps": steps, "noise": noise, "holds": holds}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN choose algorithms that repeat themselves: an attack's signs blow any difference up."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
