"""What measurements do with a batch: attack it and see which images the model gets right."""

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attacks.adaptive_union import worst_case
from ..attacks.auto_attack import AutoAttackResult, autoattack
from ..attacks.base import Attack, Classifier
from ..attacks.components import attack_experts, attack_router
from ..attacks.pgd import PGD
from ..models.outputs import logits_of
from ..models.parts import answering, has_experts
from ..models.routing_dualmoe import gate_weights
from .memory import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from .processes import Measurer

# (images (B, C, H, W) in [0, 1], labels (B,), ids (B,)) -> by name: tensors (B,), sums over the images, texts
Work = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]


def is_right(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: which images are classified rightly; ValueError where logits are NaN or infinite."""
    logits = logits_of(classifier, images)
    if not torch.isfinite(logits).all():  # argmax makes a class even of NaN, which could be the right one
        raise ValueError("model returned logits that are NaN or infinite.")
    return logits.argmax(dim=1) == labels


def classify(classifier: Classifier, attack: Attack | None = None) -> Work:
    """Work that finds which images are right (after an attack), and of a mixture the routes and loads."""

    def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Any]:
        if attack is not None:
            images = attack(classifier, images, labels, ids=ids)
        routed = routing(answering(classifier), images) if has_experts(answering(classifier)) else {}
        return {"right": is_right(classifier, images, labels), **routed}

    return work


def routing(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Of a mixture: the first choice of expert for each image, and the sums of the experts' weights in the outputs."""
    scores = model.route(images)
    loads = gate_weights(scores, model.config.router_top_k).cpu().double().sum(dim=0)  # sums over whole datasets
    return {"route": scores.argmax(dim=1), **{f"load_{i}": load for i, load in enumerate(loads.tolist())}}


def judged(model: nn.Module, strike: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    """Work that attacks with `strike` (images, labels, ids) and shows the result to the whole model."""
    return lambda images, labels, ids: {"right": is_right(model, strike(images, labels, ids), labels)}


def on_experts(model: nn.Module, attack: PGD) -> Work:
    """Work that attacks the experts alone (RA-E)."""

    def strike(images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        return attack_experts(model, images, labels, attack=attack, ids=ids)

    return judged(model, strike)


def on_router(model: nn.Module, attack: PGD) -> Work:
    """Work that attacks the router alone (RA-R), within the ball and with the steps of `attack`."""

    def strike(images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        settings = {"eps": attack.eps, "norm": attack.norm, "steps": attack.steps, "seed": attack.seed}
        return attack_router(model, images, labels, **settings, ids=ids)

    return judged(model, strike)


def union_member(model: nn.Module, attack: PGD, name: str, steps: int, restarts: int) -> Work:
    """Work that runs one member of the adaptive union, within the ball of `attack`."""

    def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Any]:
        result = worst_case(
            model,
            images,
            labels,
            eps=attack.eps,
            norm=attack.norm,
            steps=steps,
            restarts=restarts,
            seed=attack.seed,
            ids=ids,
            members=[name],
            batch_size=len(images),
        )
        # means -> sums, which add up over batches
        passes = {kind: count * len(ids) for kind, count in result.passes.items()}
        return {"right": result.robust, **passes}

    return work


def autoattack_union(
    measurer: "Measurer",
    model: nn.Module,
    attack: PGD,
    version: str,
    attack_dtype: str,
    state_file: str | os.PathLike | None,
) -> Work:
    """Work that runs AutoAttack, within the ball of `attack`, on all images of a process.

    It batches them itself, by `measurer.batch_size`; where memory runs out, in halves.
    """

    def run(images: Tensor, labels: Tensor, ids: Tensor) -> AutoAttackResult:
        return autoattack(
            model,
            images,
            labels,
            eps=attack.eps,
            norm=attack.norm,
            version=version,
            batch_size=measurer.batch_size,
            seed=attack.seed,
            ids=ids,
            attack_dtype=attack_dtype,
            state_file=state_file,
            progress=measurer.progress,
        )

    def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Any]:
        result = None
        while result is None:
            try:
                result = run(images, labels, ids)
            except RuntimeError as error:
                if measurer.batch_size == 1 or not is_out_of_memory(error):  # not even one image fits
                    raise
                measurer.use_smaller_batches(measurer.batch_size // 2)
            if result is None:  # goes on from the state file, once the failed attempt holds no memory
                free_memory()
        return summary(result)

    return work


def summary(result: AutoAttackResult) -> dict[str, Any]:
    """What a measurement keeps of AutoAttack: outcomes, passes, the sources of its successes, and "about" as JSON."""
    passes = {kind: rows * len(result.robust) for kind, rows in result.passes.items()}
    sources = {f"source {source}": count for source, count in result.sources.items()}
    flags = {flag: [found.raised, found.message] for flag, found in result.flags.items()}
    about = json.dumps({"name": result.name, "attacks": list(result.accuracy), "flags": flags})
    return {"right": result.robust, "broken_by": result.broken_by, **passes, **sources, "about": about}


__all__ = ["Work", "autoattack_union", "classify", "is_right", "on_experts", "on_router", "union_member"]
