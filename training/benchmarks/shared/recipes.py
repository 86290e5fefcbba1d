"""Recipes of `training/run.py` as argument objects, and what models cost in operations."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from training.run import RECIPES, RecipeParser


def as_options(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def parse_recipe(recipe: str, **settings: Any) -> tuple:
    """The data, model, training and run arguments of a recipe, by name or file, with other settings."""
    return RecipeParser(RECIPES, description="").parse(["--recipe", recipe, *as_options(settings)])


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations as torch's own counter does, which however forbids gradients of inputs."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def forward_flops(model: nn.Module, image: torch.Tensor) -> int:
    """Floating-point operations to classify one image (1, C, H, W)."""
    with torch.no_grad(), FlopCounter() as counter:
        model.eval()(image)
    return counter.total


def count_parameters(model: nn.Module) -> int:
    """Numbers in the weights of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
