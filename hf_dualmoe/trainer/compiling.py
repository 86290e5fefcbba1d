"""`torch_compile` for training: compile the networks inside a model one by one, not the model around them.

The same code then serves the training pass and the passes of the attack, where BatchNorm is folded, and a step graph
can record it. Routing, mixing and losses are few operations and stay as they are.
"""

from collections.abc import Callable

import torch
from torch import nn

MOST_VERSIONS = 64  # of one function: trunks and experts share it, in training, in attacks and without gradients


def networks_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a classifier that are worth compiling: trunk and experts of a mixture, all of another model."""
    if hasattr(model, "standard") and hasattr(model, "robust"):
        return networks_of(model.standard) + networks_of(model.robust)
    if not hasattr(model, "expert_logits"):
        return [model]
    return [part for part in (model.trunk, *model.experts) if any(True for _ in part.parameters())]


def compile_networks(model: nn.Module, backend: str | Callable = "inductor", mode: str | None = None) -> None:
    """Compile the networks of a model in place, without a change of names or types; their first calls take the time.

    Args:
        model: A mixture, a dual model, or any classifier.
        backend, mode: As for `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VERSIONS)
    for network in networks_of(model):
        network.compile(backend=backend, mode=mode)


__all__ = ["compile_networks", "networks_of"]
