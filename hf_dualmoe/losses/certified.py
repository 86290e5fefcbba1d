"""Training for certificates: differentiable penalties on the margins and slopes in the theorems of `certifier.py`.

    loss = certified_loss(model, images, labels, radius=0.5, margin_weight=1.0, route_weight=0.1).loss

A penalty is a mean over images, 0 where everything asked for holds, and never changes the model.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..certification.operator_norms import check_norm, dual_norm
from ..certification.route_radii import effective_router_weight
from ..models import lipschitz_dualmoe
from .adversarial import LossOutput, cross_entropy

LIPSCHITZ = "lipschitz_"  # how the names of 1-Lipschitz backbones begin


def route_margins(moe: nn.Module, images: Tensor, norm: str = "l2", scores: Tensor | None = None) -> Tensor:
    """rho_k (B, E): the distance at which each expert can overtake the first choice; `route_radii`, differentiable.

    (g_i - g_k) / ||W_i - W_k||_dual for the first choice i: exact for affine routers, in float32 and without outward
    rounding, with gradients into the router's weight and bias and the images. 0 for the first choice itself.

    Args:
        moe: Mixture of E >= 2 experts with a "linear" or "pooled" router.
        images: (B, C, H, W) in [0, 1].
        norm: "l2", "linf" or "l1".
        scores: (B, E) router logits of the images, where a forward has computed them already.

    Raises:
        NotApplicableError: The router is not affine in the image.
        ValueError: The norm is unknown.
    """
    check_norm(norm)
    scores = moe.route(images) if scores is None else scores
    first = scores.argmax(dim=1)
    constants = gate_constants(moe, norm)[first]
    gaps = scores.gather(1, first[:, None]) - scores
    # 0 / 1 for the first choice itself; experts with equal rows never overtake, and would divide by 0
    return gaps / constants.scatter(1, first[:, None], 1.0).clamp_min(1e-12)


def gate_constants(moe: nn.Module, norm: str = "l2") -> Tensor:
    """||W_i - W_k||_dual (E, E): Lipschitz constants of the router's score differences, differentiable.

    The diagonal is 0; pairs are compared once, since the L2 norm has no gradient at 0.
    """
    check_norm(norm)
    weight = effective_router_weight(moe).flatten(1)
    rows, columns = torch.triu_indices(len(weight), len(weight), offset=1, device=weight.device)
    pairs = dual_norm(weight[rows] - weight[columns], norm)
    constants = weight.new_zeros(len(weight), len(weight)).index_put((rows, columns), pairs)
    return constants + constants.t()


def route_margin_penalty(
    moe: nn.Module, images: Tensor, *, radius: float, norm: str = "l2", scores: Tensor | None = None
) -> Tensor:
    """Mean of relu(radius - rho) / radius, with rho the distance at which the route can change first.

    Args:
        radius: Route radius asked for, > 0, in [0, 1] pixel units.

    Other arguments are those of `route_margins`. Returns a scalar in [0, 1].
    """
    check_positive("radius", radius)
    margins = route_margins(moe, images, norm, scores)
    first = margins.detach().argmin(dim=1)
    nearest = margins.scatter(1, first[:, None], math.inf).amin(dim=1)  # without the first choice, whose margin is 0
    return F.relu(radius - nearest).mean() / radius  # in units of the radius: a weight fits any radius


def gate_lipschitz_penalty(moe: nn.Module) -> Tensor:
    """The largest ||W_i - W_k||_2 over pairs of experts: 4 r_i of the soft-gate theorem is at most this, in L2.

    Scalar >= 0. Alone it shrinks the scores and so makes the gate uniform; it makes sense beside a loss that needs the
    gate, with soft routing. (Under hard routing a common factor of all scores changes no route.)
    """
    return gate_constants(moe).max()


def margin_penalty(logits: Tensor, labels: Tensor, *, radius: float, slope: float) -> Tensor:
    """Mean of relu(radius - min_j (z_y - z_j) / slope) / radius: 0 when every image is certified at `radius`.

    Args:
        logits: (B, C) of a network whose logit margins have Lipschitz constant `slope`.
        labels: (B,) int64.
        radius: Certified radius asked for, > 0.
        slope: > 0, in the norm of the radius; for a 1-Lipschitz backbone `backbone_slope`.
    """
    check_positive("radius", radius)
    return F.relu(radius - label_margins(logits, labels) / check_positive("slope", slope)).mean() / radius


def check_certifiable(model: nn.Module, route_weight: float = 0.0, gate_weight: float = 0.0) -> None:
    """Refuse, before anything is trained, a model for which `certified_loss` would train no certificate.

    Args:
        model: What is to be trained.
        route_weight, gate_weight: As in `certified_loss`.

    Raises:
        ValueError: It is no mixture of 1-Lipschitz backbones, no theorem fits its routing, or a penalty does not.
        ImportError: deel-torchlip, which trains such backbones, is not installed.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind != "robust_moe":
        raise ValueError(f"method='certified' trains a MoEForImageClassification, not a {kind}.")
    if not config.backbone.startswith(LIPSCHITZ):
        raise ValueError(
            "method='certified' needs backbone='lipschitz_mlp' or 'lipschitz_cnn', whose Lipschitz constant is known, "
            f"not backbone={config.backbone!r}."
        )
    if lipschitz_dualmoe.bjorck_normalization is None:
        raise ImportError("method='certified' needs deel-torchlip: pip install deel-torchlip.")
    if config.backbone_image_size not in (None, config.image_size):
        raise ValueError(
            f"backbone_image_size={config.backbone_image_size} resizes images in the model, for which there is no "
            "certificate; method='certified' needs images of their own size."
        )
    weights = {"route_weight": route_weight, "gate_weight": gate_weight}
    asked = [f"{name}={weight!r}" for name, weight in weights.items() if weight > 0]
    if config.num_experts == 1:
        if asked:
            raise ValueError(f"{' and '.join(asked)}: one expert has no routes; needs num_experts >= 2.")
        return
    effective_router_weight(model)  # raises where the router is not affine: no route has a radius then
    if config.router_top_k not in (1, config.num_experts):
        raise ValueError(
            f"router_top_k={config.router_top_k} of num_experts={config.num_experts} has no certificate: use 1 (hard "
            "routing) or all experts."
        )
    wrong, wanted = (
        ("gate_weight", "all experts mixed") if config.router_top_k == 1 else ("route_weight", "hard routing")
    )
    if weights[wrong] > 0:
        raise ValueError(f"{wrong}={weights[wrong]!r} is for {wanted}, not for router_top_k={config.router_top_k}.")


def backbone_slope(moe: nn.Module) -> float:
    """sqrt(2) * logit_scale / min(image_std): how fast logit margins of a 1-Lipschitz backbone may change, in L2.

    Training keeps to it up to a few per cent; a certificate uses a proved constant, see `lipschitz_bound`.

    Raises:
        ValueError: The experts are no 1-Lipschitz backbones.
    """
    config = moe.config
    if not config.backbone.startswith(LIPSCHITZ):
        raise ValueError(f"backbone={config.backbone!r} is no 1-Lipschitz backbone.")
    # a difference of two logits is sqrt(2) as steep as the logits; normalisation divides by the std
    return math.sqrt(2) * config.backbone_kwargs.get("logit_scale", 1.0) / min(config.image_std)


def certified_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    radius: float,
    margin_weight: float = 1.0,
    route_weight: float = 0.0,
    gate_weight: float = 0.0,
    forward: Callable | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """CE(F(x), y) + weighted penalties in L2: an objective of the kind of `losses.standard_loss`, without an attack.

    A network of known Lipschitz constant is certified as far as its logit margins reach, so they are trained, by a
    hinge at the radius asked for (https://arxiv.org/abs/1802.04034, https://arxiv.org/abs/1911.00937) beside
    cross-entropy (as in https://arxiv.org/abs/2108.04062). The penalties of the router are our own.

    Args:
        model: Mixture of experts with an affine router; with one expert the margin term alone is possible.
        images, labels: (B, C, H, W) in [0, 1]; (B,) int64.
        radius: Certified radius asked for, > 0.
        margin_weight: Of `margin_penalty`: logit margins above `backbone_slope` * radius.
        route_weight: Of `route_margin_penalty`: routes that do not change within the radius.
        gate_weight: Of `gate_lipschitz_penalty`; for soft routing.
        forward: What to call for the loss; default `model`. Pass the distributed wrapper here.
        label_smoothing: In [0, 1).
    """
    slope = backbone_slope(model)
    # one pass serves all penalties
    output = (model if forward is None else forward)(images, output_router_logits=True)
    terms = {
        "ce": cross_entropy(output.logits, labels, label_smoothing),
        "aux": output.aux_loss,
        "margin": margin_penalty(output.logits, labels, radius=radius, slope=slope),
    }
    weights = {"ce": 1.0, "aux": model.config.router_aux_loss_coef, "margin": margin_weight}
    if model.config.num_experts > 1 and route_weight > 0:
        terms["route"] = route_margin_penalty(model, images, radius=radius, scores=output.router_logits)
        weights["route"] = route_weight
    if model.config.num_experts > 1 and gate_weight > 0:
        terms["gate"] = gate_lipschitz_penalty(model)
        weights["gate"] = gate_weight
    loss = sum(weights[name] * term for name, term in terms.items())
    return LossOutput(loss=loss, terms={name: term.detach() for name, term in terms.items()})


def label_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """min_j z_y - z_j (B,) from logits (B, C); negative where the image is misclassified."""
    right = logits.float().gather(1, labels[:, None]).squeeze(1)
    return right - logits.float().scatter(1, labels[:, None], -math.inf).amax(dim=1)


def check_positive(name: str, value: float) -> float:
    """The value; a ValueError unless it is a finite number > 0."""
    if not 0 < value < math.inf:  # also false for NaN
        raise ValueError(f"{name}={value!r} must be finite and > 0.")
    return value


__all__ = [
    "backbone_slope",
    "certified_loss",
    "check_certifiable",
    "gate_constants",
    "gate_lipschitz_penalty",
    "margin_penalty",
    "route_margin_penalty",
    "route_margins",
]
