"""Attacks on one part of a mixture or dual model: its experts (RA-E), its router (RA-R)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..models.parts import answering, has_experts, is_dual, mixture_of
from .base import check_batch, frozen, numbered
from .pgd import PGD, Best
from .steps import margin_objective

SHARPNESS = 10  # of `soft_margin`: the scores' range in nats

# --- other routes ----------------------------------------------------------------------------------------------------


def fixed_expert(model: nn.Module, images: Tensor, *, expert: int, standard_expert: int | None = None) -> Tensor:
    """Logits (B, C) for images (B, ...) with `expert` in the place of the router of a MoE, or of a dual model's F_R.

    `standard_expert` does the same for F_S; None leaves F_S as it is.
    """
    index = torch.full((len(images),), expert, device=images.device)
    if standard_expert is None:
        return model(images, expert_index=index).logits
    standard = model.standard(images, expert_index=torch.full_like(index, standard_expert)).logits
    return model.mix(standard, model.robust(images, expert_index=index).logits)


def soft_mixture(moe: nn.Module, images: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, C) of all E > 1 experts mixed: log sum_i softmax(g / T)_i softmax(f_i).

    T counts in standard deviations of each image's router scores g (B, E): larger scores alone hide nothing.
    """
    logits, scores = moe.expert_logits(images)
    unit = scores.detach().std(dim=1, correction=0, keepdim=True).clamp_min(1e-12)  # equal scores have no spread
    log_gate = (scores / unit / temperature).log_softmax(dim=1)
    return (log_gate[:, :, None] + logits.float().log_softmax(dim=2)).logsumexp(dim=1)


def soft_logits(model: nn.Module, images: Tensor, temperature: float) -> Tensor:
    """Logits (B, C) with `soft_mixture` in the place of every hard route: of a MoE, or in F_S and F_R alike."""
    if not is_dual(model):
        return soft_mixture(answering(model), images, temperature)
    output = model(images)
    parts = ((model.standard, output.standard_logits), (model.robust, output.robust_logits))
    return model.mix(*(soft_mixture(part, images, temperature) if has_experts(part, 2) else z for part, z in parts))


def unit_range(scores: Tensor) -> Tensor:
    """Scores (B, K) in units of their range, so that terms of different scale add up; the unit has no gradient."""
    low, high = torch.aminmax(scores.detach(), dim=1, keepdim=True)
    return scores.float() / (high - low).clamp_min(1e-12)


def soft_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Soft maximum of the wrong scores (B, K) minus the right one (B,), in units of their range.

    For logits of range 10 that is the gradient direction of cross-entropy, all wrong classes included. But it neither
    saturates nor depends on scale: logits times 1e3 hide nothing.
    """
    unit = SHARPNESS * unit_range(scores)
    wrong = unit.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    return (wrong - unit.gather(1, labels[:, None]).squeeze(1)) / SHARPNESS


# --- component attacks -----------------------------------------------------------------------------------------------


def attack_experts(
    model: nn.Module, images: Tensor, labels: Tensor, *, attack: Callable[..., Tensor], ids: Tensor | None = None
) -> Tensor:
    """RA-E: attack each image through the expert that its clean version is sent to, with the route held there.

    Show the result to the WHOLE model, which routes anew: the share that it still gets right is RA-E.

    Args:
        model: MoE (k > 1: its first choice alone), or dual model whose F_R is one: the attacked function is then the
            mixture, with the route of F_R fixed, and that of F_S too where it has experts. Else a ValueError.
        images, labels, ids: As in `PGD.__call__`; the result is like `images`, detached.
        attack: Any attack of this package, such as `PGD(eps=8 / 255, steps=50, seed=0)`.
    """
    routed = [mixture_of(model)]
    routed += [model.standard] if is_dual(model) and has_experts(model.standard) else []
    check_batch(images, labels)
    ids = numbered(ids, labels)
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        images, labels = images.detach().clone(), labels.clone()  # clones leave inference mode, if it was on
        routes = torch.stack([moe.route(images).argmax(dim=1) for moe in routed], dim=1)
        attacked = images.clone()
        for route in routes.unique(dim=0):  # in groups: attacks drop rows, and would lose a route per image
            rows = (routes == route).all(dim=1).nonzero().squeeze(1)
            expert, *others = route.tolist()
            fixed = partial(fixed_expert, model, expert=expert, standard_expert=others[0] if others else None)
            attacked[rows] = attack(fixed, images[rows], labels[rows], ids=ids[rows.cpu()])
    return attacked


def attack_router(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 20,
    restarts: int = 1,
    seed: int | None = 0,
    ids: Tensor | None = None,
) -> Tensor:
    """RA-R: move each image as far as possible from its clean route i, whatever becomes of its class.

    Raises g_k - g_i for every other expert k in turn (margins do not saturate) and keeps the largest max_k g_k - g_i;
    exact for an affine router under L-inf. Show the result to the WHOLE model: the share still right is RA-R.

    Args:
        model: MoE, or dual model whose F_R is one; else a ValueError. A single expert leaves the images as they are.
        images, labels, ids: As in `PGD.__call__`; the result is like `images`, detached. Labels are only checked.
        eps, norm, steps, restarts, seed: As in `PGD`, for each k. A step costs the router (and the shared trunk).
    """
    moe = mixture_of(model)
    check_batch(images, labels)
    attack = PGD(eps=eps, norm=norm, steps=steps, restarts=restarts, seed=seed, objective="margin")
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        images = images.detach().clone()  # clones leave inference mode, if it was on
        scores = moe.route(images)
        route = scores.argmax(dim=1)
        best = Best(images, scores, margin_objective(scores, route), route)  # the value is -inf where E = 1
        for shift in range(1, scores.shape[1]):
            pair = torch.stack([route, (route + shift) % scores.shape[1]], dim=1)  # i differs from image to image

            def pair_scores(points: Tensor, pair: Tensor = pair) -> Tensor:
                return moe.route(points).gather(1, pair)

            attacked = attack(pair_scores, images, torch.zeros_like(route), ids=ids)  # column 0 of the pair is g_i
            scores = moe.route(attacked)
            best.update(attacked, scores, margin_objective(scores, route))
    return best.images


__all__ = [
    "attack_experts",
    "attack_router",
    "fixed_expert",
    "soft_logits",
    "soft_margin",
]
