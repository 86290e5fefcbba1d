"""FAB-T: the targeted Fast Adaptive Boundary attack (Croce & Hein 2020, https://arxiv.org/abs/1907.02044).

    attack = FAB(eps=8 / 255)
    attacked = attack(model, images, labels)

It looks for the nearest misclassified point instead of the worst point of a ball; here it stops at the first one
inside the ball.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.outputs import logits_of
from .apgd import check_classes, wrong_classes
from .base import Attack, Classifier, check_counts, check_eps, check_logits, widest_float
from .steps import per_image, project, value_and_gradient

PULL = 0.1  # largest pull back towards the original image: alpha_max of Sec. 3
OVERSHOOT = 1.05  # across the linearised boundary: eta
KEPT = 0.9  # share of the distance that is left when stepping back from a misclassified point: beta


def target_gap(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    """Logit of the target class minus that of the right one (B,); `reference` holds the targets (B,)."""
    right, target = (logits.gather(1, classes[:, None]).squeeze(1) for classes in (labels, reference))
    return target - right


def norm_of(delta: Tensor, norm: str) -> Tensor:
    """L-inf or L2 norm per image (B,) of delta (B, ...)."""
    flat = delta.flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


def box_projection(points: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    """Shortest step from points in the box [0, 1] to the hyperplane <normal, step> = gap that stays in the box.

    The projection problem of Sec. 2: each coordinate moves by min(t * s, room) towards the hyperplane, with s = 1
    (L-inf) or |normal| (L2). The progress <normal, step> is concave and piecewise linear in t, with a kink where a
    coordinate meets the box: sorting the kinks gives the exact t without a loop that waits for the device.

    Args:
        points: (B, ...) in [0, 1].
        normal: (B, ...).
        gap: (B,).
        norm: "linf" or "l2".

    Returns:
        Step (B, ...); where the hyperplane misses the box, the step to the corner nearest to it.
    """
    wide = widest_float(points.device)
    smallest = 1e-300 if wide == torch.float64 else 1e-30  # instead of 0, to divide by
    weight, position, gap = normal.flatten(1).to(wide), points.flatten(1).to(wide), gap.to(wide)
    weight = weight * torch.where(gap < 0, -1.0, 1.0)[:, None].to(weight)  # so that progress is positive
    room = torch.where(weight > 0, 1 - position, position)
    size = weight.abs()
    speed = torch.ones_like(size) if norm == "linf" else size
    hits = (room / speed.clamp_min(smallest)).where(size > 0, torch.zeros_like(room))  # t at which the box is met
    rate, held, aim = size * speed, size * room, gap.abs()[:, None]
    kinks, order = hits.sort(dim=1)
    rate, held = rate.gather(1, order), held.gather(1, order)
    slope = rate.flip(1).cumsum(dim=1).flip(1)  # progress per t before each kink: of what still moves there
    stopped = held.cumsum(dim=1) - held  # progress of what stands still by then
    last = (stopped + slope * kinks < aim).sum(dim=1, keepdim=True).clamp_max(kinks.shape[1] - 1)
    t = (aim - stopped.gather(1, last)) / slope.gather(1, last).clamp_min(smallest)
    step = weight.sign() * torch.minimum(t * speed, room)
    return step.to(points).view_as(points)


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Targeted FAB in the L-inf or L2 ball, from the image itself: no randomness, no step size.

    Images come back misclassified where that was found inside the ball, else unchanged.

    Args:
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        steps: Steps of two forward passes and one gradient pass, per target class.
        target_classes: How many wrong classes, most likely first by the clean prediction; no more than C - 1 are used.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    steps: int = 100
    target_classes: int = 9

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        check_counts({"steps": self.steps, "target_classes": self.target_classes})

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        images = images.clamp(0, 1)  # x * (1 / 255) may lie just above 1, outside the box that steps are projected to
        logits = logits_of(model, images)
        check_logits(logits, labels)
        check_classes(logits, 2, "FAB")
        attacked, standing = images.clone(), logits.argmax(dim=1) == labels
        targets = wrong_classes(logits, labels, self.target_classes)
        for target in targets.T if self.eps > 0 else ():
            rows = standing.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            self._run(model, images[rows], labels[rows], target[rows], rows, attacked, standing)
        return attacked

    def _run(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        targets: Tensor,
        rows: Tensor,
        attacked: Tensor,
        standing: Tensor,
    ) -> None:
        """One run towards `targets` (n,); writes what it finds into `attacked` and `standing` at `rows`."""
        current, closest, nearest = images, images, torch.full(labels.shape, torch.inf).to(images)
        for step in range(self.steps + 1):
            if step < self.steps:
                gradient, _, gap = value_and_gradient(model, current, labels, target_gap, targets)
                current = self._move(current, images, gradient, gap)
            else:  # is the nearest point found still misclassified when pulled back into the ball?
                current = project(closest, images, self.eps, self.norm)
            wrong = logits_of(model, current).argmax(dim=1) != labels
            distance = norm_of(current - images, self.norm)
            done = wrong & (distance <= self.eps * (1 + 1e-6))  # the same 1e-6 that all attacks promise
            nearer = wrong & (distance < nearest)
            closest = torch.where(per_image(nearer, current), current, closest)
            nearest = torch.where(nearer, distance, nearest)
            attacked[rows] = torch.where(
                per_image(done, current), project(current, images, self.eps, self.norm), attacked[rows]
            )
            standing[rows] = ~done
            kept = (~done).nonzero().squeeze(1)
            if len(kept) == 0:
                return
            if len(kept) < len(rows):
                images, labels, targets, rows, current, closest, nearest, wrong = (
                    x[kept] for x in (images, labels, targets, rows, current, closest, nearest, wrong)
                )
            current = torch.where(per_image(wrong, current), images + KEPT * (current - images), current)

    def _move(self, current: Tensor, images: Tensor, gradient: Tensor, gap: Tensor) -> Tensor:
        """The paper's biased step: a step across the linearised boundary, biased towards the original image."""
        back = (gradient * (images - current)).flatten(1).sum(dim=1)
        step = box_projection(current, gradient, -gap, self.norm)
        step_from_image = box_projection(images, gradient, -(gap + back), self.norm)
        length, length_from_image = norm_of(step, self.norm), norm_of(step_from_image, self.norm)
        # the farther the boundary, the harder the pull
        alpha = (length / (length + length_from_image).clamp_min(1e-12)).clamp_max(PULL)
        alpha = per_image(alpha, current)
        blend = (1 - alpha) * (current + OVERSHOOT * step) + alpha * (images + OVERSHOOT * step_from_image)
        return torch.where(torch.isfinite(blend), blend, images).clamp(0, 1)  # a zero gradient has no boundary


__all__ = ["FAB"]
