"""N-FGSM: one gradient step from a noisy image, for training only (https://arxiv.org/abs/2202.01181).

It costs one forward and gradient pass where PGD-10 costs ten. Noise wider than the ball, and no projection back onto
it, keep single-step training from collapsing. So it is no attack to evaluate with.
"""

from dataclasses import dataclass

from torch import Tensor

from ..models.outputs import logits_of
from .base import Attack, Classifier, check_choice, check_eps
from .steps import OBJECTIVES, checked, image_noise, input_gradient, may_flush_gradients, round_inwards


@dataclass(frozen=True, kw_only=True)
class NFGSM(Attack):
    """Uniform noise in a ball of radius `noise` * eps, then a step of eps along the sign of the gradient (L-inf).

    Called like every attack, but what it returns may lie outside the ball (see `eps`); it stays inside [0, 1].

    Args:
        eps: Radius in [0, 1] pixel units, or a tensor without dimensions as in `PGD`; the result may lie up to
            (1 + noise) * eps away from the image.
        noise: Radius of the noise in units of eps, >= 0 (paper: 2).
        objective: As in `PGD`.
        shard: (rank, processes) of a training that is spread over processes; see `image_noise`.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    eps: float | Tensor = 8 / 255
    noise: float = 2.0
    objective: str = "ce"
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        check_eps(self.eps, "linf")
        if not isinstance(self.noise, (int, float)) or not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise={self.noise!r} must be finite and >= 0, in units of eps.")
        check_choice("objective", self.objective, OBJECTIVES)
        if self.objective == "kl" and self.noise == 0 and self.eps > 0:
            raise ValueError("objective='kl' has no gradient at the image itself; it needs noise > 0.")

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        reference = logits_of(model, images) if self.objective == "kl" else None
        start = images + (2 * image_noise(images, shard=self.shard) - 1) * (self.noise * self.eps)
        objective, rescale = checked(OBJECTIVES[self.objective]), may_flush_gradients(model, images)
        gradient = input_gradient(model, start, labels, objective, reference, rescale=rescale)
        return round_inwards((start + self.eps * gradient.sign()).clamp(0, 1), images)  # no projection: see above


__all__ = ["NFGSM"]
