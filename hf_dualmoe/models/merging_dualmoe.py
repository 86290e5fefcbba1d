"""The dial in the weights: one network between F_S and F_R, theta(alpha) = (1 - alpha) theta_S + alpha theta_R.

BatchNorm statistics are interpolated like the weights. An answer costs one network, and nothing is mixed that could
hide a gradient. F_S and F_R must have one shape and a common start, such as one trained network that both were
fine-tuned from: networks trained apart have a barrier of loss between them (https://arxiv.org/abs/2005.00060), those
with a common start mostly not (https://arxiv.org/abs/2109.01903; robust ones: https://arxiv.org/abs/2302.10164).

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Merged(NamedTuple):
    """A merged network, and what it was made from: alpha and the state of every tensor."""

    network: nn.Module
    alpha: float
    states: list[tuple[int, int, int]]
    sources: list[Tensor]  # kept alive, so that nothing new can have their ids


# beside the models, so that copies, files and lists of parameters of a model know nothing of it
_merged_of: "WeakKeyDictionary[nn.Module, Merged]" = WeakKeyDictionary()


def weights_obstacles(standard: nn.Module, robust: nn.Module) -> list[str]:
    """Why the weights of two networks cannot be interpolated; [] where they can."""
    own, other = robust.state_dict(), standard.state_dict()
    odd = set(own) ^ set(other) | {name for name in set(own) & set(other) if own[name].shape != other[name].shape}
    if not odd:
        return []
    return [
        f"{len(odd)} weights are missing in one of them or have another shape, such as {', '.join(sorted(odd)[:3])}"
    ]


def weights_cosine(standard: nn.Module, robust: nn.Module) -> float:
    """Cosine between the matrices and kernels of two networks of one shape, in [-1, 1].

    About 0 where they were initialised apart. Vectors are left out: the gains of all networks lie near 1.
    """
    own, other = robust.state_dict(), standard.state_dict()
    names = [name for name, tensor in own.items() if tensor.is_floating_point() and tensor.ndim > 1]
    pairs = [(other[name].flatten().double(), own[name].flatten().double()) for name in names]
    product = sum(float(start @ end) for start, end in pairs)
    lengths = [sum(float(pair[i] @ pair[i]) for pair in pairs) ** 0.5 for i in (0, 1)]
    return product / max(lengths[0] * lengths[1], 1e-30)  # all weights 0: no direction


def interpolate(standard: nn.Module, robust: nn.Module, alpha: float) -> nn.Module:
    """A new network with the weights and statistics (1 - alpha) theta_S + alpha theta_R, in eval mode.

    Computed in single precision at least and exact at both ends. What is no float, such as BatchNorm's count of
    batches, is F_R's.

    Args:
        standard, robust: F_S and F_R, without `weights_obstacles`.
        alpha: Weight of F_R in [0, 1].
    """
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be attacked later
        merged = without_watchers(copy.deepcopy(robust))
        merged.eval()
        ends = standard.state_dict(), robust.state_dict()
        for name, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                wide = torch.promote_types(tensor.dtype, torch.float32)
                start, end = (weights[name].to(tensor.device, wide) for weights in ends)
                tensor.copy_(torch.lerp(start, end, alpha))  # lerp gives both ends exactly
    return merged


def without_watchers(model: nn.Module) -> nn.Module:
    """The model, in place, without forward hooks: who counts or records passes of F_R does not mean its copy.

    Those of `torch.nn.utils` stay, such as old-style weight normalisation: without them it would be another function.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]
    return model


def tensors_of(*networks: nn.Module) -> list[Tensor]:
    """Parameters and buffers of networks, as they stand."""
    modules = [module for network in networks for module in network.modules()]
    tensors = [tensor for m in modules for tensor in (*m._parameters.values(), *m._buffers.values())]
    return [tensor for tensor in tensors if tensor is not None]


def state_of(tensor: Tensor) -> tuple[int, int, int]:
    """Changes whenever a tensor is replaced, written to or moved; blind to writes through `.data` alone."""
    version = -1 if tensor.is_inference() else tensor._version  # inference tensors count no versions
    return id(tensor), version, tensor.data_ptr()


def cached_merge(
    owner: nn.Module, parts: tuple[nn.Module, nn.Module], alpha: float, make: Callable[[], nn.Module]
) -> nn.Module:
    """The merged network of a dual model, without gradients of its weights, made anew only after a change.

    A change gives a new network: whoever holds the one before, such as an attack that folded its BatchNorm layers,
    is not disturbed.

    Args:
        owner: The dual model for which the network is kept.
        parts: F_S and F_R.
        alpha: Weight of F_R in [0, 1].
        make: Makes the network.
    """
    sources = tensors_of(*parts)
    states = [state_of(tensor) for tensor in sources]
    found = _merged_of.get(owner)
    if found is None or (found.alpha, found.states) != (alpha, states):
        found = _merged_of[owner] = Merged(make().requires_grad_(False), alpha, states, sources)
    return found.network


def forget_merge(owner: nn.Module) -> None:
    """Let the next `cached_merge` of a dual model look at its weights anew."""
    _merged_of.pop(owner, None)


__all__ = ["cached_merge", "forget_merge", "interpolate", "weights_cosine", "weights_obstacles"]
