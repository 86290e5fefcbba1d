"""The small parts that every attack is composed of: freezing, starting, stepping, projecting, objectives.

Images are floats in [0, 1] and radii count in the same units. `model` is any callable from images to logits, or to
what `logits_of` finds them in: an output of transformers, a dictionary, a tuple.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.inputs_dualmoe import values_are_trusted
from ..models.outputs import logits_of
from .folding import folded

NORMS = ("linf", "l2")
RANGE_TOLERANCE = 1e-5  # x * (1 / 255) rounds to just above 1
NO_GRADIENT = (
    "model gives no gradient of its logits with respect to the images: somewhere it leaves autograd (no_grad or "
    "inference_mode, detach, integers, NumPy). This attack needs one; Square does not."
)

Classifier = Callable[[Tensor], object]
Objective = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def sharded_modules(model: Classifier) -> list[nn.Module]:
    """The modules whose weights FSDP (`torch.distributed.fsdp.fully_shard`) has spread over processes."""
    modules = model.modules() if isinstance(model, nn.Module) else []
    return [module for module in modules if hasattr(module, "unshard")]


def gather_weights(model: Classifier) -> None:
    """Gather the weights that FSDP has spread over processes; nothing without it.

    An attack also calls parts of the model alone, such as its router, where FSDP itself would not gather them.
    """
    for module in sharded_modules(model):
        module.unshard()


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


@contextmanager
def frozen(model: Classifier, *, seed: int | None = None) -> Iterator[None]:
    """Hold a model still while it is attacked: eval mode and no parameter gradients.

    Every module's own train/eval flag and every parameter's `requires_grad` come back on exit, also after an
    exception.
    BatchNorm statistics do not move in eval mode, and `.grad` is not written since nothing requires it; not computing
    weight gradients also makes an attack about a third cheaper.
    Weights that FSDP has spread over processes are gathered before, see `gather_weights`, and stay so: FSDP would
    spread them after each gradient of an attack, and gather them with their gradients on.

    Args:
        model: Model to hold; a callable that is no `nn.Module` is left alone.
        seed: Seed the global random number generators for the block and put their state back on exit; None = draw from
            them as they are, so that training resumes exactly.
    """
    gather_weights(model)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    needs_grad = [parameter for parameter in parameters if parameter.requires_grad]
    devices = list({p.device for p in parameters if p.is_cuda})
    spread = sharded_modules(model) if needs_grad else []  # not again within another `frozen`
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for module in modules:
                module.training = False
            for parameter in needs_grad:
                parameter.requires_grad_(False)
            for module in spread:
                module.set_reshard_after_backward(False, recurse=False)
            yield
        finally:
            for module in spread:
                module.set_reshard_after_backward(True, recurse=False)
            for module, mode in modes:
                module.training = mode
            for parameter in needs_grad:
                parameter.requires_grad_(True)


class Attack:
    """The call that all attacks share; a subclass says in `_attack` how, and in its docstring what comes back."""

    folds_batchnorm = True  # pays from the second pass on

    def __call__(self, model: Classifier, images: Tensor, labels: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """Attack images; the model comes back as it was.

        Args:
            model: Callable from images to logits (B, C), or to what `logits_of` finds them in.
            images: (B, ...) floats in [0, 1].
            labels: (B,) int64, the right classes.
            ids: (B,) int64 numbers of the images in their dataset, which seed their random numbers; None = 0 .. B-1.

        Returns:
            Attacked images like `images`, detached: inside the ball and inside [0, 1].

        Raises:
            ValueError: Images or labels have the wrong shape, dtype or values, or do not suit the attack. Within
                `trusted_values` nobody looks at the values.
        """
        check_batch(images, labels)
        held = folded(model if self.folds_batchnorm else None, images)
        with torch.inference_mode(False), torch.no_grad(), frozen(model), held:
            # clones leave inference mode, if it was on
            return self._attack(model, images.detach().clone(), labels.clone(), ids)

    def _attack(self, model: Classifier, images: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        """Attack a copy of the images, under `no_grad` and with the model frozen."""
        raise NotImplementedError(f"{type(self).__name__} has no _attack.")


# --- checks ----------------------------------------------------------------------------------------------------------


def check_eps(eps: float | Tensor, norm: str) -> None:
    """Raise a ValueError unless `eps` is a radius of `norm` in [0, 1] pixel units."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not one of {', '.join(map(repr, NORMS))}.")
    if isinstance(eps, Tensor) and eps.ndim == 0:  # of a step that is captured; its number was checked before
        return
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps < float("inf"):  # also false for NaN
        raise ValueError(f"eps={eps!r} must be a finite radius >= 0 in [0, 1] pixel units.")
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps={eps!r} is larger than the whole pixel range [0, 1]; did you mean {eps:g}/255?")


def check_objective(objective: str, allowed: Iterable[str]) -> None:
    """Raise a ValueError unless `objective` is one of the `allowed` names."""
    if not isinstance(objective, str) or objective not in allowed:
        raise ValueError(f"objective={objective!r} is not one of {', '.join(map(repr, allowed))}.")


def check_effort(**counts: int) -> None:
    """Raise a ValueError that names the first argument that is no integer of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}={count!r} must be an integer of at least 1.")


def check_seed(seed: int | None) -> None:
    """Raise a ValueError unless `seed` is an integer or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed={seed!r} must be an integer.")


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Refuse images that are not finite floats in [0, 1], or labels that do not go with them.

    Raises:
        ValueError: Shape, dtype or values are wrong; the message names what is allowed.
    """
    if images.ndim < 2 or not images.is_floating_point() or len(images) == 0:
        raise ValueError(
            f"images has shape {tuple(images.shape)} and dtype {images.dtype}; expected a non-empty float batch."
        )
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; expected ({len(images)},) and int64."
        )
    if values_are_trusted():
        return
    low, high = (float(v) for v in torch.aminmax(images))
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # also false for NaN
        raise ValueError(f"images lie in [{low:.4g}, {high:.4g}]; expected finite values in [0, 1].")


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits that are not (B, C) and finite, or labels outside [0, C).

    Raises:
        ValueError: As above; one check of the clean logits per attack call.
    """
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"model returned logits of shape {tuple(logits.shape)}; expected ({len(labels)}, classes).")
    check_label_range(labels, logits.shape[1])
    if not values_are_trusted() and not torch.isfinite(logits).all():
        raise ValueError("model returned logits that are NaN or infinite on clean images.")


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Raise a ValueError unless all labels lie in [0, num_classes)."""
    if values_are_trusted():
        return
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels lie in [{low}, {high}]; expected values in [0, {num_classes}).")


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
        radius = image_noise(one_pixel, seed=None if seed is None else seed + 1, ids=ids, shard=shard)
        radius = radius.flatten().pow(1 / images[0].numel())
        noise = direction / l2_norm(direction).clamp_min(1e-12) * per_image(radius, images) * eps
    return project(images + noise, images, eps, norm)


def project(perturbed: Tensor, images: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """The nearest point of the ball around `images`, then of [0, 1]; the last word on every attacked image.

    Values that are not finite (a gradient overflowed) fall back to the clean pixel.
    """
    wide = torch.promote_types(images.dtype, torch.float32)
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
        return rounded
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
    if norm != "linf" or images.dtype not in (torch.float32, torch.float64):
        return lambda perturbed, gradient: project(perturbed + step_size * steepest(gradient, norm), images, eps, norm)
    low, high = (images - eps).clamp_min(0), (images + eps).clamp_max(1)

    def step(perturbed: Tensor, gradient: Tensor) -> Tensor:
        direction = gradient.sign().nan_to_num_(0)
        if isinstance(step_size, Tensor):
            return (perturbed + step_size * direction).clamp_(low, high)
        return torch.add(perturbed, direction, alpha=step_size).clamp_(low, high)

    return step


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The unit step that raises the objective most: sign(g) for L-inf, g / ||g|| for L2; zero where g is zero."""
    if norm == "linf":
        return gradient.sign()
    largest = per_image(gradient.flatten(1).abs().amax(dim=1), gradient)
    scaled = gradient / largest.where(largest > 0, 1)  # a confident model's gradients are so small that squares vanish
    return scaled / l2_norm(scaled).clamp_min(1)


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
        leaf = logits.detach().requires_grad_(True)
        value = objective(leaf, labels, reference)
        slope = torch.autograd.grad(value.sum(), leaf)[0]
        size = slope.abs().view(len(slope), -1).amax(dim=1)  # logits may be (B,): some surrogates have one value
        usable = torch.isfinite(size) & (size > 0)
        exponent = torch.frexp(size.where(usable, torch.ones_like(size))).exponent.clamp(-100, 100)
        scaled = torch.ldexp(slope, per_image(-exponent, slope))
        gradient = torch.autograd.grad(logits, perturbed, scaled, allow_unused=True)[0]
        if gradient is None:  # the logits depend on parameters that want gradients, and not on the images
            raise ValueError(NO_GRADIENT)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return torch.ldexp(gradient, per_image(exponent, gradient)), logits.detach(), value.detach()


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
