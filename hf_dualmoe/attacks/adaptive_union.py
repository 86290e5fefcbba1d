"""The adaptive union of attacks on mixtures and dual models.

    result = worst_case(model, images, labels, eps=8 / 255)
    result.accuracy, result.members, result.to_dict()

Hard routing and mixing both hide gradients: the gradient of a routed model is blind to the router, that of a mixture
to a saturated component. `worst_case` climbs surrogates with different blind spots (`members`); the real model judges.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.outputs import logits_of
from .apgd import MOMENTUM, Ascent, PassCounter, checkpoints
from .base import (
    Classifier,
    check_alphas,
    check_batch,
    check_counts,
    check_eps,
    check_logits,
    device_of,
    frozen,
    numbered,
    percent,
)
from .folding import PROBE_IMAGES, folded
from .members import ALPHAS, TEMPERATURES, Member, members_of, named
from .precision import full_precision
from .steps import RUN_SEED, per_image, project, random_start, value_and_gradient

UNION = "adaptive union, every expert by lead and margin"  # what made a number, in reports


@dataclass
class WorstCaseResult:
    """Result of `worst_case` on N images; accuracies in % of all N, tensors on the CPU.

    Args:
        robust, clean_correct: (N,) bool: right when clean and under every member; right when clean.
        adversarial: (N, ...) what the first member that broke the image found, else the clean image.
        members: Accuracy under each member alone; empty with own_accuracy=False.
        union: Accuracy when clean and after each member, in the order in which they ran.
        passes: Mean "forward" and "gradient" (forward and input gradient) passes per image.
        settings: The arguments.
    """

    robust: Tensor
    clean_correct: Tensor
    adversarial: Tensor
    members: dict[str, float]
    union: dict[str, float]
    passes: dict[str, float]
    settings: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of images that no member breaks, in %."""
        return percent(self.robust)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, fit for JSON."""
        kept = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        return {"num_images": len(self.robust), "accuracy": self.accuracy, **kept}


class _Search:
    """Shared by all members: images and which of them stand, the judge, the settings, the count of passes."""

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        *,
        eps: float,
        norm: str,
        steps: int,
        restarts: int,
        seed: int,
        own_accuracy: bool,
        batch_size: int,
    ):
        self.images, self.labels, self.ids = images.cpu(), labels.cpu(), ids  # all N; batches move to the device
        self.eps, self.norm, self.steps, self.restarts, self.seed = eps, norm, steps, restarts, seed
        self.own_accuracy, self.batch_size = own_accuracy, batch_size
        self.device = device_of(model, images.device)
        self.judge, self.surrogate = PassCounter(model), PassCounter(lambda images: images)  # takes members in turn
        self.adversarial, self.num_classes = self.images.clone(), 0
        self.robust = torch.ones(len(images), dtype=torch.bool)
        for rows, clean, right in self._batches(self.robust.clone()):
            logits = logits_of(self.judge, clean)
            check_logits(logits, right)
            self.robust[rows], self.num_classes = (logits.argmax(dim=1) == right).cpu(), logits.shape[1]
        self.clean_correct = self.robust.clone()

    def _batches(self, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Row numbers on the CPU, images and labels where the model is, of the rows in `mask` (N,)."""
        for rows in mask.nonzero().squeeze(1).split(self.batch_size):
            if len(rows) > 0:
                yield rows, self.images[rows].to(self.device), self.labels[rows].to(self.device)

    def passes(self) -> dict[str, float]:
        """Mean passes per image so far."""
        rows = {"forward": self.judge.forward_rows, "gradient": self.surrogate.gradient_rows}
        return {name: count / len(self.images) for name, count in rows.items()}

    def run(self, member: Member) -> Tensor:
        """Run one member; (N,) bool: which images stand under it. A fresh look at projected images decides."""
        stands = self.clean_correct.clone()
        for restart in range(self.restarts):
            # crc32: hash() of a text differs between processes
            seed = self.seed + RUN_SEED * restart + zlib.crc32(member.name.encode())
            for rows, images, labels in self._batches(stands if self.own_accuracy else self.robust):
                start = random_start(images, self.eps, self.norm, seed=seed, ids=self.ids[rows])
                found = project(self._climb(member, images, labels, start), images, self.eps, self.norm)
                logits = logits_of(self.judge, found)
                if not torch.isfinite(logits).all():
                    raise ValueError(f"model returned logits that are NaN or infinite on images of {member.name!r}.")
                broken = (logits.argmax(dim=1) != labels).cpu()
                first = broken & self.robust[rows]  # keep what the first member found
                self.adversarial[rows[first]] = found.cpu()[first]
                stands[rows[broken]] = self.robust[rows[broken]] = False
        return stands

    def _climb(self, member: Member, images: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """APGD on a member's value, where the real model looks at every step and what is broken leaves the work."""
        steps, last_review = member.steps(self.steps), 0
        reviews = checkpoints(steps)
        found, reference = start.clone(), member.prepare(images, labels)
        self.judge.forward_rows += member.prepare_passes * len(images)
        gradient, value, _ = self._rise(member, start, labels, reference)
        rows = torch.arange(len(images), device=images.device)
        ascent = Ascent.begin(
            rows, images, labels, reference, start=start, gradient=gradient, value=value, step=2 * self.eps
        )
        for step in range(1, steps + 1):
            point = ascent.proposal(self.eps, self.norm, MOMENTUM if step > 1 else 1.0)
            risen = self._step(member, ascent, point, found, last=step == steps)
            if risen is None:
                break
            ascent.accept(*risen)
            if step in reviews:
                ascent.review(step - last_review)
                last_review = step
        found[ascent.rows] = ascent.peak  # what stood so far gets a last look from the judge, in `run`
        return found

    def _step(
        self, member: Member, ascent: Ascent, point: Tensor, found: Tensor, last: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Note in `found` which of the points (n, ...) break the model, and drop them from the ascent.

        One sync with the device: how many images are left.

        Returns:
            Point, gradient and value of those that are left; None where none is, or `last`, which needs no gradient.
        """
        judged = member.judges and not last
        if judged:
            gradient, value, logits = self._rise(member, point, ascent.labels, ascent.reference)
        else:
            logits = logits_of(self.judge, point)
        stands = logits.argmax(dim=1) == ascent.labels
        found[ascent.rows] = torch.where(per_image(stands, point), found[ascent.rows], point)
        kept = stands.nonzero().squeeze(1)
        ascent.keep(kept)
        if last or len(kept) == 0:
            return None
        if judged:
            return point[kept], gradient[kept], value[kept]
        gradient, value, _ = self._rise(member, point[kept], ascent.labels, ascent.reference)
        return point[kept], gradient, value

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
        # the surrogate returns the value itself in the place of logits
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

    Raises:
        ValueError: A setting, image or label is out of range, no name in `members` applies, or the model returns NaN.
    """
    check_eps(eps, norm)
    check_counts({"steps": steps, "restarts": restarts, "batch_size": batch_size})
    check_temperatures(temperatures)
    check_alphas(alphas)
    check_batch(images, labels)
    effort = {"eps": eps, "norm": norm, "steps": steps, "restarts": restarts, "seed": seed}
    effort |= {"own_accuracy": own_accuracy, "batch_size": batch_size}
    own: dict[str, float] = {}
    with torch.inference_mode(False), torch.no_grad(), full_precision(), frozen(model):
        # clones leave inference mode
        search = _Search(model, images.detach().clone(), labels.clone(), numbered(ids, labels), **effort)
        union = {"clean": percent(search.robust)}
        todo = named(members, members_of(model, search.num_classes, temperatures, alphas))
        with folded(model, search.images[:PROBE_IMAGES].to(search.device)):
            for member in todo:
                stands = search.run(member)
                own |= {member.name: percent(stands)} if own_accuracy else {}
                union[member.name] = percent(search.robust)
    settings = {**effort, "temperatures": list(temperatures), "alphas": list(alphas)}
    settings |= {} if members is None else {"members": list(members)}
    tensors = {"robust": search.robust, "clean_correct": search.clean_correct, "adversarial": search.adversarial}
    return WorstCaseResult(**tensors, members=own, union=union, passes=search.passes(), settings=settings)


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Raise a ValueError unless there are temperatures and all are finite and > 0."""
    if len(temperatures) == 0 or not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"temperatures={list(temperatures)!r} must hold one or more finite numbers > 0.")


__all__ = ["WorstCaseResult", "worst_case"]
