"""Fold BatchNorm into the convolutions before it while a model is held still: the same function in fewer operations.

    with frozen(model), folded(model, images):
        attacked = ...

In eval mode BatchNorm is one scale and one shift per channel, which the convolution can apply itself. An attack runs
tens of passes on frozen weights, so folding them once makes every pass cheaper; results agree up to rounding.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .outputs import find_logits

PROBE_IMAGES = 2
TOLERANCE = 1e-3  # of the largest output; folding rounds at 1e-6

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]

_pairs_of: "WeakKeyDictionary[nn.Module, list[Pair]]" = WeakKeyDictionary()


@contextmanager
def folded(model: object, images: Tensor) -> Iterator[None]:
    """Hold a model's BatchNorm layers folded into the convolutions before them.

    Only pairs in eval mode, in single precision and without hooks or subclasses of their own are folded; the modules
    come back as they were, also after an exception. Nothing is done to a callable that is no `nn.Module`, to a
    compiled model (which would compile anew), or where a trial on the first images shows another function.

    Args:
        model: Classifier in eval mode without parameter gradients, as `frozen` makes it.
        images: (B, ...) input for the trial, which is made once per model.
    """
    pairs = foldable_pairs(model, images) if isinstance(model, nn.Module) else []
    with _applied(pairs):
        yield


def foldable_pairs(model: nn.Module, images: Tensor) -> list[Pair]:
    """The (convolution, BatchNorm) pairs of a model that data really flows through one after the other."""
    while hasattr(model, "counted_model"):
        model = model.counted_model  # its passes are not those of the attack
    if not isinstance(model, nn.Module) or not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return []
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        return []
    if model not in _pairs_of:
        devices = list({p.device for p in model.parameters() if p.is_cuda})
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            names = _find_pairs(_structural_copy(model), images[:PROBE_IMAGES].detach().clone())
            _pairs_of[model] = [(model.get_submodule(conv), model.get_submodule(norm)) for conv, norm in names]
    return _pairs_of[model]


def _structural_copy(model: nn.Module) -> nn.Module:
    """Modules of their own with the same tensors and without hooks, so that nobody notices the trial.

    An `nn.Identity` where a model cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        twin = copy.deepcopy(model, shared)
    except (RuntimeError, TypeError):  # it holds a tensor with a history, an open file, ...
        return nn.Identity()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _find_pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of pairs, found by following outputs of convolutions; [] where folding changes what the model does."""
    sources, pairs, kept = {}, {}, []
    names = {module: name for name, module in model.named_modules()}

    def note_output(conv: nn.Module, _: tuple, output: Tensor) -> None:
        kept.append(output)  # else its id could be given again
        sources[id(output)] = conv

    def note_input(norm: nn.Module, inputs: tuple) -> None:
        conv = sources.get(id(inputs[0]))
        pairs[norm] = conv if pairs.get(norm, conv) is conv else None  # None: it follows several

    handles = [m.register_forward_hook(note_output) for m in names if type(m) is nn.Conv2d]
    handles += [m.register_forward_pre_hook(note_input) for m in names if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
    expected = _all_outputs(model, images)
    for handle in handles:
        handle.remove()
    convs = list(pairs.values())
    found = [(conv, norm) for norm, conv in pairs.items() if conv is not None and convs.count(conv) == 1]
    with _applied(found):
        outputs = _all_outputs(model, images)
    # comparisons with NaN are false, so that a broken model is left alone
    same = all((a - b).abs().max() <= TOLERANCE * a.abs().max() for a, b in zip(expected, outputs, strict=True))
    return [(names[conv], names[norm]) for conv, norm in found] if same else []


def _all_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits of the model on images (B, ...), and of all experts of every mixture in it, also those not chosen."""
    mixtures = [m for m in model.modules() if hasattr(m, "expert_logits")]
    inputs: dict[nn.Module, Tensor] = {}

    def note(mixture: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs[mixture] = args[0] if args else kwargs["pixel_values"]

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in mixtures if m is not model]
    try:
        output = model.forward(images)  # not model(images): hooks that count passes are not for this one
    finally:
        for handle in handles:
            handle.remove()
    if model in mixtures:
        inputs[model] = images
    return [find_logits(output)] + [mixture.expert_logits(pixels)[0] for mixture, pixels in inputs.items()]


def _has_no_hooks(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks)


def _can_fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    plain = all(type(p) is nn.Parameter for p in conv.parameters()) and conv.weight.dtype == torch.float32
    held = not norm.training and norm.running_mean is not None and "forward" not in norm.__dict__
    return plain and held and not conv.weight.is_meta and _has_no_hooks(conv) and _has_no_hooks(norm)


def _folded_weights(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (channels last, which convolutions take over for all that follows) and bias of both in one."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias
    weight = conv.weight * scale[:, None, None, None]
    return weight.contiguous(memory_format=torch.channels_last), bias


def _rest_of(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """What a BatchNorm layer still does once it is folded: nothing, or timm's activation."""
    return (lambda x: norm.act(norm.drop(x))) if isinstance(norm, BatchNormAct2d) else (lambda x: x)


@contextmanager
def _applied(pairs: list[Pair]) -> Iterator[None]:
    """Swap the folded weights in, and the parameters back on exit."""
    taken = []
    try:
        with torch.no_grad():
            for conv, norm in pairs:
                if _can_fold(conv, norm):
                    taken.append((conv, norm, conv.weight, conv.bias))
                    conv._parameters["weight"], conv._parameters["bias"] = _folded_weights(conv, norm)
                    norm.forward = _rest_of(norm)
        yield
    finally:
        for conv, norm, weight, bias in taken:
            conv._parameters["weight"], conv._parameters["bias"] = weight, bias
            norm.__dict__.pop("forward", None)


__all__ = ["foldable_pairs", "folded"]
