"""What all attacks share: the call, the frozen model, the checks of arguments.

Images are floats in [0, 1], radii are in the same units. `model` is any callable from images to logits, or to
something in which `logits_of` finds them: an output of transformers, a dictionary, a tuple.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn

from ..models.inputs_dualmoe import values_are_trusted
from .folding import folded

NORMS = ("linf", "l2")
RANGE_TOLERANCE = 1e-5  # x * (1 / 255) rounds to just above 1

Classifier = Callable[[Tensor], object]


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


@contextmanager
def frozen(model: Classifier, *, seed: int | None = None) -> Iterator[None]:
    """Freeze a model while it is attacked: eval mode and no parameter gradients.

    Every train/eval flag and every `requires_grad` comes back on exit, also after an exception. BatchNorm statistics
    stay, `.grad` stays, and without weight gradients an attack is about a third cheaper. Weights that FSDP has
    spread over processes are gathered first and stay gathered: FSDP would spread them after each gradient of an
    attack, and gather them with their gradients on.

    Args:
        model: Model to freeze; a callable that is no `nn.Module` is left alone.
        seed: Seeds the global random number generators within the block and restores them on exit; None draws from
            them as they are, so that training resumes exactly.
    """
    gather_weights(model)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]  # each its own: model.train() would wake frozen parts
    needs_grad = [parameter for parameter in parameters if parameter.requires_grad]
    devices = list({p.device for p in parameters if p.is_cuda})  # else fork_rng copies the state of every GPU
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


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a ValueError unless the argument `name` has one of the `allowed` values."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


def check_eps(eps: float | Tensor, norm: str, shape: Sequence[int] = (), name: str = "eps") -> None:
    """Refuse what is no radius in [0, 1] pixel units.

    Args:
        eps: Radius.
        norm: "linf" or "l2".
        shape: Of one image; () = not known.
        name: What the radius is called.

    Raises:
        ValueError: There is no such norm, eps is not finite or below 0, or no two images are so far apart.
    """
    check_choice("norm", norm, NORMS)
    if isinstance(eps, Tensor) and eps.ndim == 0:  # of a step that is captured; its number was checked before
        return
    # a bool is a Real: eps=True would be radius 1
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps < float("inf"):  # also false for NaN
        raise ValueError(f"{name}={eps!r} must be a finite radius >= 0 in [0, 1] pixel units.")
    if norm == "linf" and eps > 1:
        raise ValueError(f"{name}={eps!r} is larger than the whole pixel range [0, 1]; did you mean {eps:g}/255?")
    if norm == "l2" and shape and eps > (furthest := math.sqrt(math.prod(shape))):
        raise ValueError(
            f"{name}={eps!r} is larger than {furthest:.3g}, the L2 distance of black and white, which no two images "
            f"of {' x '.join(map(str, shape))} exceed; radii count in [0, 1] pixel units: did you mean {eps:g}/255?"
        )


def check_alphas(alphas: Sequence[float]) -> None:
    """Raise a ValueError unless there are positions of the dial and all lie in [0, 1]."""
    if len(alphas) == 0 or not all(0 <= alpha <= 1 for alpha in alphas):
        raise ValueError(f"alphas={list(alphas)!r} must hold at least one value, each in [0, 1].")


def check_counts(counts: Mapping[str, int | None]) -> None:
    """Raise a ValueError that names the first argument that is no integer of at least 1; None = it was not given."""
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
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
    # values are read below, and to read them is to wait for the device
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


# --- images and results ----------------------------------------------------------------------------------------------


def numbered(ids: Tensor | None, labels: Tensor) -> Tensor:
    """The numbers (N,) int64 of the images in their dataset, on the CPU; None = 0 .. N-1.

    Raises:
        ValueError: There is not one number per label (N,).
    """
    if ids is None:
        return torch.arange(len(labels))
    if ids.shape != labels.shape:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected one number per image, ({len(labels)},).")
    return ids.cpu()


def device_of(model: Classifier, default: torch.device | str = "cpu") -> torch.device:
    """Device of a model's parameters; `default` where it has none."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device(default) if parameter is None else parameter.device


def percent(mask: Tensor) -> float:
    """Share of true entries, in %; NaN where there are no entries."""
    return 100 * share(mask)


def share(mask: Tensor) -> float:
    """Share of true entries, in [0, 1], without the rounding of float32; NaN where there are no entries."""
    return int(mask.sum()) / mask.numel() if mask.numel() else math.nan


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64
