"""Adversarial weight perturbation: take the gradient of a step where the weights are worst for its images.

Attacking the weights as well as the images keeps the loss flat around the weights, which narrows the gap between
training and test under attack (Wu et al. 2020, https://arxiv.org/abs/2004.05884).
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from ..losses.adversarial import Attack, LossOutput
from .nonfinite import copy_buffers, restore_buffers
from .step_parts import several_processes

Objective = Callable[..., LossOutput]


def perturbed_loss(
    objective: Objective,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Attack],
    *,
    gamma: float,
    forward: nn.Module | None = None,
) -> LossOutput:
    """`objective` at w + v, with v = gamma * ||w|| * g / ||g|| and g the gradient of the same loss at w.

    v is made for each weight on its own; biases and normalisation layers keep theirs. The images are attacked once, at
    w. No weight ever moves: the second forward pass is called with others in their place, through which its gradient
    reaches them unchanged. BatchNorm's statistics are those of the second pass. Costs a forward and a backward pass.

    Args:
        objective: One of `hf_dualmoe.losses`, called as `objective(model, images, labels, forward=..., **attacks)`.
        model: What is attacked, not wrapped.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        attacks: The attacks of the objective by argument; empty where it needs none.
        gamma: Length of v in units of the norm of the weight (paper: 0.005).
        forward: What the loss is computed with: `model` or its distributed wrapper; None = `model`.

    Returns:
        What the objective says at w + v.
    """
    network = model if forward is None else forward
    recorded = {name: RecordedAttack(attack) for name, attack in attacks.items()}
    ascent = ascent_direction(objective, model, images, labels, recorded)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    perturbed = {
        names[id(weight)]: weight + ascent_step(weight.detach(), gradient, gamma) for weight, gradient in ascent
    }

    def at_perturbed_weights(*args: Any, **kwargs: Any) -> object:
        return functional_call(network, perturbed, args, kwargs)

    again = {name: attack.again for name, attack in recorded.items()}  # attacked once, at w: half the cost
    return objective(model, images, labels, forward=at_perturbed_weights, **again)


class RecordedAttack:
    """An attack whose images can be had `again`, call by call, in the same order."""

    def __init__(self, attack: Attack):
        self.attack = attack
        self.images: deque[Tensor] = deque()

    def __call__(self, model: Callable, images: Tensor, labels: Tensor) -> Tensor:
        """Attack, and keep the result."""
        self.images.append(self.attack(model, images, labels))
        return self.images[-1]

    def again(self, model: Callable, images: Tensor, labels: Tensor) -> Tensor:
        """The result of the next call, without an attack."""
        return self.images.popleft()


def ascent_direction(
    objective: Objective, model: nn.Module, images: Tensor, labels: Tensor, attacks: Mapping[str, Attack]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each weight with the gradient of the objective, the mean over all processes; the model stays as it is."""
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    buffers = copy_buffers(model)
    try:
        loss = objective(model, images, labels, **attacks).loss
        # The sum over images: in float16 the gradient of their mean would vanish. Only the direction matters.
        found = torch.autograd.grad(loss * len(labels), weights, allow_unused=True)
    finally:
        restore_buffers(model, buffers)  # BatchNorm counts each batch once: in the pass at w + v
    # an expert without images has none here, but may have one in another process
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    return list(zip(weights, averaged(gradients), strict=True))


def ascent_step(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """A step up the gradient, `gamma` times as long as the weight; 0 where the gradient is 0."""
    return gamma * weight.norm() / gradient.norm().clamp_min(1e-12) * gradient


def averaged(gradients: list[Tensor]) -> list[Tensor]:
    """Means over all processes, in one exchange: processes that perturb alike train like one."""
    if not several_processes() or not gradients:
        return gradients
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


__all__ = ["perturbed_loss"]
