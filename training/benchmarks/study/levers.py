"""Training levers that a study measures and the package does not have: each is a `RobustTrainer` with one change.

python training/benchmarks/study/levers.py z_loss '{"coef": 0.001}' --method rt_er   # else as training/run.py

An arm of a study names its lever: `lever: z_loss`, `lever_args: {coef: 0.001}`. For one process: the penalties read
the router outside of the wrapped model.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.certification.route_radii import effective_router_weight
from hf_dualmoe.losses.adversarial import LossOutput
from hf_dualmoe.losses.certified import route_margin_penalty
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.trainer import RobustTrainer
from training import run as training


class Lever(RobustTrainer):
    """A trainer with one change. `options` are its numbers with their defaults, all finite and > 0."""

    options: ClassVar[dict[str, float]] = {}


# --- penalties on the router -----------------------------------------------------------------------------------------


class RouterPenalty(Lever):
    """Adds coef * penalty to the loss; of a dual model F_R's router is meant.

    Raises:
        ValueError: The model has no mixture of at least two experts.
    """

    def __init__(self, model: nn.Module, args: RobustTrainingArguments, **kwargs):
        moe = robust_part(model)
        experts = getattr(moe.config, "num_experts", 1)
        if experts < 2:
            raise ValueError(
                f"lever={type(self).__name__!r} needs a router: num_experts={experts} must be at least 2."
            )
        super().__init__(model, args, **kwargs)

    def penalty(self, moe: nn.Module, images: Tensor, scores: Tensor) -> Tensor:
        """A scalar >= 0 from the clean images (B, C, H, W) and the scores (N, E) that the loss was computed with."""
        raise NotImplementedError(f"{type(self).__name__} has no penalty.")

    def create_objective(self) -> Callable[..., LossOutput]:
        plain = super().create_objective()

        def penalised(
            model: nn.Module, images: Tensor, labels: Tensor, *, forward: Callable | None = None, **attack
        ) -> LossOutput:
            scores = []

            def network(*args, **kwargs) -> object:
                output = (forward or model)(*args, output_router_logits=True, **kwargs)
                scores.append(deciding_scores(output, kwargs.get("expert_index")))
                return output

            output = plain(model, images, labels, forward=network, **attack)
            penalty = self.penalty(robust_part(model), images, scores[0])
            terms = {**output.terms, type(self).__name__: penalty.detach()}
            return replace(output, loss=output.loss + self.options["coef"] * penalty, terms=terms)

        return penalised


def robust_part(model: nn.Module) -> nn.Module:
    """F_R of a dual model, any other model itself."""
    return getattr(model, "robust", model)


def deciding_scores(output: object, expert_index: Tensor | None) -> Tensor:
    """Router logits (N, E) of the rows whose expert the router chose, before softmax."""
    scores = output["robust_router_logits" if "robust_router_logits" in output else "router_logits"]
    return scores if expert_index is None else scores[expert_index < 0]


class ZLoss(RouterPenalty):
    """Router z-loss of ST-MoE (Zoph et al. 2022, https://arxiv.org/abs/2202.08906, Eq. 5)."""

    options: ClassVar[dict[str, float]] = {"coef": 1e-3}

    def penalty(self, moe: nn.Module, images: Tensor, scores: Tensor) -> Tensor:
        """Mean over images of logsumexp(scores)^2."""
        return z_loss(scores)


def z_loss(scores: Tensor) -> Tensor:
    """Mean over images of logsumexp(scores)^2, from router logits (N, E)."""
    return scores.float().logsumexp(dim=1).square().mean()


class RouterMargin(RouterPenalty):
    """Hinge on the gap between the two highest scores of the images that the loss saw (no paper: our own).

    Options:
        coef: Weight of the penalty.
        target: Gap from which on nothing is paid, in router logits.
    """

    options: ClassVar[dict[str, float]] = {"coef": 0.1, "target": 1.0}

    def penalty(self, moe: nn.Module, images: Tensor, scores: Tensor) -> Tensor:
        """Mean over images of relu(target - gap)."""
        return margin_hinge(scores, self.options["target"])


def margin_hinge(scores: Tensor, target: float) -> Tensor:
    """Mean over images of relu(target - (first - second score)), from router logits (N, E)."""
    first, second = scores.float().topk(2, dim=1).values.unbind(dim=1)
    return F.relu(target - (first - second)).mean()


class RouteRadius(RouterPenalty):
    """Hinge on the exact L-inf distance at which a clean image changes its expert; see `route_radii.route_radii`.

    Options:
        coef: Weight of the penalty, which is in [0, 1].
        radius: Distance from which on nothing is paid, in units of eps.

    Raises:
        NotApplicableError: The router is not affine in the image.
    """

    options: ClassVar[dict[str, float]] = {"coef": 0.1, "radius": 1.0}

    def __init__(self, model: nn.Module, args: RobustTrainingArguments, **kwargs):
        super().__init__(model, args, **kwargs)
        effective_router_weight(robust_part(model))  # refuses other routers before training

    def penalty(self, moe: nn.Module, images: Tensor, scores: Tensor) -> Tensor:
        """Mean over images of relu(radius - distance) / radius."""
        return route_margin_penalty(moe, images, radius=self.options["radius"] * float(self.args.eps), norm="linf")


# --- by name ---------------------------------------------------------------------------------------------------------

LEVERS: dict[str, type[Lever]] = {
    "z_loss": ZLoss,
    "router_margin": RouterMargin,
    "route_radius": RouteRadius,
}


def lever_trainer(name: str, options: dict[str, Any] | None = None) -> type[Lever]:
    """The trainer class of a lever with these options.

    Raises:
        ValueError: The lever or an option is unknown, or a value is no finite number > 0.
    """
    if name not in LEVERS:
        raise ValueError(f"lever={name!r} is not one of {', '.join(LEVERS)}.")
    base, given = LEVERS[name], options or {}
    if unknown := sorted(set(given) - set(base.options)):
        raise ValueError(f"lever_args of {name}: {', '.join(unknown)} is unknown; it takes {', '.join(base.options)}.")
    for option, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and 0 < value < math.inf):
            raise ValueError(f"lever_args of {name}: {option}={value!r} must be a finite number > 0.")
    return type(name, (base,), {"options": {**base.options, **given}})


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(f"usage: levers.py LEVER JSON [arguments of training/run.py]; levers: {', '.join(LEVERS)}")
    name, options, *arguments = sys.argv[1:]
    try:
        trainer = lever_trainer(name, json.loads(options))
    except ValueError as error:
        sys.exit(f"levers.py: error: {error}")
    training.RobustTrainer = trainer
    sys.argv = [sys.argv[0], *arguments]
    training.main()


if __name__ == "__main__":
    main()
