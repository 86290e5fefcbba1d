"""Bare passes for gpu.py, which training steps are measured against, and the rates of the attacks.

Every function takes `Size`, so that a rehearsal on a CPU runs the same lines on tiny networks.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dualmoe import MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks import autoattack, frozen, worst_case
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from hf_dualmoe.models import logits_of
from hf_dualmoe.models.inputs_dualmoe import trusted_values
from hf_dualmoe.trainer.time_estimate import synchronize
from training.benchmarks.speed.gpu_sizes import THIN, Case, Size
from training.benchmarks.speed.gpu_steps import cleaned, create_trainer

SMALL_EPS = 0.02 / 255  # which an untrained network withstands: the attacks then do all of their work


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


autocast = partial(torch.autocast, dtype=torch.bfloat16)  # what the recipes train in


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
        model, args = trainer.model, trainer.args
        passes = 0 if args.method == "standard" else args.attack_steps if args.training_attack == "pgd" else 1
        batch = random_batch(size.batch(case.batch), size)
        robust, found = getattr(model, "robust", model), 0.0
        with trusted_values():
            if passes:
                with autocast(size.device), frozen(model), folded(robust, batch[0]):
                    attack = graphed(partial(attack_work, model, robust, passes, *batch), size.device)
                    found += milliseconds(attack, size)
            model.train()
            found += milliseconds(graphed(partial(update_work, model, robust, *batch), size.device), size)
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


# --- evaluation ------------------------------------------------------------------------------------------------------


def time_autoattack(images: int, size: Size) -> dict[str, float]:
    """Images per second of AutoAttack with the "fast" budgets on one network that withstands it."""
    return attack_rate(plain_network(size), images, size, partial(autoattack, version="fast"))


def time_worst_case(images: int, size: Size) -> dict[str, float]:
    """Images per second of the adaptive union, 10 steps, on the dual model of cifar10_resnet18."""
    with cleaned(size.device) as folder:
        model = create_trainer(THIN, {}, size, folder, 1, graph=False).model.eval()
        return attack_rate(model, images, size, partial(worst_case, steps=size.steps(10)))


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
