"""The dial in the outputs: F_D(x) = (1 - alpha) F_S(x) + alpha F_R(x), from the logits of both.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs_dualmoe import values_are_trusted


def apply_logit_map(logits: Tensor, logit_map: dict[str, float] | None) -> Tensor:
    """Calibrate logits (B, C) before mixing: scale * relu(layer_norm(z) + clamp) ** power (MixedNUTS, Eq. 6).

    Without "clamp" the logits are neither layer-normalised nor rectified; `power` then keeps their sign. The result of
    a map is float32: powers overflow in half precision.
    """
    if logit_map is None:
        return logits
    logits = logits.float()
    if "clamp" in logit_map:
        logits = F.relu(F.layer_norm(logits, logits.shape[-1:]) + logit_map["clamp"])
    if logit_map.get("power", 1.0) != 1.0:
        logits = logits.sign() * logits.abs().clamp_min(1e-6).pow(logit_map["power"])
    return logit_map.get("scale", 1.0) * logits


def mix_logits(standard_logits: Tensor, robust_logits: Tensor, alpha: float | Tensor, mixing: str = "probs") -> Tensor:
    """F_D = (1 - alpha) F_S + alpha F_R, from the logits (B, C) of both.

    Args:
        standard_logits: (B, C) logits of F_S.
        robust_logits: (B, C) logits of F_R.
        alpha: Weight of F_R in [0, 1]; a number, or a tensor that broadcasts against (B, 1).
        mixing: "probs" (returns log-probabilities, computed in log space) or "logits".

    Returns:
        (B, C) float32.

    Raises:
        ValueError: `mixing` mixes no outputs.
    """
    if mixing not in ("probs", "logits"):
        raise ValueError(f"mixing={mixing!r} mixes no outputs; expected 'probs' or 'logits'.")
    standard_logits, robust_logits = standard_logits.float(), robust_logits.float()
    if isinstance(alpha, Tensor):
        alpha = alpha.to(robust_logits)
    else:  # made on the device: to copy a number there is to wait
        alpha = torch.full((), alpha, dtype=torch.float32, device=robust_logits.device)
    if mixing == "logits":
        return (1 - alpha) * standard_logits + alpha * robust_logits
    log_standard, log_robust = standard_logits.log_softmax(dim=1), robust_logits.log_softmax(dim=1)
    return torch.logaddexp((1 - alpha).log() + log_standard, alpha.log() + log_robust)  # log(0) = -inf drops a part


def check_alpha(alpha: float | Tensor) -> None:
    """Raise a ValueError unless alpha is a number, or a tensor of numbers, in [0, 1]."""
    if isinstance(alpha, Tensor) and values_are_trusted():
        return
    if isinstance(alpha, bool) or not isinstance(alpha, (Tensor, numbers.Real)):
        raise ValueError(f"alpha has type {type(alpha).__name__}; it must be a number in [0, 1], or a tensor of them.")
    if not isinstance(alpha, Tensor):  # torch.compile would break its graph at a tensor's values
        if not 0 <= alpha <= 1:  # also false for NaN
            raise ValueError(f"alpha={alpha!r} must be in [0, 1].")
        return
    alpha_values = alpha.detach()
    if alpha_values.numel() == 0 or alpha_values.is_complex():
        raise ValueError(f"alpha has shape {tuple(alpha_values.shape)} and dtype {alpha_values.dtype}.")
    low, high = (float(v) for v in torch.aminmax(alpha_values))
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ValueError(f"alpha has values in [{low:.4g}, {high:.4g}]; they must be in [0, 1].")


__all__ = ["apply_logit_map", "mix_logits"]
