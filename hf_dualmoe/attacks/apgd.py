"""APGD: projected gradient ascent that chooses its own step size (Croce & Hein 2020, https://arxiv.org/abs/2003.01690).

    attack = APGD(eps=8 / 255, objective="dlr_targeted")
    attacked = attack(model, images, labels)

It halves the step of an image where its progress stalls.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ..models.outputs import logits_of
from .base import (
    Attack,
    Classifier,
    check_choice,
    check_counts,
    check_eps,
    check_logits,
    check_seed,
    numbered,
)
from .steps import (
    RUN_SEED,
    Objective,
    ce_objective,
    margin_objective,
    per_image,
    project,
    random_start,
    steepest,
    value_and_gradient,
)

MOMENTUM = 0.75  # alpha of the paper's Eq. 1
RHO = 0.75  # share of steps that must raise the objective for the step size to stay (Sec. 3.1)


# --- objectives ------------------------------------------------------------------------------------------------------


def _spread(logits: Tensor, ranked: Tensor, low: Tensor) -> Tensor:
    """Denominator of a DLR loss (B,): top logit minus `low`, kept away from zero in units of the logits' own range."""
    whole = (ranked[:, 0] - logits.amin(dim=1)).detach().clamp_min(1e-12)
    return torch.maximum(ranked[:, 0] - low, 1e-6 * whole)


def dlr_objective(logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """Difference of logits ratio (B,), Eq. 6: -(z_y - max_{i != y} z_i) / (z_1st - z_3rd).

    Blind to shift and scale of the logits, log-probabilities among them; > 0 exactly where the image is misclassified.

    Args:
        logits: (B, C), C >= 3.
        labels: (B,) int64, y.
        reference: Unused.
    """
    ranked = logits.topk(3, dim=1).values
    return margin_objective(logits, labels) / _spread(logits, ranked, ranked[:, 2])


def targeted_dlr_objective(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    """Targeted difference of logits ratio (B,), Eq. 7: -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2).

    Args:
        logits: (B, C), C >= 4.
        labels: (B,) int64, y.
        reference: (B,) int64, the target class t.
    """
    ranked = logits.topk(4, dim=1).values
    right, target = (logits.gather(1, classes[:, None]).squeeze(1) for classes in (labels, reference))
    return (target - right) / _spread(logits, ranked, ranked[:, 2:].mean(dim=1))


APGD_OBJECTIVES: dict[str, Objective] = {
    "ce": ce_objective,
    "dlr": dlr_objective,
    "dlr_targeted": targeted_dlr_objective,
}
MIN_CLASSES = {"ce": 2, "dlr": 3, "dlr_targeted": 4}


def wrong_classes(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The wrong classes with the highest logits, highest first: (B, min(count, C - 1)) int64."""
    wrong = logits.scatter(1, labels[:, None], -torch.inf)
    return wrong.topk(min(count, logits.shape[1] - 1), dim=1).indices


def check_classes(logits: Tensor, minimum: int, what: str) -> None:
    """Raise a ValueError unless logits (B, C) have at least `minimum` classes; `what` needs them."""
    if logits.shape[1] < minimum:
        raise ValueError(f"{what} needs at least {minimum} classes; the model has {logits.shape[1]}.")


class PassCounter(nn.Module):
    """A classifier that counts the images it is shown: `forward_rows`, `gradient_rows` where a gradient follows."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.training = False  # nothing of its own to train; the model's mode is the caller's
        self.forward_rows = self.gradient_rows = 0

    @property
    def counted_model(self) -> Classifier:
        """The classifier itself; what is done to it beside the attack does not count."""
        return self.model

    def forward(self, images: Tensor) -> Tensor:
        self.forward_rows += len(images)
        self.gradient_rows += len(images) if images.requires_grad and torch.is_grad_enabled() else 0
        return logits_of(self.model, images)


# --- one run ---------------------------------------------------------------------------------------------------------


def checkpoints(steps: int) -> list[int]:
    """Steps after which the step size is reviewed (Sec. 3.1): w_j = ceil(p_j * steps), p in whole hundredths."""
    found, p, width = [], 0, 22  # p_1 = 0.22; each interval is 0.03 shorter than the last, but 0.06 at least
    while p + width <= 100:
        p += width
        found.append(-(-p * steps // 100))
        width = max(width - 3, 6)
    return sorted(set(found))


@dataclass
class Ascent:
    """One run on a working batch of n images; every field has n rows, so that a finished image can leave.

    Args:
        rows: (n,) position of each image in the caller's batch.
        images, labels, reference: (n, ...) what is attacked; `reference` holds target classes or nothing of use.
        current, previous: (n, ...) the two latest iterates.
        gradient, value: (n, ...), (n,) at `current`.
        peak, peak_gradient, peak_value: The iterate of the highest value so far.
        step: (n,) step size, in the units of eps.
        rises: (n,) steps since the last checkpoint that raised the value.
        halved: (n,) whether the last checkpoint halved the step.
        peak_before: (n,) highest value at the last checkpoint.
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    reference: Tensor
    current: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    peak: Tensor
    peak_gradient: Tensor
    peak_value: Tensor
    step: Tensor
    rises: Tensor
    halved: Tensor
    peak_before: Tensor

    @classmethod
    def begin(
        cls,
        rows: Tensor,
        images: Tensor,
        labels: Tensor,
        reference: Tensor,
        *,
        start: Tensor,
        gradient: Tensor,
        value: Tensor,
        step: float,
    ) -> "Ascent":
        """A run at its `start` (n, ...), with the gradient (n, ...) and value (n,) there and the first step size."""
        zeros = torch.zeros_like(rows)
        return cls(
            rows=rows,
            images=images,
            labels=labels,
            reference=reference,
            current=start,
            previous=start,
            gradient=gradient,
            value=value,
            peak=start,
            peak_gradient=gradient,
            peak_value=value,
            step=torch.full_like(value, step),
            rises=zeros,
            halved=zeros.bool(),
            peak_before=value,
        )

    def keep(self, kept: Tensor) -> None:
        """Drop all images but those at `kept` (m,) int64: a mask would make the device wait once for each field."""
        for field in fields(self) if len(kept) < len(self.rows) else ():
            setattr(self, field.name, getattr(self, field.name)[kept])

    def proposal(self, eps: float, norm: str, momentum: float) -> Tensor:
        """The next iterate, Eq. 1: a projected gradient step, blended with the last move."""
        step = per_image(self.step, self.images).to(self.images)
        plain = project(self.current + step * steepest(self.gradient, norm), self.images, eps, norm)
        inertia = (1 - momentum) * (self.current - self.previous)
        return project(self.current + momentum * (plain - self.current) + inertia, self.images, eps, norm)

    def accept(self, proposal: Tensor, gradient: Tensor, value: Tensor) -> None:
        """Move to the proposal and remember it where it is the best point so far."""
        self.rises = self.rises + (value > self.value)
        self.previous, self.current = self.current, proposal
        self.gradient, self.value = gradient, value
        higher = value > self.peak_value  # where, not masks: a masked write waits for the device
        self.peak_value = torch.where(higher, value, self.peak_value)
        self.peak = torch.where(per_image(higher, proposal), proposal, self.peak)
        self.peak_gradient = torch.where(per_image(higher, gradient), gradient, self.peak_gradient)

    def review(self, interval: int) -> None:
        """At a checkpoint, `interval` steps after the last: halve the step and go back to the peak where stuck.

        Condition 1: fewer than RHO * interval steps raised the value. Condition 2: the step was not halved last time
        and the highest value has not changed since.
        """
        stuck = (self.rises < RHO * interval) | (~self.halved & (self.peak_value <= self.peak_before))
        self.step = torch.where(stuck, self.step / 2, self.step)
        self.current = torch.where(per_image(stuck, self.current), self.peak, self.current)
        self.gradient = torch.where(per_image(stuck, self.gradient), self.peak_gradient, self.gradient)
        self.value = torch.where(stuck, self.peak_value, self.value)
        self.halved, self.peak_before, self.rises = stuck, self.peak_value, torch.zeros_like(self.rises)


class _Outcome:
    """The best attacked version of every image of the caller's batch: misclassified first, then the highest value."""

    def __init__(self, images: Tensor, wrong: Tensor):
        self.images, self.wrong = images.clone(), wrong.clone()
        self.value = torch.full(wrong.shape, -torch.inf, device=wrong.device)

    def update(self, rows: Tensor, images: Tensor, wrong: Tensor, value: Tensor) -> None:
        """Take over candidates (n, ...) for the images at `rows` (n,) where they are better."""
        before = self.images[rows], self.value[rows], self.wrong[rows]
        better = (wrong & ~before[2]) | ((wrong == before[2]) & (value > before[1]))
        self.images[rows] = torch.where(per_image(better, images), images, before[0])
        self.value[rows] = torch.where(better, value, before[1])
        self.wrong[rows] = wrong | before[2]


# --- the attack ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD in the L-inf or L2 ball: no step size to choose (Alg. 1).

    The first step is 2 * eps long; at checkpoints it is halved, image by image, where progress has stalled. Noise
    comes from the seed and the image's id alone, so that a result depends neither on the batch size nor on the other
    images in the batch, up to the last bit in which a convolution may round differently at another batch size.

    Args:
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        steps: Forward and gradient passes per run.
        objective: "ce", "dlr" (>= 3 classes) or "dlr_targeted" (>= 4 classes; one run per target class).
        restarts: Runs from independent uniform points of the ball.
        target_classes: For "dlr_targeted": how many wrong classes, most likely first by the clean prediction; no more
            than C - 1 are used.
        seed: Of the random starts.

    An image leaves the work as soon as it is misclassified, and comes back so; one that stands comes back with the
    highest objective, one that is misclassified when clean as it is.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    steps: int = 100
    objective: str = "ce"
    restarts: int = 1
    target_classes: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        check_choice("objective", self.objective, APGD_OBJECTIVES)
        check_seed(self.seed)
        counts = {"steps": self.steps, "restarts": self.restarts, "target_classes": self.target_classes}
        check_counts(counts)

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        logits = logits_of(model, images)
        check_logits(logits, labels)
        check_classes(logits, MIN_CLASSES[self.objective], f"objective={self.objective!r}")
        outcome = _Outcome(images, logits.argmax(dim=1) != labels)  # wrong when clean: nothing to search
        targets = labels[:, None]  # of no use to an untargeted objective
        if self.objective == "dlr_targeted":
            targets = wrong_classes(logits, labels, self.target_classes)
        ids = numbered(ids, labels)
        for run in range(self.restarts * targets.shape[1] if self.eps > 0 else 0):  # an empty ball has one point
            rows = (~outcome.wrong).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            reference = targets[rows, run % targets.shape[1]]
            start = random_start(
                images[rows], self.eps, self.norm, seed=self.seed + RUN_SEED * run, ids=ids[rows.cpu()]
            )
            self._run(model, outcome, rows, images[rows], labels[rows], reference, start)
        return outcome.images

    def _run(
        self,
        model: Classifier,
        outcome: "_Outcome",
        rows: Tensor,
        images: Tensor,
        labels: Tensor,
        reference: Tensor,
        start: Tensor,
    ) -> None:
        """One ascent on the images (n, ...) at `rows` of the caller's batch, from `start` (n, ...)."""
        objective = APGD_OBJECTIVES[self.objective]
        gradient, logits, value = value_and_gradient(model, start, labels, objective, reference)
        ascent = Ascent.begin(
            rows, images, labels, reference, start=start, gradient=gradient, value=value, step=2 * self.eps
        )
        reviews, last_review = checkpoints(self.steps), 0
        for step in range(1, self.steps + 1):
            wrong = logits.argmax(dim=1) != ascent.labels
            # the gradient's pass gave the logits already
            outcome.update(ascent.rows, ascent.current, wrong, ascent.value)
            ascent.keep((~wrong).nonzero().squeeze(1))
            if len(ascent.rows) == 0:
                return
            # no last move to blend with yet
            proposal = ascent.proposal(self.eps, self.norm, MOMENTUM if step > 1 else 1.0)
            if step == self.steps:  # the last point needs no gradient
                break
            gradient, logits, value = value_and_gradient(model, proposal, ascent.labels, objective, ascent.reference)
            ascent.accept(proposal, gradient, value)
            if step in reviews:
                ascent.review(step - last_review)
                last_review = step
        logits = logits_of(model, proposal)
        value = objective(logits, ascent.labels, ascent.reference)
        outcome.update(ascent.rows, proposal, logits.argmax(dim=1) != ascent.labels, value)


__all__ = ["APGD", "PassCounter", "dlr_objective", "targeted_dlr_objective"]
