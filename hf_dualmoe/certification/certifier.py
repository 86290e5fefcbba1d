"""Certificates: radii within which no change of an image can change the class, with the theorem that proves each.

    certifier = Certifier(model, norm="l2")  # computes the Lipschitz constants once
    certificates = certifier(images)
    certificates.certified_accuracy(labels, [0.1, 0.25])

What has no theorem is "not applicable", what a theorem cannot show is "abstain"; neither has a number. The proofs are
about the function of real numbers that the weights define; constants are rounded up, margins and radii down, by more
than float32 evaluation is off. So the model is run in full float32, without TF32, and autocast is refused.
`smoothing.py` has the certificates that hold with a stated confidence only.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks.base import percent
from ..attacks.precision import check_no_autocast, full_precision
from ..models.outputs import logits_of
from ..models.parts import at_alpha, has_experts, is_dual, mixes_weights
from .lipschitz import (
    LipschitzBound,
    NotApplicableError,
    chain_bound,
    chain_of,
    check_eval_mode,
    input_shapes,
)
from .margin_floors import Floor, HardGateFloor, NetworkFloor, SoftGateFloor, largest_radius
from .operator_norms import OUTWARD, check_norm
from .route_radii import AffineRouter
from .theorems import weighted

CERTIFIED, ABSTAIN, NOT_APPLICABLE = "certified", "abstain", "not applicable"
PROBABILITY_ERROR = 1e-5  # of a float32 probability margin


@dataclass
class Certificates:
    """Certificates of B images.

    Args:
        prediction: (B,) int64 the model's class for each image; -1 where it has none.
        radius: (B,) float64: the class is the same for all images nearer than this; NaN unless certified.
        status: For each image "certified", "abstain" (no positive radius could be shown) or "not applicable" (there is
            no theorem for this model).
        rule: For each image the theorem that gave the radius; "" unless certified.
        norm: "l2", "linf" or "l1", in [0, 1] pixel units.
        confidence: 1.0 for a proof; below it, the probability with which each radius alone is right.
        reason: Why it is not applicable; "" where it is.
    """

    prediction: Tensor
    radius: Tensor
    status: list[str]
    rule: list[str]
    norm: str
    confidence: float = 1.0
    reason: str = ""

    @classmethod
    def not_applicable(cls, prediction: Tensor, norm: str, reason: str) -> "Certificates":
        """Certificates that claim nothing."""
        count = len(prediction)
        radius = torch.full((count,), math.nan, dtype=torch.float64)
        return cls(prediction.cpu(), radius, [NOT_APPLICABLE] * count, [""] * count, norm, reason=reason)

    @classmethod
    def from_radii(
        cls, prediction: Tensor, radii: dict[str, Tensor], norm: str, confidence: float = 1.0
    ) -> "Certificates":
        """The best of the radii (B,) that several rules give; those that are not positive certify nothing."""
        names = list(radii)
        best, which = torch.stack([radii[name].double().cpu() for name in names]).max(dim=0)
        certified = (best > 0) & torch.isfinite(best)
        return cls(
            prediction.cpu(),
            best.masked_fill(~certified, math.nan),
            [CERTIFIED if good else ABSTAIN for good in certified.tolist()],
            [names[i] if good else "" for i, good in zip(which.tolist(), certified.tolist(), strict=True)],
            norm,
            confidence,
        )

    def certified_at(self, radius: float) -> Tensor:
        """(B,) bool: certified at this radius (>= 0) at least."""
        return self.radius >= radius  # false for NaN

    def certified_accuracy(self, labels: Tensor, radii: Sequence[float]) -> list[float]:
        """Share of images, in %, that are classified rightly and certified at each radius.

        Args:
            labels: (B,) int64.
            radii: Radii > 0 in the units of the norm.
        """
        right = self.prediction == labels.cpu()
        return [percent(right & self.certified_at(radius)) for radius in radii]


# --- whole models ----------------------------------------------------------------------------------------------------


class BoundedModel:
    """A network or mixture of experts with all Lipschitz constants that its certificates need.

    Args:
        model: `MoEForImageClassification`, or any network that `lipschitz_bound` takes, in eval mode.
        norm: "l2", "linf" or "l1".
        shape: (C, H, W) of an image; only for a plain network.

    Raises:
        NotApplicableError: There is no theorem for this model.
    """

    def __init__(self, model: nn.Module, norm: str, shape: tuple[int, int, int] | None = None):
        self.model, self.rule = model, "network"
        self.router: AffineRouter | None = None
        kinds = {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.float64}
        if kinds:
            raise NotApplicableError(f"the model is in {kinds.pop()}; its rounding is covered in float32 only.")
        if not has_experts(model):
            example = next(model.parameters()).new_zeros(1, *shape)
            chain = chain_of(model)
            shapes = input_shapes(model, lambda: logits_of(model, example))
            self.bounds = [chain_bound(chain, norm, shapes, example.numel())]
            return
        config = model.config
        if model.trunk.size is not None:
            raise NotApplicableError(f"backbone_image_size={config.backbone_image_size} resizes images in the model.")
        self.bounds = expert_bounds(model, norm)
        if config.num_experts > 1:
            if config.router_top_k not in (1, config.num_experts):
                raise NotApplicableError(
                    f"router_top_k={config.router_top_k} of {config.num_experts} experts: the gate jumps, so it has "
                    "no Lipschitz constant, and several experts are mixed, so the hard-gate theorem does not apply."
                )
            self.router = AffineRouter(model, norm)
            self.rule = "hard gate" if config.router_top_k == 1 else "soft gate"

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits (B, E, C) of each expert."""
        if has_experts(self.model):
            return self.model.expert_logits(images)[0]
        return logits_of(self.model, images)[:, None]

    def floor(self, images: Tensor, classes: Tensor, scale: float = 1.0) -> Floor:
        """Lower bounds of the margins of `classes` (B,) around images (B, C, H, W), of `scale` times the logits."""
        logits = scale * self.expert_logits(images)
        experts = [
            NetworkFloor(z, classes, b.scaled(scale)) for z, b in zip(logits.unbind(1), self.bounds, strict=True)
        ]
        if self.router is None:
            return experts[0]
        if self.rule == "hard gate":
            return HardGateFloor(self.router.radii(images), experts)
        # constants round up
        return SoftGateFloor(self.router.scores(images), self.router.constants * OUTWARD, experts)


def expert_bounds(moe: nn.Module, norm: str) -> list[LipschitzBound]:
    """Constants of every expert's logits as functions of the image in [0, 1].

    The normalisation (x - mean) / std is a diagonal map, of norm max_c 1 / std_c in every p-norm; a shared trunk is
    the beginning of every expert.
    """
    config = moe.config
    shape = (1, config.num_channels, config.image_size, config.image_size)
    example = moe.normalize.mean.new_zeros(shape)
    shapes = input_shapes(moe, lambda: moe.expert_logits(example)[0])
    shapes["outputs"] = (1, config.num_labels)  # a chain ends in one expert's logits, not in those of all
    normalisation = float((1 / moe.normalize.std.double()).max()) * OUTWARD
    trunk = chain_of(moe.trunk.stages)
    chains = (trunk + chain_of(expert) for expert in moe.experts)
    return [chain_bound(chain, norm, shapes, example.numel()).scaled(normalisation) for chain in chains]


def largest_distance(shape: Sequence[int], norm: str) -> float:
    """The largest distance of two images (C, H, W) with pixels in [0, 1]."""
    count = math.prod(shape)
    return {"l2": math.sqrt(count), "linf": 1.0, "l1": float(count)}[norm]


def check_rule_applies(model: nn.Module) -> None:
    """Raise a NotApplicableError where the way in which a dual model answers rules out certificates."""
    if mixes_weights(model):  # else it was merged
        raise NotApplicableError("the merged network has a normalisation of its own outside the model.")
    if is_dual(model) and model.config.mixing != "probs":
        raise NotApplicableError(f"mixing={model.config.mixing!r}: the dual rule bounds mixed probabilities.")


class Certifier:
    """Certifies images of one model, deterministically: every radius is a proof.

    Rules: "network" (one network: logit margins over their Lipschitz constants), "hard gate" (`hard_gate_radius`),
    "soft gate" (the better of the margin theorem and the gate box, see `SoftGateFloor`), "dual over ..." (F_R's
    probability margins stay above (1 - alpha) / alpha) and "joint with ..." (F_S's margins are bounded too). All work
    with the floors of `margin_floors.py`: softmax probabilities are monotone in the logit margins, so floors of these
    give better radii than a Lipschitz constant of the probabilities (`dual_radius`).

    Args:
        model: Dual model, mixture of experts, or any network that `lipschitz_bound` takes, in eval mode. With a dial
            in the weights, the network merged at its alpha when the certifier is made.
        norm: "l2", "linf" or "l1", in [0, 1] pixel units.
        shape: (C, H, W) of an image; only needed for a plain network.

    Attributes:
        reason: Why certificates are not applicable to the model; "" where they are.

    Raises:
        ValueError: The model is in train mode, the norm is unknown, `shape` is missing, or autocast is on.
    """

    def __init__(self, model: nn.Module, norm: str = "l2", shape: tuple[int, int, int] | None = None):
        check_norm(norm)
        check_eval_mode(model)
        check_no_autocast()
        if mixes_weights(model) and isinstance(model.normalize_robust, nn.Identity):
            model = model.merge()  # a plain network from here on
        self.model, self.norm = model, norm
        self.dual, self.reason = is_dual(model), ""
        part = model.robust if self.dual else model
        if shape is None:
            if not has_experts(part):
                raise ValueError("shape=None: give the shape (C, H, W) of an image for a network that is no mixture.")
            shape = (part.config.num_channels, part.config.image_size, part.config.image_size)
        self.limit = largest_distance(shape, norm)  # images in [0, 1] are nowhere farther apart
        self.robust = self.standard = None
        with full_precision():
            try:
                self._bound(part, shape)
            except NotApplicableError as error:
                self.reason = str(error)

    def _bound(self, part: nn.Module, shape: tuple[int, int, int]) -> None:
        """Compute the constants of F_R, or of a model without a dial, and of F_S where it has any."""
        model = self.model
        check_rule_applies(model)
        self.robust = BoundedModel(part, self.norm, shape)
        self.scales = {n: self._scale(n) for n in (("robust", "standard") if self.dual else ())}
        if not self.dual:
            return
        if self.scales["robust"] is None:
            raise NotApplicableError("robust_logit_map changes more than the scale of F_R's logits.")
        if not isinstance(model.normalize_robust, nn.Identity):
            raise NotApplicableError("F_R has a normalisation of its own outside the model.")
        if self.scales["standard"] is not None and isinstance(model.normalize_standard, nn.Identity):
            with suppress(NotApplicableError):  # the dual rule needs nothing of F_S
                self.standard = BoundedModel(model.standard, self.norm, shape)

    def _scale(self, name: str) -> float | None:
        """The factor of a component's logits before mixing; None where its map is no factor."""
        logit_map = getattr(self.model.config, f"{name}_logit_map") or {}
        return None if set(logit_map) - {"scale"} else float(logit_map.get("scale", 1.0))

    @torch.no_grad()
    def __call__(self, images: Tensor, alpha: float | None = None) -> Certificates:
        """Certify the model's own classes.

        Args:
            images: (B, C, H, W) floats in [0, 1].
            alpha: Weight of F_R of a dual model; None = the config's. At alpha <= 1/2 only the joint rule applies.

        Raises:
            ValueError: The model was put in train mode, autocast is on, or alpha is out of range or given to a model
                without a dial.
        """
        check_eval_mode(self.model)
        check_no_autocast()
        if alpha is not None and not self.dual:
            raise ValueError(
                f"alpha={alpha!r} was given, but the model has no dial; with a dial in the weights each position is a "
                "network of its own: certify model.merge(alpha)."
            )
        with full_precision():
            return self._certify(images, alpha)

    def _certify(self, images: Tensor, alpha: float | None) -> Certificates:
        if not self.dual:
            prediction = logits_of(self.model, images).argmax(dim=1)
            if self.reason:
                return Certificates.not_applicable(prediction, self.norm, self.reason)
            return self._single(prediction, images)
        alpha = self.model.config.alpha if alpha is None else alpha
        prediction = self.model(images, alpha=alpha).logits.argmax(dim=1)
        reason = self.reason
        if not reason and alpha <= 0.5 and self.standard is None:
            reason = f"alpha={alpha!r}: the dual rule needs alpha > 1/2, and F_S has no bound of its own."
        if reason:
            return Certificates.not_applicable(prediction, self.norm, reason)
        robust = self.robust.floor(images, prediction, self.scales["robust"])
        standard = None
        if self.standard is not None:
            standard = self.standard.floor(images, prediction, self.scales["standard"])
        return self._dual(prediction, images, alpha, robust, standard)

    def _dual(
        self, prediction: Tensor, images: Tensor, alpha: float, robust: Floor, standard: Floor | None
    ) -> Certificates:
        def mixed(radius: Tensor, joint: bool) -> Tensor:
            # without a bound F_S may be as wrong as probabilities can be: margins of -1
            others = weighted(1 - alpha, standard(radius).clamp_min(-1)) if joint else alpha - 1
            return (others + weighted(alpha, robust(radius)) > PROBABILITY_ERROR).all(dim=1)

        batch = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        rules = {}
        if alpha > 0.5:
            name = f"dual over {self.robust.rule}"
            # radii round down
            rules[name] = largest_radius(lambda radius: mixed(radius, False), self.limit, batch) / OUTWARD
        if standard is not None:
            name = f"joint with {self.standard.rule}, {self.robust.rule}"
            rules[name] = largest_radius(lambda radius: mixed(radius, True), self.limit, batch) / OUTWARD
        return Certificates.from_radii(prediction, rules, self.norm)

    def _single(self, prediction: Tensor, images: Tensor) -> Certificates:
        rule, floor = self.robust.rule, self.robust.floor(images, prediction)
        slack = PROBABILITY_ERROR if rule == "soft gate" else 0.0  # that of logits is in the floors already
        batch = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        radius = largest_radius(lambda r: (floor(r) > slack).all(dim=1), self.limit, batch) / OUTWARD
        return Certificates.from_radii(prediction, {rule: radius}, self.norm)


def certify(model: nn.Module, images: Tensor, *, norm: str = "l2", alpha: float | None = None) -> Certificates:
    """Certify one batch; see `Certifier`, which keeps the Lipschitz constants for further batches.

    Args:
        model: Dual model, mixture of experts, or a plain network, in eval mode.
        images: (B, C, H, W) floats in [0, 1].
        norm: "l2", "linf" or "l1".
        alpha: Weight of F_R of a dual model; None = the config's.

    Raises:
        ValueError: The model is in train mode, or an argument is out of range.
    """
    if alpha is not None and mixes_weights(model):
        model, alpha = at_alpha(model, alpha), None
    return Certifier(model, norm, tuple(images.shape[1:]))(images, alpha)


__all__ = ["Certificates", "Certifier", "certify"]
