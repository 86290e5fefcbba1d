"""What speed_gpu.py measures, one function each: bare passes, training steps, equal numbers, evaluations.

Every function takes `Size`, so that a rehearsal on a CPU runs the same lines on tiny networks.
"""

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from script_loading import load_script
from speed_gpu_sizes import SINGLE, THIN, Case, Size
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_dualmoe import MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.auto_attack import autoattack
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from hf_dualmoe.data.datasets import DataSplits, ImageTensorDataset
from hf_dualmoe.models.inputs_dualmoe import trusted_values
from hf_dualmoe.models.outputs import logits_of
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.time_estimate import StepClock, synchronize, why_eager
from hf_dualmoe.trainer.trainer import RobustTrainer

training = load_script(Path(__file__).parents[1] / "run.py")

COMPARED = 20  # steps after which weights are compared
TOLERANCE = {"loss": 0.02, "gradient": 0.05, "weights": 0.05}
NOISE = 3  # times the difference between two eager runs are allowed, too
SMALL_EPS = 0.02 / 255  # which an untrained network withstands: the attacks then do all of their work


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
    parser = training.RecipeParser(training.RECIPES, description="")
    options = chain.from_iterable((f"--{name}", str(value)) for name, value in settings.items())
    _, model_args, args, _ = parser.parse(["--recipe", recipe, *options])
    data = random_splits(size)
    set_seed(args.seed)
    trainer = RobustTrainer(training.create_model(model_args, args, data), args, train_dataset=data.train)
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
        clock, profile = StepClock(effort, trainer.args.device), Profile(effort.steps, size.profiled)
        for callback in (OnlyFirst(clock, effort.steps - 1), profile):
            trainer.add_callback(callback)
        if size.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        check_recorded(trainer, graph, size)
        found = {"ms": 1e3 * clock.seconds(), "batch": batch, **profile.found}
        if size.device == "cuda":
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            found |= dict(zip(("allocated_gib", "reserved_gib"), (peak / 2**30 for peak in peaks), strict=True))
        return found


class OnlyFirst(TrainerCallback):
    """A clock that stops before the profiler slows the steps down."""

    def __init__(self, clock: StepClock, last: int):
        self.clock, self.last = clock, last

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Pass the first steps on."""
        if state.global_step <= self.last:
            self.clock.on_step_end(args, state, control, **kwargs)


# --- bare passes -----------------------------------------------------------------------------------------------------


def graphed(work: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The work as one CUDA graph; on a CPU the work itself."""
    if device != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(work: Callable[[], Any], size: Size) -> float:
    """Median over three blocks of calls."""
    calls, times = (20, []) if size.device == "cuda" else (1, [])
    for _ in range(max(1, calls // 4)):
        work()
    for _ in range(3):
        synchronize(torch.device(size.device))
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(torch.device(size.device))
        times.append(1e3 * (time.perf_counter() - started) / calls)
    return median(times)


def autocast(device: str) -> torch.autocast:
    """What the recipes train in."""
    return torch.autocast(device, torch.bfloat16)


def input_gradient(classifier: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> Tensor:
    """One bare pass of an attack: forward, cross-entropy, gradient of the images."""
    points = images.detach().requires_grad_(True)
    with autocast(images.device.type):
        loss = F.cross_entropy(logits_of(classifier, points).float(), labels, reduction="sum")
    return torch.autograd.grad(loss, points)[0]


def random_batch(batch: int, size: Size) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1], channels last, and labels (B,)."""
    images = torch.rand(batch, 3, size.image_size, size.image_size, device=size.device)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(10, (batch,), device=size.device)


def plain_network(size: Size) -> MoEForImageClassification:
    """One untrained ResNet18 in eval mode."""
    width = None if size.width is None else [int(part) for part in size.width.split(",")]
    shape = {"stem": "cifar", "image_size": size.image_size, "width": width, "num_labels": 10, "num_experts": 1}
    model = MoEForImageClassification(MoEConfig(backbone="resnet18", **shape))
    return model.to(size.device, memory_format=torch.channels_last).eval()


def time_bare_pass(batch: int, size: Size) -> dict[str, float]:
    """A pass of the folded network: eager, as our PGD makes it, and as a CUDA graph; in ms."""
    model, (images, labels) = plain_network(size), random_batch(size.batch(batch), size)

    def bare() -> Tensor:
        return input_gradient(model.experts[0], images, labels)

    def ours() -> Any:
        with autocast(size.device):
            return value_and_gradient(model, images, labels, ce_objective)

    # under autocast, as in a training: the folded weights are cast once, not in each pass
    with cleaned(size.device), autocast(size.device), frozen(model), folded(model, images):
        found = {"eager_ms": milliseconds(bare, size), "ours_ms": milliseconds(ours, size)}
        return found | {"graph_ms": milliseconds(graphed(bare, size.device), size)}


def time_compiled_pass(batch: int, size: Size) -> dict[str, float]:
    """The same pass of the compiled network as a CUDA graph, and the seconds that compiling took."""
    model, (images, labels) = plain_network(size), random_batch(size.batch(batch), size)
    backend = "inductor" if size.device == "cuda" else "eager"  # a rehearsal needs no C++ compiler
    with cleaned(size.device), autocast(size.device), frozen(model), folded(model, images):
        network = torch.compile(model.experts[0], backend=backend)
        started = time.perf_counter()
        input_gradient(network, images, labels)
        synchronize(torch.device(size.device))
        seconds = time.perf_counter() - started
        replay = graphed(lambda: input_gradient(network, images, labels), size.device)
        return {"compile_s": seconds, "compiled_graph_ms": milliseconds(replay, size)}


def time_bare_step(case: Case, size: Size) -> dict[str, float]:
    """The floor of a training step: its own passes and nothing else, as CUDA graphs; in ms."""
    with cleaned(size.device) as folder:
        settings = {**case.settings, "attack_steps": size.steps(10)}
        trainer = create_trainer(case.recipe, settings, size, folder, 1, graph=False)
        model, passes = trainer.model, attack_passes(trainer.args)
        batch = random_batch(size.batch(case.batch), size)
        robust, found = getattr(model, "robust", model), 0.0
        with trusted_values():
            if passes:
                with autocast(size.device), frozen(model), folded(robust, batch[0]):
                    found += milliseconds(
                        graphed(lambda: attack_work(model, robust, passes, *batch), size.device), size
                    )
            model.train()
            found += milliseconds(graphed(lambda: update_work(model, robust, *batch), size.device), size)
        return {"bare_graph_ms": found}


def attack_work(model: nn.Module, robust: nn.Module, passes: int, images: Tensor, labels: Tensor) -> None:
    """The attack's passes; for a dual model also that of the mild attack on it, whose forward has F_R's own answer."""
    for _ in range(passes):
        input_gradient(robust, images, labels)
    if robust is not model:
        input_gradient(model, images, labels)


def update_work(model: nn.Module, robust: nn.Module, images: Tensor, labels: Tensor) -> None:
    """The pass with gradients of the weights."""
    with autocast(images.device.type):
        logits = [logits_of(robust, images)]
        logits += [logits_of(model.standard, images)] if robust is not model else []
        loss = sum(F.cross_entropy(part.float(), labels) for part in logits)
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def attack_passes(args: RobustTrainingArguments) -> int:
    """Gradient passes that the attack on the whole model makes."""
    return 0 if args.method == "standard" else args.attack_steps if args.training_attack == "pgd" else 1


# --- equal numbers ---------------------------------------------------------------------------------------------------


class Record(TrainerCallback):
    """Keeps the gradients of the last step."""

    def __init__(self, last: int):
        self.last, self.gradient = last, torch.zeros(0)

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs) -> None:
        """Before the optimizer uses them."""
        if state.global_step == self.last - 1:
            self.gradient = flat(p.grad for p in model.parameters() if p.grad is not None)


def flat(tensors: Iterator[Tensor]) -> Tensor:
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


# --- evaluation ------------------------------------------------------------------------------------------------------


def time_autoattack(images: int, size: Size) -> dict[str, float]:
    """Images per second of AutoAttack with the "fast" budgets on one network that withstands it."""
    return attack_rate(
        plain_network(size), images, size, lambda *batch, **run: autoattack(*batch, version="fast", **run)
    )


def time_worst_case(images: int, size: Size) -> dict[str, float]:
    """Images per second of the adaptive union, 10 steps, on the dual model of cifar10_resnet18."""
    with cleaned(size.device) as folder:
        model = create_trainer(THIN, {}, size, folder, 1, graph=False).model.eval()
        steps = size.steps(10)
        return attack_rate(model, images, size, lambda *batch, **run: worst_case(*batch, steps=steps, **run))


def attack_rate(model: nn.Module, images: int, size: Size, attack: Callable) -> dict[str, float]:
    """Images per second, passes per image, and the share of images that stand: those do all of the work."""
    count = size.batch(images)
    pixels, _ = random_batch(count, size)
    with torch.no_grad():
        labels = logits_of(model, pixels).argmax(dim=1)
    synchronize(torch.device(size.device))
    started = time.perf_counter()
    result = attack(model, pixels, labels, eps=SMALL_EPS, batch_size=count)
    synchronize(torch.device(size.device))
    seconds = time.perf_counter() - started
    stand = 100 * float(result.robust.double().mean())
    return {"images_per_s": count / seconds, "images": count, "stand": stand, **result.passes}
