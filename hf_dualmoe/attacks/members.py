"""The members of the adaptive union: functions to climb, each with other blind spots than the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.outputs import logits_of
from ..models.parts import answering, has_experts, is_dual, mixture_of
from .apgd import APGD_OBJECTIVES, MIN_CLASSES
from .base import Classifier
from .components import fixed_expert, soft_logits, soft_margin, unit_range
from .steps import margin_objective

TEMPERATURES = (0.2, 1.0, 5.0)  # close to the hard route, as the scores are, close to an equal mixture
ALPHAS = (0.5, 0.9, 0.99)

Look = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Member:
    """A function to climb.

    Args:
        name: Name in the report; the random start depends on it, not on the other members.
        look: (images (B, ...), labels (B,), reference (B, ...)) -> what to raise, (B,), differentiable; and the logits
            (B, C) of the model itself, or None.
        prepare: (clean images, labels) -> the reference, a tensor with a row per image, such as a route.
        prepare_passes: Forward passes per image that `prepare` takes.
        judges: Whether `look` gives the model's logits on the way, so that the judge needs no forward of its own.
        effort: Gradient passes in units of the `steps` of `worst_case`.
    """

    name: str
    look: Look
    prepare: Callable[[Tensor, Tensor], Tensor] = lambda images, labels: labels
    prepare_passes: int = 0
    judges: bool = False
    effort: float = 1.0

    def steps(self, steps: int) -> int:
        """Gradient passes per image and restart."""
        return max(1, int(self.effort * steps))


def margin_member(name: str, classify: Classifier) -> Member:
    """Raise the soft margin of a classifier."""
    return Member(name, lambda images, labels, _: (soft_margin(logits_of(classify, images), labels), None))


def whole_member(name: str, model: Classifier, objective: Callable[[Tensor, Tensor], Tensor]) -> Member:
    """Raise an objective of the model itself."""

    def look(images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(model, images)
        return objective(logits, labels), logits

    return Member(f"whole {name}", look, judges=True)


def whole_members(model: Classifier, num_classes: int) -> list[Member]:
    """APGD on the model itself: cross-entropy, and difference of logits ratio or, below three classes, soft margin.

    The cross-entropy alone is blind where logits are large: its gradient is then exactly 0.
    """
    names = [name for name in ("ce", "dlr") if num_classes >= MIN_CLASSES[name]]
    members = [whole_member(name, model, APGD_OBJECTIVES[name]) for name in names]
    return members if "dlr" in names else [*members, whole_member("margin", model, soft_margin)]


def component_members(dual: nn.Module, alphas: Sequence[float]) -> list[Member]:
    """For dual models, whose mixture hides a component that is saturated or weighs little.

    F_R and F_S alone: logits are steep where probabilities are flat. Both, in equal units: the mixture breaks where
    they lean to one wrong class. Other positions of the dial: more weight on the hidden one.
    """

    def member(name: str, scores: Callable[[Any], Tensor], alpha: float | None = None) -> Member:
        def look(images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            output = dual(images, alpha=alpha)
            # the judge is the model at its own alpha, whatever alpha the member climbs
            own = output.logits if alpha is None else dual.mix(output.standard_logits, output.robust_logits)
            return soft_margin(scores(output).float(), labels), own.float()

        return Member(name, look, judges=True)

    return [
        member("robust", lambda output: output.robust_logits),
        member("standard", lambda output: output.standard_logits),
        member("standard + robust", lambda out: unit_range(out.standard_logits) + unit_range(out.robust_logits)),
        *(member(f"alpha={alpha:g}", lambda output: output.logits, alpha) for alpha in alphas),
    ]


def route_members(model: nn.Module) -> list[Member]:
    """For models that route (themselves or in F_R), whose gradient is blind to the router.

    The route alone (RA-R). For each expert in turn, the lead of its route and the margin by which it is wrong,
    whichever is smaller, each in units of its range on the clean image: a broken expert counts only where it is
    chosen, a chosen one only where it is broken, and a sum of the two spends the radius on the one that is there
    already. Each expert alone, in fewer steps: these take no more together than E + 2 members of full length.
    """
    moe = mixture_of(model)
    num_experts = moe.config.num_experts

    def leave(images: Tensor, labels: Tensor, route: Tensor) -> tuple[Tensor, None]:
        return margin_objective(moe.route(images), route), None

    def scores(images: Tensor, labels: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        target = torch.full_like(labels, expert)
        return target, moe.route(images).float(), model(images, expert_index=target).logits.float()

    def units(images: Tensor, labels: Tensor, expert: int) -> Tensor:
        ranges = [z.amax(dim=1) - z.amin(dim=1) for z in scores(images, labels, expert)[1:]]
        return torch.stack(ranges, dim=1).clamp_min(1e-12)

    def through(images: Tensor, labels: Tensor, units: Tensor, expert: int) -> tuple[Tensor, None]:
        target, routes, logits = scores(images, labels, expert)
        lead = -margin_objective(routes, target) / units[:, 0]
        soft = soft_margin(logits, labels)  # its gradient sees all wrong classes, but its value is too high
        margin = soft + (margin_objective(logits, labels) / units[:, 1] - soft).detach()
        return torch.minimum(lead, margin), None

    experts = range(num_experts)
    alone = [margin_member(f"expert {i}", partial(fixed_expert, model, expert=i)) for i in experts]
    return [
        Member("route", leave, lambda images, labels: moe.route(images).argmax(dim=1)),
        *(
            Member(f"route to expert {i}", partial(through, expert=i), partial(units, expert=i), prepare_passes=1)
            for i in experts
        ),
        *(replace(member, effort=min(1.0, 2 / num_experts)) for member in alone),
    ]


def members_of(
    model: Classifier, num_classes: int, temperatures: Sequence[float], alphas: Sequence[float]
) -> list[Member]:
    """The members that apply to `model`, cheapest first; those for soft routing run all experts.

    A dial in the weights leaves one network, with nothing mixed: it gets the members of a single network.
    """
    # F_R last: route_members needs it
    parts = [model.standard, model.robust] if is_dual(model) else [answering(model)]
    members = whole_members(model, num_classes)
    members += component_members(model, alphas) if is_dual(model) else []
    members += route_members(model) if has_experts(parts[-1], 2) else []
    if any(has_experts(part, 2) for part in parts):
        soft = {f"soft T={t:g}": partial(soft_logits, model, temperature=t) for t in temperatures}
        members += [margin_member(name, classify) for name, classify in soft.items()]
    return members


def member_names(model: Classifier, num_classes: int) -> list[str]:
    """Names of the members that apply to `model`, in the order in which they run."""
    return [member.name for member in members_of(model, num_classes, TEMPERATURES, ALPHAS)]


def named(names: Sequence[str] | None, members: list[Member]) -> list[Member]:
    """The members with one of these names, in their own order; None = all."""
    chosen = [member for member in members if names is None or member.name in names]
    if not chosen:
        raise ValueError(f"members={list(names)!r}: none applies; expected some of {[m.name for m in members]}.")
    return chosen
