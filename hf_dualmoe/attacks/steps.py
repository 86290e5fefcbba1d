"""Building blocks of gradient attacks: noise, starts, projections, steps, objectives, gradients."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.outputs import logits_of
from .base import Classifier, check_label_range

NO_GRADIENT = (
    "model gives no gradient of its logits with respect to the images: somewhere it leaves autograd (no_grad or "
    "inference_mode, detach, integers, NumPy). This attack needs one; Square does not."
)
RUN_SEED = 7919  # distance between the seeds of two runs on the same image

Objective = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


# --- geometry --------------------------------------------------------------------------------------------------------


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Reshape (B,) values so that they broadcast against images (B, ...)."""
    return values.view(-1, *[1] * (images.ndim - 1))


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm per image, in a shape that broadcasts against x (B, ...)."""
    return per_image(x.flatten(1).norm(dim=1), x)


def image_noise(
    images: Tensor,
    *,
    normal: bool = False,
    seed: int | None = None,
    ids: Tensor | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Noise like `images`: uniform in [0, 1), or standard normal.

    Args:
        images: (B, ...).
        normal: Standard normal instead of uniform.
        seed: None draws from the global generator of the device (training: part of what a checkpoint restores). A
            number draws for each image from a generator of its own, seeded by `seed` and its id, so that the noise
            depends on neither batch size, order, process nor device.
        ids: (B,) int64 numbers of the images in their dataset; None = 0 .. B-1.
        shard: (rank, processes): without a seed, draw the parts of all processes and keep this one's, so that several
            processes with equal generators do together what one process does (on a CPU to the bit; normal noise where
            a part has a multiple of 16 values). No more than two parts are in memory.
    """
    draw = torch.randn if normal else torch.rand
    if seed is None:
        rank, processes = shard
        noise = images
        for part in range(processes):  # a generator cannot skip: the parts of others are drawn and dropped
            drawn = draw(images.shape, device=images.device, dtype=images.dtype)
            if part == rank:
                noise = drawn
        return noise
    ids = range(len(images)) if ids is None else ids.tolist()
    # ids below a million never meet the generator of another seed; drawn on the CPU, so equal on every device
    noise = [
        draw(images.shape[1:], generator=torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)) for i in ids
    ]
    return torch.stack(noise).to(images)


def random_start(
    images: Tensor,
    eps: float | Tensor,
    norm: str,
    *,
    seed: int | None = None,
    ids: Tensor | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """A point drawn uniformly from the ball of radius eps around each image, clipped to [0, 1].

    Args are those of `image_noise`; returns a tensor like `images`.
    """
    if norm == "linf":
        noise = (2 * image_noise(images, seed=seed, ids=ids, shard=shard) - 1) * eps
    else:  # direction from a normal, length from the d-th root of a uniform
        direction = image_noise(images, normal=True, seed=seed, ids=ids, shard=shard)
        one_pixel = images.flatten(1)[:, :1]
        # another seed, or the length would repeat the direction's first number
        radius = image_noise(one_pixel, seed=None if seed is None else seed + 1, ids=ids, shard=shard)
        radius = radius.flatten().pow(1 / images[0].numel())  # the volume within r grows as r**d
        noise = direction / l2_norm(direction).clamp_min(1e-12) * per_image(radius, images) * eps
    return project(images + noise, images, eps, norm)


def project(perturbed: Tensor, images: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """The nearest point of the ball around `images`, then of [0, 1]; the last word on every attacked image.

    Values that are not finite (a gradient overflowed) fall back to the clean pixel.
    """
    wide = torch.promote_types(images.dtype, torch.float32)  # half precision would round off part of delta
    delta = torch.nan_to_num(perturbed.to(wide) - images.to(wide), nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * (eps / l2_norm(delta).clamp_min(1e-12)).clamp_max(1)
    return round_inwards((images.to(wide) + delta).clamp(0, 1), images)


def round_inwards(perturbed: Tensor, images: Tensor) -> Tensor:
    """Round to the precision of `images`, in half precision always towards `images`: else 2e-3 outside the ball."""
    rounded = perturbed.to(images.dtype)
    if images.dtype not in (torch.float16, torch.bfloat16):
        return rounded  # float32 is off by 6e-8 at most, within the promise of 1e-6
    moved = rounded.float() - images.float()
    excess = moved.abs() > (perturbed - images.float()).abs()
    bits = rounded.view(torch.int16)  # values in [0, 1] are ordered like their bit patterns
    return torch.where(excess, bits - moved.sign().to(torch.int16), bits).view(images.dtype)


def step_in_ball(
    images: Tensor, eps: float | Tensor, norm: str, step_size: float | Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The step of a training attack: (perturbed, gradient), both like `images`, -> the next iterate.

    The L-inf ball within [0, 1] is a box whose bounds are computed once, so a step is four operations. Where a
    gradient is NaN, its pixel stays. Other cases are `steepest` and `project`.
    """
    # L2 is no box, and half precision has to round inwards
    if norm != "linf" or images.dtype not in (torch.float32, torch.float64):
        return lambda perturbed, gradient: project(perturbed + step_size * steepest(gradient, norm), images, eps, norm)
    low, high = (images - eps).clamp_min(0), (images + eps).clamp_max(1)

    def step(perturbed: Tensor, gradient: Tensor) -> Tensor:
        direction = gradient.sign().nan_to_num_(0)
        if isinstance(step_size, Tensor):  # `alpha=` takes a number: to read one from a device is to wait
            return (perturbed + step_size * direction).clamp_(low, high)
        return torch.add(perturbed, direction, alpha=step_size).clamp_(low, high)

    return step


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The unit step that raises the objective most: sign(g) for L-inf, g / ||g|| for L2; zero where g is zero."""
    if norm == "linf":
        return gradient.sign()
    largest = per_image(gradient.flatten(1).abs().amax(dim=1), gradient)
    scaled = gradient / largest.where(largest > 0, 1)  # a confident model's gradients are so small that squares vanish
    return scaled / l2_norm(scaled).clamp_min(1)  # the largest entry is 1, so only a zero gradient is shorter


# --- objectives: what an attack raises, per image --------------------------------------------------------------------


def ce_objective(logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """Cross-entropy (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin_objective(logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """Largest wrong logit minus the right one (B,); > 0 exactly where the image is misclassified."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return wrong - right


def kl_objective(logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence (B,) of the attacked from the clean prediction (TRADES' inner objective)."""
    return F.kl_div(logits.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="none").sum(1)


def checked(objective: Objective) -> Objective:
    """The same objective, after a check that all labels are classes of the model."""

    def check_then_compute(logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
        check_label_range(labels, logits.shape[1])
        return objective(logits, labels, reference)

    return check_then_compute


OBJECTIVES: dict[str, Objective] = {"ce": ce_objective, "margin": margin_objective, "kl": kl_objective}


def value_and_gradient(
    model: Classifier, perturbed: Tensor, labels: Tensor, objective: Objective, reference: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and input-gradient pass.

    Safe in half precision: the gradient of a confident image is tiny and would be flushed to zero on its way through a
    float16 network. So it starts there at a size of about 1, image by image, and gets its own size back at the end;
    both by powers of two, which in single precision changes no bit of a number that is not tiny.

    Args:
        model, perturbed, labels: As for an `Attack`.
        objective, reference: One of `OBJECTIVES`, and its third argument.

    Returns:
        Gradient (B, ...), logits (B, C) and objective (B,), all detached.

    Raises:
        ValueError: The model gives no gradient.
    """
    with torch.enable_grad():
        perturbed = perturbed.detach().requires_grad_(True)
        logits = logits_of(model, perturbed)
        if not logits.requires_grad:
            raise ValueError(NO_GRADIENT)
        leaf = logits.detach().requires_grad_(True)  # stop here, to rescale the slope before the network
        value = objective(leaf, labels, reference)
        slope = torch.autograd.grad(value.sum(), leaf)[0]  # rows do not mix: the sum's gradient is each row's own
        size = slope.abs().view(len(slope), -1).amax(dim=1)  # logits may be (B,): some surrogates have one value
        usable = torch.isfinite(size) & (size > 0)
        # 2**exponent and 2**-exponent must both be float32 numbers
        exponent = size.where(usable, torch.ones_like(size)).log2().floor().int().clamp(-100, 100)
        scaled = torch.ldexp(slope, per_image(-exponent, slope))
        gradient = torch.autograd.grad(logits, perturbed, scaled, allow_unused=True)[0]
        if gradient is None:  # the logits depend on parameters that want gradients, and not on the images
            raise ValueError(NO_GRADIENT)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # its own tiny size fits no float16
    return torch.ldexp(gradient, per_image(exponent, gradient)), logits.detach(), value.detach()


def may_flush_gradients(model: Classifier, images: Tensor) -> bool:
    """Whether gradients may go through float16, where small ones become zero.

    False only where we know better: a module, or a `partial` of one, without float16 in weights and autocast.
    """
    kind = images.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        return True
    while isinstance(model, partial):
        model = model.func
    if not isinstance(model, nn.Module):
        return True
    return any(tensor.dtype == torch.float16 for tensor in (images, *model.parameters(), *model.buffers()))


def input_gradient(
    model: Classifier,
    perturbed: Tensor,
    labels: Tensor,
    objective: Objective,
    reference: Tensor | None = None,
    *,
    rescale: bool = True,
) -> Tensor:
    """The gradient (B, ...) alone, for training.

    Args:
        rescale: Whether small gradients are kept from flushing to zero (see `may_flush_gradients`), as
            `value_and_gradient` always does. Without, a pass has a dozen operations less.

    Other arguments and errors are those of `value_and_gradient`.
    """
    if rescale:
        return value_and_gradient(model, perturbed, labels, objective, reference)[0]
    with torch.enable_grad():
        perturbed = perturbed.detach().requires_grad_(True)
        logits = logits_of(model, perturbed)
        if not logits.requires_grad:
            raise ValueError(NO_GRADIENT)
        value = objective(logits, labels, reference)
        gradient = torch.autograd.grad(value, perturbed, torch.ones_like(value), allow_unused=True)[0]
        if gradient is None:
            raise ValueError(NO_GRADIENT)
    return gradient
