"""Gradient attacks: FGSM (https://arxiv.org/abs/1412.6572) and PGD (https://arxiv.org/abs/1706.06083).

    attack = PGD(eps=8 / 255, steps=20)
    attacked = attack(model, images, labels)

An attack is a frozen dataclass; call it with any callable from images to logits. It returns detached images inside
[0, 1] and, up to 1e-6, inside the ball of radius eps around the originals. The model comes back as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.outputs import logits_of
from .base import Attack, Classifier, check_choice, check_counts, check_eps, check_logits, check_seed
from .steps import (
    OBJECTIVES,
    RUN_SEED,
    checked,
    input_gradient,
    may_flush_gradients,
    per_image,
    project,
    random_start,
    steepest,
    step_in_ball,
    value_and_gradient,
)


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent on an objective of the logits, in the L-inf or L2 ball.

    Args:
        eps: Radius in [0, 1] pixel units. It and `step_size` may be tensors without dimensions, which are not looked
            at: the step of a training that is captured reads them each time.
        steps: Forward and gradient passes per restart.
        step_size: Length of a step in the same units as eps; None = 2.5 * eps / steps.
        norm: "linf" or "l2".
        objective: "ce", "margin" (largest wrong minus right logit) or "kl" (from the clean prediction, as in TRADES).
        random_start: Start from a uniform point of the ball instead of the image itself.
        restarts: Independent runs; needs keep_best when above 1.
        keep_best: Return, for each image, the best of the clean image and all iterates: misclassified before correct,
            then the highest objective (evaluation; two more forward passes). Otherwise the last iterate (training).
        seed: None = the global random number generator; a number makes the start of each image depend on this seed and
            the image's id alone.
        shard: (rank, processes) of a training that is spread over processes; see `image_noise`.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    eps: float | Tensor = 8 / 255
    steps: int = 10
    step_size: float | Tensor | None = None
    norm: str = "linf"
    objective: str = "ce"
    random_start: bool = True
    restarts: int = 1
    keep_best: bool = True
    seed: int | None = None
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        check_choice("objective", self.objective, OBJECTIVES)
        check_counts({"steps": self.steps, "restarts": self.restarts})
        check_seed(self.seed)
        allowed = self.step_size is None or isinstance(self.step_size, (int, float, Tensor))
        if not allowed or (isinstance(self.step_size, (int, float)) and not 0 < self.step_size < float("inf")):
            raise ValueError(f"step_size={self.step_size!r} must be finite and > 0, in the units of eps.")
        # KL is 0 and smallest at the clean image
        if self.objective == "kl" and not self.random_start and self.eps > 0:
            raise ValueError("objective='kl' has no gradient at the image itself; it needs random_start=True.")
        if self.restarts > 1 and not (self.keep_best and self.random_start):
            raise ValueError(f"restarts={self.restarts} needs keep_best=True and random_start=True.")

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        if self.keep_best:
            return self._best(model, images, labels, ids)
        return self._last(model, images, labels, ids)

    def _last(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        """The last iterate, for training: as few operations around the passes as can be."""
        reference = logits_of(model, images) if self.objective == "kl" else None
        objective = checked(OBJECTIVES[self.objective])  # the first logits seen tell how many classes there are
        move = step_in_ball(images, self.eps, self.norm, self._step_size)
        rescale = may_flush_gradients(model, images)
        perturbed = self._start(images, ids, 0)
        for _ in range(self.steps):
            gradient = input_gradient(model, perturbed, labels, objective, reference, rescale=rescale)
            perturbed = move(perturbed, gradient)
            objective = OBJECTIVES[self.objective]
        return perturbed

    @property
    def _step_size(self) -> float | Tensor:
        # Madry et al. 2018: far enough to reach the border from anywhere in the ball, and to move along it
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size

    def _start(self, images: Tensor, ids: Tensor | None, restart: int) -> Tensor:
        if not self.random_start:
            return images
        seed = None if self.seed is None else self.seed + RUN_SEED * restart
        return random_start(images, self.eps, self.norm, seed=seed, ids=ids, shard=self.shard)

    def _iterates(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        reference: Tensor,
        ids: Tensor | None,
        restart: int,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield, after each step, (previous iterate, new iterate, logits and objective of the previous one)."""
        perturbed = self._start(images, ids, restart)
        for _ in range(self.steps):
            objective = OBJECTIVES[self.objective]
            gradient, logits, value = value_and_gradient(model, perturbed, labels, objective, reference)
            moved = perturbed + self._step_size * steepest(gradient, self.norm)
            previous, perturbed = perturbed, project(moved, images, self.eps, self.norm)
            yield previous, perturbed, logits, value

    def _best(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        objective = OBJECTIVES[self.objective]
        clean_logits = logits_of(model, images)
        check_logits(clean_logits, labels)
        # the clean image is the first candidate: what is wrong already comes back so
        best = Best(images, clean_logits, objective(clean_logits, labels, clean_logits), labels)
        for restart in range(self.restarts):
            perturbed = images
            for previous, perturbed, logits, value in self._iterates(  # noqa: B007 - the last iterate is used below
                model, images, labels, clean_logits, ids, restart
            ):
                best.update(previous, logits, value)  # its logits came with the gradient, for no extra pass
            logits = logits_of(model, perturbed)  # the last iterate: no gradient pass has looked at it
            best.update(perturbed, logits, objective(logits, labels, clean_logits))
        return best.images


class Best:
    """The best attacked version of each image so far: misclassified first, then the highest objective."""

    def __init__(self, images: Tensor, logits: Tensor, value: Tensor, labels: Tensor):
        self.images, self.value, self.labels = images.clone(), value.clone(), labels
        self.wrong = logits.argmax(dim=1) != labels

    def update(self, images: Tensor, logits: Tensor, value: Tensor) -> None:
        """Take over the rows of (B, ...) candidates that are better."""
        wrong = logits.argmax(dim=1) != self.labels
        better = (wrong & ~self.wrong) | ((wrong == self.wrong) & (value > self.value))  # false where the value is NaN
        self.images = torch.where(per_image(better, images), images, self.images)
        self.value = torch.where(better, value, self.value)
        self.wrong = self.wrong | wrong


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One full-size step along the sign (L-inf) or direction (L2) of the gradient, from the image itself.

    Args:
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        objective: "ce" or "margin".
    """

    eps: float = 8 / 255
    norm: str = "linf"
    objective: str = "ce"
    folds_batchnorm = False  # a single pass

    def __post_init__(self) -> None:
        self._as_pgd()

    def _as_pgd(self) -> PGD:
        step_size = self.eps or None  # eps = 0 changes nothing, with any step size
        return PGD(
            eps=self.eps,
            steps=1,
            step_size=step_size,
            norm=self.norm,
            objective=self.objective,
            random_start=False,
            keep_best=False,
        )

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        return self._as_pgd()._attack(model, images, labels, ids)


__all__ = ["FGSM", "PGD"]
