"""The adaptive union of attacks on mixtures and dual models.

    result = worst_case(model, images, labels, eps=8 / 255)
    result.accuracy, result.members, result.to_dict()

Hard routing and mixing both hide gradients: that of a routed model is blind to the router, that of a mixture to a
saturated component. `worst_case` climbs surrogates that are each blind to other things; the real model judges.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.outputs import logits_of
from ..models.parts import answering, has_experts, is_dual, mixture_of
from .apgd import APGD, APGD_OBJECTIVES, MIN_CLASSES, MOMENTUM, RUN_SEED, Ascent, PassCounter, checkpoints
from .components import fixed_expert, soft_logits, soft_margin, unit_range
from .folding import PROBE_IMAGES, folded
from .precision import full_precision
from .steps import (
    Classifier,
    check_batch,
    check_eps,
    check_logits,
    frozen,
    margin_objective,
    per_image,
    project,
    random_start,
    value_and_gradient,
)

TEMPERATURES = (0.2, 1.0, 5.0)  # close to the hard route, as the scores are, close to an equal mixture
ALPHAS = (0.5, 0.9, 0.99)
UNION = "adaptive union, every expert by lead and margin"  # what made a number, in reports

# --- members of the union --------------------------------------------------------------------------------------------

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
    """Those of `members` with one of these names, in their own order; all with None."""
    chosen = [member for member in members if names is None or member.name in names]
    if not chosen:
        raise ValueError(f"members={list(names)!r}: none applies; expected some of {[m.name for m in members]}.")
    return chosen


# --- the union -------------------------------------------------------------------------------------------------------


@dataclass
class WorstCaseResult:
    """Result of `worst_case` on N images; accuracies in % of all N, tensors on the CPU.

    Args:
        robust, clean_correct: (N,) bool: right when clean and under every member; right when clean.
        adversarial: (N, ...) what the first member that broke the image found, else the clean image.
        members: Accuracy under each member alone; empty with own_accuracy=False.
        union: Accuracy when clean and after each member, in the order in which they ran.
        skipped: Members that the budget left out: `accuracy` is then no more than an upper bound of the full union's.
        passes: Mean "forward" and "gradient" (forward and input gradient) passes per image.
        settings: The arguments.
    """

    robust: Tensor
    clean_correct: Tensor
    adversarial: Tensor
    members: dict[str, float]
    union: dict[str, float]
    skipped: list[str]
    passes: dict[str, float]
    settings: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of images that no member breaks, in %."""
        return _percent(self.robust)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, fit for JSON."""
        kept = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        return {"num_images": len(self.robust), "accuracy": self.accuracy, **kept}


def _percent(mask: Tensor) -> float:
    return 100 * mask.double().mean().item()


class _Search:
    """What all members share: the images and which of them stand, the judge, the settings, the count of passes."""

    def __init__(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor, settings: dict[str, Any]):
        self.images, self.labels, self.ids, self.settings = images.cpu(), labels.cpu(), ids.cpu(), settings
        self.ball = {"eps": settings["eps"], "norm": settings["norm"]}
        self.judge, self.surrogate = PassCounter(model), PassCounter(lambda images: images)  # takes members in turn
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = images.device if parameter is None else parameter.device
        self.adversarial, self.num_classes = self.images.clone(), 0
        self.robust = torch.ones(len(images), dtype=torch.bool)
        for rows, clean, right in self._batches(self.robust.clone()):
            logits = logits_of(self.judge, clean)
            check_logits(logits, right)
            self.robust[rows], self.num_classes = (logits.argmax(dim=1) == right).cpu(), logits.shape[1]
        self.clean_correct = self.robust.clone()

    def _batches(self, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Row numbers on the CPU, images and labels where the model is, of the rows in `mask` (N,)."""
        for rows in mask.nonzero().squeeze(1).split(self.settings["batch_size"]):
            if len(rows) > 0:
                yield rows, self.images[rows].to(self.device), self.labels[rows].to(self.device)

    def passes(self) -> dict[str, float]:
        """Mean passes per image so far."""
        rows = {"forward": self.judge.forward_rows, "gradient": self.surrogate.gradient_rows}
        return {name: count / len(self.images) for name, count in rows.items()}

    def affords(self, member: Member, budget: float | None) -> bool:
        """Whether one more member fits into the budget, even if it breaks nothing."""
        pool = self.clean_correct if self.settings["own_accuracy"] else self.robust
        most = int(pool.sum()) * member.steps(self.settings["steps"]) * self.settings["restarts"]
        return budget is None or self.surrogate.gradient_rows + most <= budget * len(self.images)

    def run(self, member: Member) -> Tensor:
        """Run one member; (N,) bool: which images stand under it. A fresh look at projected images decides."""
        stands = self.clean_correct.clone()
        for restart in range(self.settings["restarts"]):
            seed = self.settings["seed"] + RUN_SEED * restart + zlib.crc32(member.name.encode())
            for rows, images, labels in self._batches(stands if self.settings["own_accuracy"] else self.robust):
                found = random_start(images, **self.ball, seed=seed, ids=self.ids[rows])
                found = project(self._climb(member, images, labels, found), images, **self.ball)
                logits = logits_of(self.judge, found)
                if not torch.isfinite(logits).all():
                    raise ValueError(f"model returned logits that are NaN or infinite on images of {member.name!r}.")
                broken = (logits.argmax(dim=1) != labels).cpu()
                first = broken & self.robust[rows]
                self.adversarial[rows[first]] = found.cpu()[first]
                stands[rows[broken]] = self.robust[rows[broken]] = False
        return stands

    def _climb(self, member: Member, images: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """APGD on a member's value, where the real model looks at every step and what is broken leaves the work."""
        steps, last_review = member.steps(self.settings["steps"]), 0
        reviews = checkpoints(steps)
        found, reference = start.clone(), member.prepare(images, labels)
        self.judge.forward_rows += member.prepare_passes * len(images)
        gradient, value, _ = self._rise(member, start, labels, reference)
        rows = torch.arange(len(images), device=images.device)
        step_size = 2 * self.ball["eps"]
        ascent = Ascent.begin(rows, images, labels, reference, start, gradient, value, step_size)
        for step in range(1, steps + 1):
            point = ascent.proposal(**self.ball, momentum=MOMENTUM if step > 1 else 1.0)
            risen = self._step(member, ascent, point, found, last=step == steps)
            if not risen:
                break
            ascent.accept(*risen)
            if step in reviews:
                ascent.review(step - last_review, APGD.rho)
                last_review = step
        found[ascent.rows] = ascent.peak
        return found

    def _step(self, member: Member, ascent: Ascent, point: Tensor, found: Tensor, last: bool) -> list[Tensor]:
        """Note in `found` which of the points (n, ...) break the model, and drop them from the ascent.

        One sync with the device: how many images are left.

        Returns:
            Point, gradient and value of those that are left; [] where none is, or `last`, which needs no gradient.
        """
        own: list[Tensor] = [point]
        if member.judges and not last:
            *risen, logits = self._rise(member, point, ascent.labels, ascent.reference)
            own += risen
        else:
            logits = logits_of(self.judge, point)
        stands = logits.argmax(dim=1) == ascent.labels
        found[ascent.rows] = torch.where(per_image(stands, point), found[ascent.rows], point)
        kept = stands.nonzero().squeeze(1)
        ascent.keep(kept)
        if last or len(kept) == 0:
            return []
        own = [tensor[kept] for tensor in own]
        return own if member.judges else [*own, *self._rise(member, own[0], ascent.labels, ascent.reference)[:2]]

    def _rise(
        self, member: Member, points: Tensor, labels: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient (B, ...), value (B,) and the model's logits, if it gives them, of a member at `points`, counted."""
        own: list[Tensor | None] = []

        def look(images: Tensor) -> Tensor:
            value, logits = member.look(images, labels, reference)
            own.append(logits)
            return value

        self.surrogate.model = look
        gradient, _, value = value_and_gradient(self.surrogate, points, labels, lambda value, *_: value)
        return gradient, value, own[0]


def worst_case(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
    ids: Tensor | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    alphas: Sequence[float] = ALPHAS,
    members: Sequence[str] | None = None,
    own_accuracy: bool = True,
    batch_size: int = 128,
    budget: float | None = None,
    description: str | None = None,
) -> WorstCaseResult:
    """The adaptive union: an image is robust where it is right when clean and no member that applies breaks it.

    Args:
        model: MoE, dual model, or any callable from images to logits (B, C) or to an output with `logits`; a module
            is judged in eval mode and comes back as it was.
        images: (N, ...) floats in [0, 1].
        labels: (N,) int64, the right classes.
        eps, norm: Radius in [0, 1] pixel units of the "linf" or "l2" ball.
        steps: Gradient passes per image, member and restart, each point seen by the real model; some members of a
            mixture take fewer.
        restarts: Random starts per member.
        seed: Of the starts, which depend on it, `ids` and the member alone: the batch size does not matter.
        ids: (N,) int64 numbers of the images in their dataset; None = 0 .. N-1.
        temperatures: Of the soft-routing surrogates, see `soft_mixture`.
        alphas: Positions of the dial to attack beside the model's own (dual models).
        members: Names of those to run, such as "whole dlr", for a quick look; names that do not apply to the model
            are passed over. None = all that apply; only that is the union.
        own_accuracy: Run each member on all images that are right when clean, for its own accuracy. False runs it on
            those that still stand: the same union for fewer passes, since images do not depend on each other.
        batch_size: Images per batch.
        budget: Most gradient passes per image, on average over N; members that might exceed it are skipped and named.
        description: Label of the progress bar; None = no bar.

    Raises:
        ValueError: A setting, image or label is out of range, no name in `members` applies, or the model returns NaN.
    """
    settings = {"eps": eps, "norm": norm, "steps": steps, "restarts": restarts, "seed": seed}
    settings |= {"temperatures": list(temperatures), "alphas": list(alphas), "own_accuracy": own_accuracy}
    settings |= {"batch_size": batch_size, "budget": budget} | ({} if members is None else {"members": list(members)})
    _check_settings(settings)
    check_batch(images, labels)
    ids = torch.arange(len(images)) if ids is None else ids
    if ids.shape != labels.shape:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected one number per image, ({len(images)},).")
    own, skipped = {}, []
    with torch.inference_mode(False), torch.no_grad(), full_precision(), frozen(model):
        search = _Search(model, images.detach().clone(), labels.clone(), ids, settings)  # clones leave inference mode
        union = {"clean": _percent(search.robust)}
        todo = named(members, members_of(model, search.num_classes, temperatures, alphas))
        with folded(model, search.images[:PROBE_IMAGES].to(search.device)):
            for member in tqdm(todo, description, disable=description is None):
                if not search.affords(member, budget):
                    skipped.append(member.name)
                    continue
                stands = search.run(member)
                own |= {member.name: _percent(stands)} if own_accuracy else {}
                union[member.name] = _percent(search.robust)
    tensors = search.robust, search.clean_correct, search.adversarial
    return WorstCaseResult(*tensors, own, union, skipped, search.passes(), settings)


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a ValueError that names the first setting out of range."""
    check_eps(settings["eps"], settings["norm"])
    for name in ("steps", "restarts", "batch_size"):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise ValueError(f"{name}={settings[name]!r} must be an integer of at least 1.")
    if not settings["temperatures"] or not all(0 < t < math.inf for t in settings["temperatures"]):
        raise ValueError(f"temperatures={settings['temperatures']!r} must hold one or more finite numbers > 0.")
    if not settings["alphas"] or not all(0 <= alpha <= 1 for alpha in settings["alphas"]):
        raise ValueError(f"alphas={settings['alphas']!r} must hold one or more numbers in [0, 1].")
    if settings["budget"] is not None and not settings["budget"] > 0:
        raise ValueError(f"budget={settings['budget']!r} must be None or > 0 gradient passes per image.")


__all__ = ["Member", "WorstCaseResult", "member_names", "worst_case"]
