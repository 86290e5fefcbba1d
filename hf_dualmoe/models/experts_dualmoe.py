"""Hard and soft routing: run each expert once on its images, then put the answers back in order.

B images, N units of work (an image may be one for several experts), E experts, C labels, k experts per image.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batchnorm_dualmoe import single_row_mode, weighted_batchnorm

_keeps_shapes: ContextVar[bool] = ContextVar("keeps_shapes", default=False)


@contextmanager
def static_shapes() -> Iterator[None]:
    """Let no shape depend on values, as a CUDA graph needs: every expert runs on all images, the answers are picked.

    The function is the same: BatchNorm layers in training mode take their statistics over the images that the expert
    would have seen.
    """
    token = _keeps_shapes.set(True)
    try:
        yield
    finally:
        _keeps_shapes.reset(token)


def shapes_are_static() -> bool:
    """Whether we are within `static_shapes`."""
    return not torch.compiler.is_compiling() and _keeps_shapes.get()


# --- routing ---------------------------------------------------------------------------------------------------------


def hard_route(
    experts: nn.ModuleList,
    hidden: Tensor,
    router_logits: Tensor,
    expert_index: Tensor | None,
    extra: Tensor | None,
    router_learns: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k = 1: the answer of one expert per image.

    Args:
        experts: E networks.
        hidden: (B, ...) output of the trunk.
        router_logits: (B, E) before softmax.
        expert_index: (B,) the expert of each image, -1 where the router decides; None: it decides all.
        extra: (B,) an expert whose own answer is wanted as well, -1 = none; None: none at all.
        router_learns: Whether gradients go to the router, through the weight a_i / stopgrad(a_i).

    Returns:
        Logits (B, C), the experts used (B,), and the logits (B, C) of the extra ones, None where none are wanted.
    """
    index = router_logits.argmax(dim=1)
    forced = None if expert_index is None else expert_index >= 0
    if forced is not None:
        index = torch.where(forced, expert_index, index)
    logits, extra_logits = run_experts(experts, hidden, index, None, extra)
    if router_learns:
        # exp(log a - stopgrad(log a)) = a / stopgrad(a): exactly 1, with the gradient of log a
        log_gate = router_logits.log_softmax(dim=1).gather(1, index[:, None])
        weight = torch.exp(log_gate - log_gate.detach())
        if forced is not None:
            # nothing to learn from a given route
            weight = torch.where(forced[:, None], torch.ones_like(weight), weight)
        logits = logits * weight.to(logits.dtype)
    return logits, index, extra_logits


def soft_route(
    experts: nn.ModuleList,
    hidden: Tensor,
    router_logits: Tensor,
    top_k: int,
    expert_index: Tensor | None,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k > 1: the mixture of the probabilities of the k experts with the highest scores.

    Args:
        top_k: k.
        experts, hidden, router_logits, expert_index, extra: As in `hard_route`.

    Returns:
        Log-probabilities (B, C), the experts (B, k), highest score first, and the logits (B, C) of the extra ones.
    """
    if top_k == len(experts) and expert_index is None:  # all experts see all images: nothing to sort
        by_expert = run_all(experts, hidden)
        log_probs = mixture(router_logits.log_softmax(dim=1), by_expert)
        index = router_logits.topk(top_k, dim=1).indices
        return log_probs, index, None if extra is None else pick_expert(by_expert, extra)
    slots = choose_slots(router_logits, top_k, expert_index)
    mix = mix_all if shapes_are_static() else mix_used
    log_probs, extra_logits = mix(experts, hidden, slots, extra)
    return log_probs, slots.index, extra_logits


class Slots(NamedTuple):
    """The k experts that an image has a place for.

    Args:
        index: (B, k) which they are, highest score first.
        used: (B, k) bool: an image whose expert is given uses its first slot only.
        log_weights: (B, k) log of the weight in the mixture, -inf for a slot that is not used.
    """

    index: Tensor
    used: Tensor
    log_weights: Tensor


def choose_slots(router_logits: Tensor, top_k: int, expert_index: Tensor | None) -> Slots:
    """The slots of each image, from the router logits (B, E) and the experts that are given, as in `hard_route`."""
    values, index = router_logits.topk(top_k, dim=1)  # (B, k) each
    log_weights = values.log_softmax(dim=1)  # over the k chosen: their weights add up to 1
    used = torch.ones_like(index, dtype=torch.bool)
    if expert_index is not None:
        forced = expert_index[:, None] >= 0
        index = torch.where(forced, expert_index[:, None], index)
        used[:, 1:] = ~forced
        only_first = torch.zeros_like(log_weights).masked_fill(~used, -torch.inf)
        log_weights = torch.where(forced, only_first, log_weights)
    return Slots(index, used, log_weights)


def mix_used(
    experts: nn.ModuleList, hidden: Tensor, slots: Slots, extra: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, C) of the mixture, and those extra logits; each expert sees the images that use it."""
    batch_size, top_k = slots.index.shape
    used = slots.used.flatten().nonzero().squeeze(1)
    rows = torch.arange(batch_size, device=hidden.device).repeat_interleave(top_k)  # (B * k,) the image of each slot
    logits, extra_logits = run_experts(experts, hidden, slots.index.flatten()[used], rows[used], extra)
    log_probs = logits.float().log_softmax(dim=1)
    # slots without a run stay 0: their log weight is -inf
    by_slot = log_probs.new_zeros(batch_size * top_k, log_probs.shape[1]).index_copy(0, used, log_probs)
    by_slot = by_slot.view(batch_size, top_k, -1)
    return (slots.log_weights[:, :, None] + by_slot).logsumexp(dim=1), extra_logits


def mix_all(
    experts: nn.ModuleList, hidden: Tensor, slots: Slots, extra: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`mix_used` in static shapes: each expert sees all images."""
    by_expert = run_all(experts, hidden, count_uses(len(experts), slots.index, slots.used, extra))
    nowhere = slots.log_weights.new_full((len(hidden), len(experts)), -torch.inf)
    # a slot that is not used may name an expert twice: the larger weight, that of the used slot, counts
    log_weights = nowhere.scatter_reduce(
        1, slots.index, slots.log_weights.masked_fill(~slots.used, -torch.inf), "amax"
    )
    return mixture(log_weights, by_expert), None if extra is None else pick_expert(by_expert, extra)


def mixture(log_weights: Tensor, by_expert: Tensor) -> Tensor:
    """Log-probabilities (B, C) of a mixture, from the log weights (B, E) and the logits (B, E, C) of its experts."""
    return (log_weights[:, :, None] + by_expert.float().log_softmax(dim=2)).logsumexp(dim=1)


# --- running ---------------------------------------------------------------------------------------------------------


def run_experts(
    experts: nn.ModuleList, hidden: Tensor, expert_of: Tensor, rows: Tensor | None, extra: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`dispatch`, and with it one more expert `extra` (B,) for each image, -1 = none: (N, C) and (B, C) logits."""
    if shapes_are_static() and not (extra is None and len(experts) == 1):  # one expert sees all images anyway
        uses = count_uses(len(experts), expert_of[:, None], None, extra)
        by_expert = run_all(experts, hidden, uses)
        return pick_expert(by_expert, expert_of), None if extra is None else pick_expert(by_expert, extra)
    if extra is None:
        return dispatch(experts, hidden, expert_of, rows), None
    wanted = (extra >= 0).nonzero().squeeze(1)
    rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
    outputs = dispatch(experts, hidden, torch.cat([expert_of, extra[wanted]]), torch.cat([rows, wanted]))
    logits, found = outputs.split([len(expert_of), len(wanted)])
    return logits, found.new_zeros(len(hidden), found.shape[1]).index_copy(0, wanted, found)


def dispatch(experts: nn.ModuleList, hidden: Tensor, expert_of: Tensor, rows: Tensor | None = None) -> Tensor:
    """Run each expert once on its group of images.

    Args:
        experts: E networks.
        hidden: (B, ...) output of the trunk.
        expert_of: (N,) the expert of each unit of work.
        rows: (N,) the row of `hidden` of each unit of work; None = row n for unit n.

    Returns:
        (N, C) logits in the order of `expert_of`.
    """
    if rows is None and len(experts) == 1:
        return run_expert(experts[0], hidden)
    sizes = torch.bincount(expert_of, minlength=len(experts)).tolist()  # the host must know them: waits for the device
    if rows is None and max(sizes) == len(hidden):  # one group: nothing to sort or copy
        return run_expert(experts[sizes.index(len(hidden))], hidden)
    order = expert_of.argsort(stable=True)
    groups = hidden[order if rows is None else rows[order]].split(sizes)
    # a ViT cannot reshape an empty batch
    outputs = [run_expert(experts[i], group) for i, group in enumerate(groups) if len(group) > 0]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # order's inverse
    return torch.cat(outputs)[back]


def run_all(experts: nn.ModuleList, hidden: Tensor, uses: Tensor | None = None) -> Tensor:
    """Logits (B, E, C) of every expert; BatchNorm counts each image as often as `uses` (B, E) says, once if None."""
    outputs = []
    for i, expert in enumerate(experts):
        with weighted_batchnorm(expert, None if uses is None else uses[:, i]):
            outputs.append(run_expert(expert, hidden))
    return torch.stack(outputs, dim=1)


def run_expert(expert: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of one expert for its images, which may be a single one in training."""
    with single_row_mode(expert, len(hidden)):
        return expert(hidden)


def count_uses(num_experts: int, index: Tensor, used: Tensor | None, extra: Tensor | None) -> Tensor:
    """(B, E): how often each image goes to each expert, from `index` (B, k), where `used`, and `extra` (B,)."""
    ones = torch.ones_like(index, dtype=torch.float32) if used is None else used.float()
    counts = ones.new_zeros(len(index), num_experts).scatter_add(1, index, ones)
    if extra is None:
        return counts
    return counts.scatter_add(1, extra.clamp_min(0)[:, None], (extra >= 0).float()[:, None])


def pick_expert(by_expert: Tensor, index: Tensor) -> Tensor:
    """The logits (B, C) of expert `index` (B,) from those of all (B, E, C); zeros where it is -1."""
    # -1 picks expert 0 here and is set to 0 below: a branch would look at the device
    chosen = by_expert.gather(1, index.clamp_min(0)[:, None, None].expand(-1, 1, by_expert.shape[2])).squeeze(1)
    return chosen * (index >= 0)[:, None]


__all__ = ["static_shapes"]
