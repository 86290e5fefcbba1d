"""The sanity checks of AutoAttack (Croce & Hein 2020, https://arxiv.org/abs/2003.01690, and its public code).

A raised flag says that gradient attacks on this model, and so its robust accuracy, cannot be trusted.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.outputs import logits_of
from .apgd import PassCounter
from .base import Classifier, check_logits
from .steps import ce_objective

RANDOM_TOLERANCE = 1e-4  # in units of the range of the logits; above what hardware does to equal inputs
ZERO_GRADIENT_SHARE = 0.1  # of the correctly classified probe images
SQUARE_SHARE = 0.01  # of all images, and at least two of them


class NoGradientError(ValueError):
    """A model's output does not depend on its images in a way that can be differentiated."""


@dataclass(frozen=True)
class Flag:
    """One sanity check: whether it was raised, and the numbers behind it in words."""

    raised: bool
    message: str


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # NumPy has no bfloat16
    return found.hexdigest()


def weights_digest(model: Classifier) -> str:
    """Digest of all parameters and buffers; empty for a callable that is no module."""
    if not isinstance(model, nn.Module):
        return ""
    return digest({**dict(model.named_parameters()), **dict(model.named_buffers())})


def probe_model(model: PassCounter, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Flag]]:
    """Look at a model on a few images before they are attacked.

    Args:
        model: Classifier in eval mode without parameter gradients (`frozen`).
        images: (B, C, H, W) floats in [0, 1].
        labels: (B,) int64.

    Returns:
        Logits (B, C) on the CPU, and the flags that need no attack.

    Raises:
        ValueError: Labels and logits do not go together, or (`NoGradientError`) no gradient flows from the logits to
            the images.
    """
    graph = []  # stays empty under no_grad, unless the model turns gradients on by itself

    def note(tensor: Tensor) -> Tensor:
        graph.append(tensor.shape)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits, *others = [model(images) for _ in range(4)]
    check_logits(logits, labels)
    difference = max((other - logits).abs().max().item() for other in others)
    probable = bool((logits >= 0).all() and ((logits.sum(dim=1) - 1).abs() < 1e-3).all())
    found = ["it computes gradients while it predicts"] if graph else []
    found += ["a module puts itself in train mode"] if any(m.training for m in model.modules()) else []
    flags = {
        "random_output": Flag(
            difference > rounding(logits), f"predictions of the same images differ by up to {difference:.3g}"
        ),
        "probability_output": Flag(
            probable,
            f"outputs {'are' if probable else 'are not'} probabilities (expected: logits or log-probabilities)",
        ),
        "zero_gradients": _gradient_flag(model, images, labels),
        "changing_model": Flag(bool(found), " and ".join(found) or "parameters and buffers stayed the same"),
    }
    return logits.cpu(), flags


def gradient_counts(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, int]:
    """Count the images whose cross-entropy gradients are of no use to an attack.

    Args:
        model: Classifier in eval mode.
        images: (B, C, H, W) floats in [0, 1].
        labels: (B,) int64.

    Returns:
        "correct": images classified correctly, and of these "zero": whose input gradient is all zero or not finite,
        and "saturated": whose loss is exactly 0, since the probability of their class rounds to 1.

    Raises:
        NoGradientError: No gradient flows from the logits to the images.
    """
    images = images.detach().requires_grad_(True)  # a leaf of its own, since the caller's may be part of a graph
    with torch.enable_grad():
        logits = logits_of(model, images)
        losses = ce_objective(logits, labels)
        total = losses.sum()
    gradient = torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise NoGradientError(
            "no gradient flows from the model's output to its images; only Square can attack such a model."
        )
    correct = logits.argmax(dim=1) == labels
    gradient = gradient[correct].flatten(1)
    useless = int(((gradient == 0) | ~torch.isfinite(gradient)).all(dim=1).sum())
    return {"correct": len(gradient), "zero": useless, "saturated": int((losses[correct] == 0).sum())}


def _gradient_flag(model: PassCounter, images: Tensor, labels: Tensor) -> Flag:
    counts = gradient_counts(model, images, labels)
    raised = counts["zero"] > ZERO_GRADIENT_SHARE * counts["correct"]
    return Flag(raised, f"{counts['zero']} of {counts['correct']} cross-entropy gradients are zero or not finite")


def square_flag(accuracy: dict[str, float], count: int) -> Flag:
    """Square may find what gradients missed in no more than 1 % of the images, or in one image.

    Args:
        accuracy: Share of the images that stand after each attack, in [0, 1]; "square" is not the first of them.
        count: Number of images.
    """
    names = list(accuracy)
    after = accuracy["square"]
    before = accuracy[names[names.index("square") - 1]]  # after all gradient attacks: Square runs last
    found = round((before - after) * count)
    raised = found >= 2 and found > SQUARE_SHARE * count  # one image may be luck
    return Flag(raised, f"Square broke {found} of {count} images that the gradient attacks had left standing")


def rounding(logits: Tensor) -> float:
    """The largest difference between two predictions (B, C) of the same images that rounding explains."""
    return RANDOM_TOLERANCE * max((logits.max() - logits.min()).item(), 1e-12)


__all__ = ["Flag", "NoGradientError", "gradient_counts", "probe_model", "square_flag", "weights_digest"]
