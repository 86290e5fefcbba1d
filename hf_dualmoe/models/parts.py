"""The parts of a model: which networks answer, which is F_R, which has experts.

By attributes, not by class: models that were loaded with remote code have classes of their own.
"""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from .moe_dualmoe import has_experts
from .outputs import find_logits


def has_dial(model: Callable) -> bool:
    """Whether `model` joins F_S and F_R; by attributes, since remote code has a class of its own."""
    return hasattr(model, "standard") and hasattr(model, "robust")


def mixes_weights(model: Callable) -> bool:
    """Whether `model` has a dial in its weights, so that it answers as one network."""
    return has_dial(model) and getattr(getattr(model, "config", None), "mixing", None) == "weights"


def is_dual(model: Callable) -> bool:
    """Whether `model` mixes the outputs of F_S and F_R."""
    return has_dial(model) and not mixes_weights(model)


def answering(model: Callable) -> Callable:
    """The network that answers: with a dial in the weights the merged one, else `model` itself."""
    return model.merged_network() if mixes_weights(model) else model


def at_alpha(model: nn.Module, alpha: float) -> nn.Module:
    """The same dual model, weights shared, with its dial at `alpha`."""
    twin = copy.copy(model)  # shallow: modules and weights are those of the model
    twin.config = copy.copy(model.config)
    twin.set_alpha(alpha)
    return twin


def mixture_of(model: Callable) -> nn.Module:
    """The mixture whose routes are attacked: `model`, or F_R of a dual model; ValueError where that has no experts."""
    moe = model.robust if is_dual(model) else answering(model)
    if not has_experts(moe):
        part = "robust component is" if is_dual(model) else "model is"
        raise ValueError(f"model={type(model).__name__} has no experts to attack: its {part} no mixture of experts.")
    return moe


class NormalizedPart(nn.Module):
    """A component of a dual model behind the normalisation that it gets there: images -> logits (B, C)."""

    def __init__(self, network: nn.Module, normalize: nn.Module):
        super().__init__()
        self.network, self.normalize = network, normalize

    def forward(self, images: Tensor) -> Tensor:
        return find_logits(self.network(self.normalize(images).to(self.network.dtype)))


def part_of(dual: nn.Module, name: str) -> nn.Module:
    """F_S ("standard") or F_R ("robust") as the dual model sees it: a classifier of images in [0, 1], without its map.

    A mixture of ours, which normalises inside, is returned itself.
    """
    network = getattr(dual, name)
    return network if has_experts(network) else NormalizedPart(network, getattr(dual, f"normalize_{name}"))


__all__ = ["answering", "at_alpha", "has_dial", "has_experts", "is_dual", "mixes_weights", "mixture_of", "part_of"]
