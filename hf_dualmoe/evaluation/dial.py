"""Choose the dial of a dual model on held-out images: a sweep, then a choice; see also `calibration`.

    sweep = sweep_alpha(model, held_out, attack=dial_attack(model.config.num_labels, eps=8 / 255))
    model.set_alpha(choose_alpha(sweep, min_sa=80).alpha)

The images must be those of neither training nor test: a choice made on test images flatters its own numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..attacks.adaptive_union import worst_case
from ..attacks.apgd import MIN_CLASSES
from ..attacks.base import Attack, check_alphas, check_eps, percent
from ..data.datasets import ImageTensorDataset
from ..models.parts import mixes_weights
from .batches import correct_mask
from .calibration import ROUNDING

ALPHAS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
OTHER_ALPHAS = (0.5, 0.9)  # positions of the dial that `DialAttack` attacks beside the model's own
RA_TOLERANCE = 1.5  # points of RA that may be given away for SA where no floor is asked for
SOFT = 1.0  # temperature of its soft routes


class DialedModel(nn.Module):
    """A dual model with its dial held at `alpha`, as a plain classifier images -> logits (B, C)."""

    def __init__(self, model: nn.Module, alpha: float):
        super().__init__()
        self.model, self.alpha = model, alpha

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, alpha=self.alpha).logits

    def merged_network(self) -> nn.Module | None:
        """The network that answers, where the dial is in the weights (`folded` holds it still); else None."""
        return self.model.merged_network(self.alpha) if mixes_weights(self.model) else None


@dataclass(frozen=True)
class AlphaChoice:
    """A position of the dial.

    Args:
        alpha: Weight of F_R in [0, 1].
        sa, ra: Standard and robust accuracy there, in %, on the images of the sweep.
        rule: Why this one, in words.
    """

    alpha: float
    sa: float
    ra: float
    rule: str


class DialAttack(Attack):
    """The attack to choose a dial with: the members of the adaptive union that break most mixtures.

    APGD on the model itself; then, on images that still stand, APGD at two other positions of the dial and with soft
    routes. An attack on the mixture alone is too weak: where one part is saturated or decides by a small margin, the
    mixture's gradient is all but blind. A dial in the weights mixes nothing: there the first member remains, and soft
    routes where the network has experts.

    Args:
        eps: Radius in [0, 1] pixel units.
        objective: What APGD raises on the model itself: "dlr", or "margin" below three classes.
        norm: "linf" or "l2".
        steps: Gradient passes per image and member.
        seed: Of the random starts.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, *, eps: float, objective: str = "dlr", norm: str = "linf", steps: int = 20, seed: int = 0):
        check_eps(eps, norm)
        self.eps, self.norm, self.steps, self.seed = eps, norm, steps, seed
        self.members = (f"whole {objective}", *(f"alpha={alpha:g}" for alpha in OTHER_ALPHAS), f"soft T={SOFT:g}")

    def _attack(self, model: DialedModel, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        """An image that breaks the model at its position of the dial where one was found, else the clean image."""
        dual, before = model.model, model.model.config.alpha
        dual.set_alpha(model.alpha)  # `worst_case` looks at the dual model itself, at its own alpha
        try:
            found = worst_case(
                dual,
                images,
                labels,
                eps=self.eps,
                norm=self.norm,
                steps=self.steps,
                seed=self.seed,
                ids=ids,
                alphas=OTHER_ALPHAS,
                temperatures=(SOFT,),
                members=self.members,
                own_accuracy=False,
                batch_size=len(images),
            )
        finally:
            dual.set_alpha(before)
        return found.adversarial.to(images.device)


def dial_attack(num_classes: int, *, eps: float, norm: str = "linf", steps: int = 20, seed: int = 0) -> DialAttack:
    """The `DialAttack` for a model with this many classes.

    Args:
        num_classes: Classes of the model.
        eps: Radius in [0, 1] pixel units.
        norm, steps, seed: As in `DialAttack`.
    """
    objective = "dlr" if num_classes >= MIN_CLASSES["dlr"] else "margin"
    return DialAttack(eps=eps, objective=objective, norm=norm, steps=steps, seed=seed)


def sweep_alpha(
    model: nn.Module,
    dataset: ImageTensorDataset,
    *,
    attack: Attack,
    alphas: Sequence[float] = ALPHAS,
    batch_size: int = 256,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Measure SA and RA along the dial of a dual model; each alpha is attacked at that alpha.

    Args:
        model: Dual model; comes back as it was, its dial included.
        dataset: Held-out images.
        attack: Attack on the mixture; give it a seed, so that alphas differ in nothing else. See `dial_attack`.
        alphas: Positions to measure, each in [0, 1].
        batch_size: Images per forward.
        progress: Whether to show progress bars.

    Returns:
        One {"alpha", "sa", "ra"} per position, in the order of `alphas`; accuracies in %, an image counting as robust
        where it is right both clean and attacked.

    Raises:
        ValueError: `alphas` is empty or leaves [0, 1].
    """
    check_alphas(alphas)
    sweep = []
    for alpha in alphas:
        dialed, title = DialedModel(model, alpha), f"alpha = {alpha:g}" if progress else None
        clean = correct_mask(dialed, dataset, batch_size=batch_size)
        attacked = correct_mask(dialed, dataset, attack=attack, batch_size=batch_size, description=title)
        sweep.append({"alpha": float(alpha), "sa": percent(clean), "ra": percent(clean & attacked)})
    return sweep


def choose_alpha(
    sweep: Sequence[dict[str, float]],
    *,
    min_sa: float | None = None,
    min_ra: float | None = None,
) -> AlphaChoice:
    """Choose a position of the dial; of equally good ones the largest alpha.

    Args:
        sweep: Points {"alpha", "sa", "ra"} of `sweep_alpha`; accuracies in %.
        min_sa: "At least this SA", in %: the point of highest RA among those that reach it.
        min_ra: "At least this RA", in %: the point of highest SA among those that reach it.

    Without a floor: the point of highest SA among those whose RA is at most `RA_TOLERANCE` points below the highest of
    the sweep. That is often found in the middle of the dial, where attacks meet more resistance than they should;
    measured against F_R alone (alpha = 1), such a sweep would give away too much RA.

    Raises:
        ValueError: The sweep is empty, both floors are given, or one cannot be reached (the message names the best
            that can be).
    """
    if not sweep:
        raise ValueError("sweep is empty; expected the points of sweep_alpha.")
    if min_sa is not None and min_ra is not None:
        raise ValueError(f"min_sa={min_sa!r} and min_ra={min_ra!r} were both given; give one floor.")
    if min_sa is not None:
        points, goal = _reaching(sweep, "sa", min_sa), "ra"
        rule = f"highest RA with SA of at least {min_sa:g} %"
    elif min_ra is not None:
        points, goal = _reaching(sweep, "ra", min_ra), "sa"
        rule = f"highest SA with RA of at least {min_ra:g} %"
    else:
        points, goal = _reaching(sweep, "ra", max(point["ra"] for point in sweep) - RA_TOLERANCE), "sa"
        rule = f"highest SA with RA at most {RA_TOLERANCE:g} points below the highest of the dial"
    best = max(points, key=lambda point: (point[goal], point["alpha"]))  # of equals the one with more of F_R
    return AlphaChoice(best["alpha"], best["sa"], best["ra"], rule)


def _reaching(sweep: Sequence[dict[str, float]], name: str, floor: float) -> list[dict[str, float]]:
    """The points with at least `floor` % of "sa" or "ra"."""
    points = [point for point in sweep if point[name] >= floor - ROUNDING]
    if not points:
        best = max(sweep, key=lambda point: point[name])
        raise ValueError(
            f"min_{name}={floor!r} cannot be reached: the best {name.upper()} of the sweep is {best[name]:.2f} %, "
            f"at alpha = {best['alpha']:g}."
        )
    return points


__all__ = [
    "AlphaChoice",
    "DialAttack",
    "DialedModel",
    "choose_alpha",
    "dial_attack",
    "sweep_alpha",
]
