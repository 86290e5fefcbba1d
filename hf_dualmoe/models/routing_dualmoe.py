"""Which experts see an image: the router, the weights of its choice, and the loss that keeps experts in balance.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .configuration_dualmoe import MoEConfig

_load_average: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("load_average", default=None)


def create_router(config: MoEConfig, num_features: int | None) -> nn.Sequential:
    """Build the router: normalised images (B, C, H, W), or features of the trunk, -> logits (B, E).

    Args:
        config: Configuration of the mixture.
        num_features: Channels of the trunk's output; needed for router="features".
    """
    num_experts, channels = config.num_experts, config.num_channels
    if config.router == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * config.image_size**2, num_experts))
    if config.router == "pooled":
        grid = config.router_pool_size
        return nn.Sequential(nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(channels * grid**2, num_experts))
    if config.router == "conv":
        return nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            FeaturePool(),
            nn.Linear(32, num_experts),
        )
    return nn.Sequential(FeaturePool(), nn.Linear(num_features, num_experts))


class FeaturePool(nn.Module):
    """Mean over positions: maps (B, D, H, W) or tokens (B, N, D) -> (B, D)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=1) if features.ndim == 3 else features.mean(dim=(2, 3))


def gate_weights(router_logits: Tensor, top_k: int) -> Tensor:
    """Weight (B, E) of each expert in the output: softmax of the top-k of the router logits (B, E), 0 elsewhere."""
    values, index = router_logits.float().topk(top_k, dim=1)
    return torch.zeros_like(router_logits, dtype=values.dtype).scatter(1, index, values.softmax(dim=1))


@contextmanager
def averaged_loads(average: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let balance losses take the load of each expert over all processes, as one with the whole batch would.

    Args:
        average: From the loads (E,) in this process to their mean over all, each of which calls it as often.
    """
    token = _load_average.set(average)
    try:
        yield
    finally:
        _load_average.reset(token)


def load_balancing_loss(router_logits: Tensor, top_k: int = 1, rows: Tensor | None = None) -> Tensor:
    """Balance loss of the Switch Transformer (https://arxiv.org/abs/2101.03961, Eq. 4-6): E * sum_i f_i * P_i.

    P_i is the mean router probability of expert i. f_i is its load, the mean weight that it has in the output: for
    top-1 the share of images sent to it, as in the paper; with all experts in use P_i itself. 1 when balanced.

    Args:
        router_logits: (B, E) before softmax.
        top_k: Experts used per image.
        rows: (B,) bool: the images that count; None = all. Not picked by indexing, which would wait for the device.

    Returns:
        Scalar in [0, E]; 0 for an empty batch. Only P carries gradient.
    """
    if router_logits.shape[0] == 0:  # 0, still part of the graph
        return router_logits.sum()
    # f_i counts images: as in the Switch Transformer, only P_i has a gradient
    gates, probs = gate_weights(router_logits.detach(), top_k), router_logits.float().softmax(dim=1)
    if rows is None:
        load, mean_probs = gates.mean(dim=0), probs.mean(dim=0)  # (E,) each
    else:
        share = (rows / rows.sum().clamp_min(1))[:, None]
        load, mean_probs = (share * gates).sum(dim=0), (share * probs).sum(dim=0)
    average = None if torch.compiler.is_compiling() else _load_average.get()
    if average is not None:
        load = average(load)
    return router_logits.shape[1] * (load * mean_probs).sum()  # times E: 1 when balanced, whatever E


__all__ = ["averaged_loads", "gate_weights", "load_balancing_loss"]
