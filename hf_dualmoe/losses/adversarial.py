"""Training objectives: standard, AT, TRADES, RT-ER and JTDMoE, one function each.

Each function attacks the frozen model, then makes one forward through `forward` (the model or its distributed wrapper)
on the images of all terms, and returns named terms.

    output = rt_er_loss(model, images, labels, attack=PGD(keep_best=False), beta=6.0)
    output.loss.backward()

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.base import frozen, gather_weights, sharded_modules
from ..attacks.folding import folded
from ..attacks.steps import kl_objective
from ..models.outputs import find_logits, logits_of

SECOND_TERMS = ("kl", "ce")
SECOND_ATTACKS = ("own", "shared")

Attack = Callable[[Callable, Tensor, Tensor], Tensor]


@dataclass
class LossOutput:
    """Result of one training step of an objective.

    Args:
        loss: Scalar to minimise: the weighted sum of the terms.
        terms: The unweighted terms by name, scalars.
        attacked_images: (B, C, H, W) what the whole model was attacked with; None for the standard objective.
        attacked_logits: (B, classes) of the whole attacked model on them, in training mode, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    attacked_images: Tensor | None = None
    attacked_logits: Tensor | None = None


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in float32."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def kl_divergence(attacked_logits: Tensor, clean_logits: Tensor) -> Tensor:
    """Mean over images of sum_c p_c log(p_c / q_c), p the clean and q the attacked prediction.

    This is the direction of TRADES' published code. Gradients flow into both arguments.
    """
    return kl_objective(attacked_logits.float(), None, clean_logits.float()).mean()  # labels play no part in it


def second_expert(router_logits: Tensor) -> Tensor:
    """s(x): the index (B,) of the expert with the second-highest router score (B, E).

    Raises:
        ValueError: There is only one expert.
    """
    if router_logits.shape[1] < 2:
        raise ValueError(f"RT-ER needs a second expert: num_experts={router_logits.shape[1]} must be at least 2.")
    return router_logits.topk(2, dim=1).indices[:, 1]


def _weighted_aux_loss(model: nn.Module, output: object) -> Tensor | float:
    """Load-balancing loss as it enters the training loss; 0 for a model without a router."""
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is None:
        return 0.0
    return aux_loss * getattr(model.config, "router_aux_loss_coef", 1.0)  # a dual model has weighted it already


def _finish(
    model: nn.Module,
    output: object,
    loss: Tensor,
    terms: dict[str, Tensor],
    attacked: Tensor | None = None,
    attacked_logits: Tensor | None = None,
) -> LossOutput:
    """Add the load-balancing term, and detach what is only reported."""
    aux_loss = _weighted_aux_loss(model, output)
    if isinstance(aux_loss, Tensor):
        terms["aux"] = aux_loss
    loss = loss + aux_loss
    if sharded_modules(model):  # FSDP exchanges every gradient: an expert without images in this process has zeros
        loss = loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
    return LossOutput(
        loss=loss,
        terms={name: term.detach() for name, term in terms.items()},
        attacked_images=attacked,
        attacked_logits=None if attacked_logits is None else attacked_logits.detach(),
    )


def standard_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    forward: Callable | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """CE(F(x), y).

    Args:
        model: Any classifier.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64, or (B, classes) shares of the classes that sum to 1, as CutMix gives them.
        forward: What to call for the loss; default `model`. Pass the distributed wrapper here.
        label_smoothing: In [0, 1).
    """
    output = (model if forward is None else forward)(images)
    ce = cross_entropy(find_logits(output), labels, label_smoothing)
    return _finish(model, output, ce, {"ce": ce})


def at_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    clean_weight: float = 0.0,
    forward: Callable | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Adversarial training: (1 - c) CE(F(x + delta), y) + c CE(F(x), y), with c = `clean_weight`.

    c = 0 is Madry et al. 2018 (https://arxiv.org/abs/1706.06083). With c > 0 attacked and clean images go through the
    model in one batch and share BatchNorm's statistics; AdvProp (https://arxiv.org/abs/1911.09665) has statistics for
    each kind, of which a robust model could use but one.

    Args:
        attack: Called as `attack(model, images, labels)`; the last iterate is the usual choice in training.
        clean_weight: Weight c of the clean images, in [0, 1).

    Other arguments are those of `standard_loss`.

    Raises:
        ValueError: `clean_weight` is out of range.
    """
    if not 0 <= clean_weight < 1:
        raise ValueError(f"clean_weight={clean_weight!r} must be in [0, 1).")
    attacked = attack(model, images, labels)
    # one batch: DDP allows one forward per backward
    batch = torch.cat([attacked, images]) if clean_weight > 0 else attacked
    output = (model if forward is None else forward)(batch)
    logits, count = find_logits(output), len(images)
    terms = {"robust_ce": cross_entropy(logits[:count], labels, label_smoothing)}
    loss = terms["robust_ce"]
    if clean_weight > 0:
        terms["ce"] = cross_entropy(logits[count:], labels, label_smoothing)
        loss = (1 - clean_weight) * loss + clean_weight * terms["ce"]
    return _finish(model, output, loss, terms, attacked, logits[:count])


def trades_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    trades_lambda: float = 6.0,
    forward: Callable | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """TRADES (Zhang et al. 2019, Eq. 5): CE(F(x), y) + lambda * KL between the predictions on x and x + delta.

    Args:
        attack: An attack on the KL objective, such as `PGD(objective="kl", keep_best=False)`.
        trades_lambda: Weight of the robust term (6 in TRADES' code).

    Other arguments are those of `standard_loss`.
    """
    attacked = attack(model, images, labels)
    output = (model if forward is None else forward)(torch.cat([attacked, images]))
    attacked_logits, clean_logits = find_logits(output).chunk(2)
    ce = cross_entropy(clean_logits, labels, label_smoothing)
    kl = kl_divergence(attacked_logits, clean_logits)
    loss = ce + trades_lambda * kl
    return _finish(model, output, loss, {"ce": ce, "kl": kl}, attacked, attacked_logits)


@dataclass
class RTERBatch:
    """Attacked images of the RT-ER loss and the one batch that computes all its terms.

    Args:
        attacked: (B, C, H, W) images that attack the whole mixture.
        images: (N, C, H, W) all images of one forward: attacked, clean (KL only), and those that attack the second
            expert, where they are others.
        expert_index: (N,) the expert of each, -1 where the router decides; None: it decides all.
        extra_expert_index: (N,) where the attack is shared, the second expert for the attacked images, -1 for others.
    """

    attacked: Tensor
    images: Tensor
    expert_index: Tensor | None = None
    extra_expert_index: Tensor | None = None


def craft_rt_er(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    second_term: str = "kl",
    second_attack: str = "own",
) -> RTERBatch:
    """Attack the mixture, and its second expert s(x); arguments are those of `rt_er_loss`."""
    for name, value, allowed in (
        ("second_term", second_term, SECOND_TERMS),
        ("second_attack", second_attack, SECOND_ATTACKS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
    with frozen(model), folded(model, images):  # once for both attacks
        with torch.no_grad():
            second = second_expert(model.route(images))  # of the clean image: Eq. 6 compares the same expert on both
        routed = torch.full_like(second, -1)
        attacked = attack(model, images, labels)
        batch = [attacked, images] if second_term == "kl" else [attacked]  # `rt_er_terms` splits in this order
        experts = [routed, second] if second_term == "kl" else [routed]
        if second_attack == "own":
            attacked_second = attack(partial(model, expert_index=second), images, labels)
            # 3B or 2B images
            return RTERBatch(attacked, torch.cat([*batch, attacked_second]), torch.cat([*experts, second]))
    if second_term == "ce":
        return RTERBatch(attacked, attacked, extra_expert_index=second)
    return RTERBatch(attacked, torch.cat(batch), torch.cat(experts), extra_expert_index=torch.cat([second, routed]))


def rt_er_terms(
    logits: Tensor,
    extra_logits: Tensor | None,
    labels: Tensor,
    *,
    beta: float,
    second_term: str,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The RT-ER loss of an `RTERBatch`: loss, named terms, whole-model logits.

    Args:
        logits: (N, classes) of the batch's images.
        extra_logits: (N, classes) of the extra experts; None where the second expert has attacked images of its own.
    """
    parts = logits.split(len(labels))  # attacked, then clean (KL only), then attacks on the second expert, B each
    attacked_second = parts[-1] if extra_logits is None else extra_logits[: len(labels)]
    robust_ce = cross_entropy(parts[0], labels, label_smoothing)
    if second_term == "kl":
        expert = kl_divergence(attacked_second, parts[1])
    else:
        expert = cross_entropy(attacked_second, labels, label_smoothing)
    return robust_ce + beta * expert, {"robust_ce": robust_ce, f"expert_{second_term}": expert}, parts[0]


def rt_er_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    beta: float = 6.0,
    second_term: str = "kl",
    second_attack: str = "own",
    forward: Callable | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Robust training with expert robustification (paper, Eq. 6).

    CE(F(x + delta), y) + beta * KL(f_s(x + delta_s), f_s(x)): s(x) is the expert with the second-highest router score,
    delta attacks the whole mixture and delta_s attacks expert s. Mean over the batch.

    Args:
        model: A `MoEForImageClassification` with at least two experts.
        attack: Called as `attack(classifier, images, labels)`, once for the mixture and once for the second expert.
        beta: Weight of the expert term (paper: 6).
        second_term: "kl" (paper) or "ce": CE(f_s(x + delta_s), y), which needs no clean image.
        second_attack: "own" (paper), or "shared": use delta for delta_s, at half the cost; the trunk then sees these
            images once, and with all experts mixed the second expert costs nothing more.

    Other arguments are those of `standard_loss`.

    Raises:
        ValueError: The model has a single expert, or an option is unknown.
    """
    batch = craft_rt_er(model, images, labels, attack=attack, second_term=second_term, second_attack=second_attack)
    output = (model if forward is None else forward)(
        batch.images, expert_index=batch.expert_index, extra_expert_index=batch.extra_expert_index
    )
    loss, terms, attacked_logits = rt_er_terms(
        output.logits,
        output.extra_logits,
        labels,
        beta=beta,
        second_term=second_term,
        label_smoothing=label_smoothing,
    )
    return _finish(model, output, loss, terms, batch.attacked, attacked_logits)


def jtdmoe_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    alpha: float,
    beta: float = 6.0,
    second_term: str = "kl",
    second_attack: str = "own",
    standard_attack: Attack | None = None,
    forward: Callable | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Joint training of the dual model (paper, Eq. 11), both levels in one backward.

    Lower level: RT-ER on F_R. Upper level: CE((1 - alpha) F_S(x) + alpha F_R(x), y) on F_S, with F_R held fixed: its
    clean prediction is that of the deployed (eval mode) F_R and carries no gradient. Each level's loss reaches only
    its own parameters, so the gradient of the sum is the gradient of both.

    With a `standard_attack` the upper level sees x + delta in the place of x, delta being that attack on the dual
    model: a standard model that has seen mild attacks is not confidently wrong under strong ones, and pulls less of
    the mixture down (after Madry et al. 2018, https://arxiv.org/abs/1706.06083; not in the paper).

    Args:
        model: A `DualMoEForImageClassification` whose robust model is a mixture of at least two experts.
        attack: As in `rt_er_loss`; it attacks F_R.
        alpha: Weight of F_R in the upper level, in [0, 1).
        standard_attack: Attack on the dual model for the upper level; None = clean images, as in the paper.

    Other arguments are those of `rt_er_loss`.

    Raises:
        ValueError: As in `rt_er_loss`, or alpha = 1: F_S would get no gradient.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha!r} must be in [0, 1) in training: at 1 the standard model gets no gradient.")
    gather_weights(model)  # all of them: F_R is attacked alone
    with torch.no_grad(), frozen(model), folded(model.robust, images):  # F_R is folded once for all that follows
        batch = craft_rt_er(
            model.robust, images, labels, attack=attack, second_term=second_term, second_attack=second_attack
        )
        if standard_attack is not None:
            # at the training alpha, not the dial's
            images = standard_attack(partial(model, alpha=alpha), images, labels)
        # on the same images as F_S; no_grad is Eq. 11's stop-gradient
        fixed_robust_logits = logits_of(model.robust, images)
    output = (model if forward is None else forward)(
        images,
        robust_pixel_values=batch.images,
        expert_index=batch.expert_index,
        extra_expert_index=batch.extra_expert_index,
    )
    lower, terms, attacked_logits = rt_er_terms(
        output.robust_logits,
        output.robust_extra_logits,
        labels,
        beta=beta,
        second_term=second_term,
        label_smoothing=label_smoothing,
    )
    mixed = model.mix(output.standard_logits, fixed_robust_logits, alpha)
    upper = cross_entropy(mixed, labels, label_smoothing)  # moves F_S alone: F_R's logits here are fixed
    terms["dual_ce"] = upper
    return _finish(model, output, lower + upper, terms, batch.attacked, attacked_logits)


__all__ = [
    "LossOutput",
    "at_loss",
    "craft_rt_er",
    "jtdmoe_loss",
    "kl_divergence",
    "rt_er_loss",
    "rt_er_terms",
    "second_expert",
    "standard_loss",
    "trades_loss",
]
