"""Estimate what an evaluation or smoothing will cost before it starts: passes per image, and time from one batch."""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..attacks.auto_attack import VERSIONS
from ..attacks.base import frozen
from ..attacks.members import member_names
from ..attacks.precision import full_precision
from ..data.datasets import DataSplits, ImageTensorDataset, to_unit_range
from ..evaluation.environment import describe_environment
from ..evaluation.evaluation import sanity_effort
from ..evaluation.measurements import EPS_FACTORS
from ..evaluation.memory import free_memory
from ..models.outputs import logits_of
from ..models.parts import answering, has_dial, has_experts, is_dual
from ..trainer.time_estimate import duration
from .evaluating import level_of

FEW = 8  # images of a first try, which also warms the device up
MOST_SECONDS = 20.0  # that the measured batch may take, by the first try
DIAL_MEMBERS = 4  # of the attack that chooses the dial
SANITY_STEPS = 7  # times the steps: radii, a large one, two stronger attacks
SQUARE_QUERIES = 200
SANITY_OTHER = 30  # gradient passes with few steps, and clean passes one by one


@dataclass(frozen=True)
class Work:
    """Passes of the whole model.

    Args:
        images: How many images.
        gradient: Passes forward and back per image.
        forward: Further passes forward per image.
    """

    images: int
    gradient: float
    forward: float


@dataclass(frozen=True)
class PassTime:
    """Seconds per image of a pass forward, and of one forward and back to the image, on `batch` images at once."""

    forward: float
    gradient: float
    batch: int
    hardware: str


@dataclass(frozen=True)
class Cost:
    """Work by part, and the time of a pass.

    Args:
        parts: Name -> work.
        pass_time: Time of a pass.
        processes: How many share the images.
    """

    parts: dict[str, Work]
    pass_time: PassTime
    processes: int = 1

    def seconds(self, work: Work) -> float:
        """Time that a part takes."""
        per_image = work.gradient * self.pass_time.gradient + work.forward * self.pass_time.forward
        return work.images * per_image / self.processes

    def text(self) -> str:
        """Two lines for the terminal."""
        works = self.parts.values()
        seconds = {name: self.seconds(work) for name, work in self.parts.items()}
        images = max(work.images for work in works)
        gradient, forward = (sum(w.gradient * w.images for w in works), sum(w.forward * w.images for w in works))
        shown = ", ".join(f"{name} {duration(time)}" for name, time in seconds.items())
        return (
            f"Cost: at most {gradient / images:,.0f} gradient and {forward / images:,.0f} forward passes per image on "
            f"{images:,} images, about {duration(sum(seconds.values()))} on {self.pass_time.hardware}: {shown}.\n"
            f"Measured on one batch of {self.pass_time.batch} images; what is finished already is not repeated."
        )


# --- measuring -------------------------------------------------------------------------------------------------------


def time_passes(model: nn.Module, images: ImageTensorDataset, batch_size: int) -> PassTime:
    """Time a pass of each kind on one batch.

    Args:
        model: Classifier of [0, 1] images, on its device.
        images: Its first images are used, as many as take no more than some seconds.
        batch_size: Most images at once.
    """
    device = next(model.parameters()).device
    few = min(FEW, batch_size, len(images))
    with full_precision(), frozen(model):
        _, first = time_both(model, first_images(images, few, device))
        # the first try also warmed up, so it was slow: too few images rather than too many
        affordable = int(few * MOST_SECONDS / max(first, 1e-9))
        batch = max(few, min(batch_size, len(images), affordable))
        try:
            forward, gradient = time_both(model, first_images(images, batch, device))
        except torch.OutOfMemoryError:  # the evaluation will take smaller batches then, too
            free_memory()
            batch = few
            forward, gradient = time_both(model, first_images(images, batch, device))
    return PassTime(forward / batch, gradient / batch, batch, describe_environment(device)["hardware"])


def cost_text(
    accelerator: Accelerator, model: nn.Module, images: ImageTensorDataset, parts: dict[str, Work], batch_size: int
) -> str:
    """`Cost.text` of this work, timed on the main process; "" on the others, which need not wait."""
    if not accelerator.is_main_process:
        return ""
    return Cost(parts, time_passes(model, images, batch_size), accelerator.num_processes).text()


def first_images(images: ImageTensorDataset, count: int, device: torch.device) -> Tensor:
    """(count, C, H, W) in [0, 1]."""
    return to_unit_range(images.images[:count].to(device))


def time_both(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Seconds of a pass forward, and of one forward and back to the images, as far as a gradient gets."""
    clock = [now(images.device)]
    with torch.no_grad():
        logits_of(model, images)
    clock.append(now(images.device))
    with torch.enable_grad():
        point = images.clone().requires_grad_(True)
        value = logits_of(model, point).logsumexp(dim=1).sum()  # any value whose gradient needs all logits
        if value.requires_grad:
            torch.autograd.grad(value, point, allow_unused=True)
    clock.append(now(images.device))
    return clock[1] - clock[0], clock[2] - clock[1]


def now(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


# --- counting --------------------------------------------------------------------------------------------------------


def evaluation_work(args: Namespace, model: nn.Module, data: DataSplits, parts: Sequence[str]) -> dict[str, Work]:
    """The most that each part of an evaluation does.

    Args:
        args: What a parser with `add_evaluation_arguments` read.
        model: What is evaluated.
        data: Test images and, where the dial is chosen on others, held-out ones.
        parts: Parts that will be measured.
    """
    images, num_classes, steps = args.max_test_samples or len(data.test), data.num_labels, args.steps
    attack = Work(images, steps, 3)
    works = {"clean and PGD": attack}
    if "components" in parts and has_dial(model):
        # a dual model's pass is one of F_S and one of F_R
        works["components"] = times(attack, 1 if is_dual(model) else 2)
    if "dial" in parts and has_dial(model):
        positions = len(args.alphas)
        # those are measured above
        known = {model.config.alpha, *((0.0, 1.0) if "components" in parts else ())}
        works["dial"] = times(attack, len(set(args.alphas) - known))
        if data.validation is not None:
            held_out = Work(len(data.validation), positions * DIAL_MEMBERS * steps, positions * (DIAL_MEMBERS + 2))
            works["dial on held-out images"] = held_out
    if "component_attacks" in parts and has_experts(answering(model.robust if is_dual(model) else model)):
        works["component attacks"] = times(attack, 2)
    if "eps_curve" in parts:
        works["accuracy against eps"] = times(attack, len(EPS_FACTORS) - 1)  # factor 1 is PGD itself
    if "worst_case" in parts:
        rounds = len(member_names(model, num_classes)) * args.union_restarts * (args.worst_case_steps or steps)
        works["adaptive union"] = Work(images, rounds, rounds)
    if "autoattack" in parts:
        works["AutoAttack"] = autoattack_work(images, num_classes, args.autoattack_version)
    if "sanity" in parts:
        effort = sanity_effort(level_of(args), args.sanity_images)
        forward = effort.get("square_queries", SQUARE_QUERIES) + SANITY_OTHER
        count = min(effort["num_images"], images)
        works["sanity checks"] = Work(count, SANITY_STEPS * steps + SANITY_OTHER, forward)
    return works


def times(work: Work, factor: float) -> Work:
    """The same work so many times."""
    return Work(work.images, factor * work.gradient, factor * work.forward)


def autoattack_work(images: int, num_classes: int, version: str | None) -> Work:
    """The union of a version where no image falls before the last attack."""
    budgets = VERSIONS[version or ("standard" if num_classes >= 4 else "few_classes")]
    gradient = sum(
        budget.get("steps", 0) * min(budget.get("target_classes", 1), max(1, num_classes - 1))
        for budget in budgets.values()
    )
    return Work(images, gradient, gradient + sum(budget.get("queries", 0) for budget in budgets.values()))


def smoothing_work(images: int, sigmas: Sequence[float], n0: int, n: int) -> dict[str, Work]:
    """Noisy copies of each image, for each level of noise."""
    return {f"sigma = {sigma:g}": Work(images, 0, n0 + n) for sigma in sigmas}


__all__ = ["Cost", "PassTime", "Work", "cost_text", "evaluation_work", "smoothing_work", "time_passes"]
