"""The objective that the training arguments ask for, with all its settings but the attacks."""

from collections.abc import Callable
from functools import partial

from ..losses.adversarial import LossOutput, at_loss, jtdmoe_loss, rt_er_loss, standard_loss, trades_loss
from ..losses.certified import certified_loss
from .arguments import RobustTrainingArguments


def create_objective(args: RobustTrainingArguments) -> Callable[..., LossOutput]:
    """Called as `objective(model, images, labels, forward=..., attack=...)`; see `hf_dualmoe.losses`."""
    objective = {
        "standard": standard_loss,
        "at": partial(at_loss, clean_weight=args.clean_weight),
        "trades": partial(trades_loss, trades_lambda=args.trades_lambda),
        "rt_er": rt_er_loss,
        "jtdmoe": partial(jtdmoe_loss, alpha=args.train_alpha),
        "certified": partial(
            certified_loss,
            radius=args.certify_radius,
            margin_weight=args.margin_weight,
            route_weight=args.route_weight,
            gate_weight=args.gate_weight,
        ),
    }[args.method]
    if args.method in ("rt_er", "jtdmoe"):
        objective = partial(objective, beta=args.beta, second_term=args.second_term, second_attack=args.second_attack)
    # the parent's argument; its own smoother is not called, since we override compute_loss
    return partial(objective, label_smoothing=args.label_smoothing_factor)


__all__ = ["create_objective"]
