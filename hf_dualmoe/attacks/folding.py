"""Fold BatchNorm into the convolutions before it while a model is frozen: the same function in fewer operations.

    with frozen(model), folded(model, images):
        attacked = ...

In eval mode BatchNorm is one scale and one shift per channel, which the convolution can apply itself. An attack runs
tens of passes on frozen weights, so folding them once makes every pass cheaper; results agree up to rounding. Under
autocast the weights of convolutions and linear layers are cast once as well: autocast keeps its casts only of weights
that require gradients, and would cast them anew in every pass of an attack.

A trial finds what may be folded and cast; its result is kept while the model is built the same way (`flow_key`).
Outside training, every use is compared with the plain model again on a few images.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ..models.inputs_dualmoe import values_are_trusted
from ..models.outputs import find_logits

PROBE_IMAGES = 2
TOLERANCE = 1e-3  # of the largest output; folding rounds at 1e-6
HALF_TOLERANCE = 0.1  # under autocast to a half precision, where the plain model itself rounds at 1e-2
KEPT_TRIALS = 8  # per model: one for each way in which its switches stand
PLAIN = (bool, int, float, str, NoneType)

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


@dataclass
class Holdable:
    """What a trial found in a model.

    Args:
        pairs: Convolutions, and the BatchNorm layers that data really flows into after them.
        casts: Convolutions and linear layers that only ever run under autocast.
    """

    pairs: list[Pair] = field(default_factory=list)
    casts: list[nn.Module] = field(default_factory=list)


_trials: "WeakKeyDictionary[nn.Module, dict[tuple, Holdable]]" = WeakKeyDictionary()
_held: "WeakSet[nn.Module]" = WeakSet()


@contextmanager
def folded(model: object, images: Tensor) -> Iterator[None]:
    """Hold a model's BatchNorm layers folded into the convolutions before them, and its weights in autocast's type.

    Only pairs in eval mode, in single precision and without hooks or subclasses of their own are folded; the modules
    come back as they were, also after an exception. Nothing is done to a callable that is no `nn.Module`, to a model
    that is held already, or where the first images show another function.

    Args:
        model: Classifier in eval mode without parameter gradients, as `frozen` makes it; compiled ones too.
        images: (B, ...) input for the trial.
    """
    model = _plain(model)
    still = model is not None and not any(module.training for module in model.modules())
    if not still or model in _held or not images.is_floating_point():
        yield
        return
    found = _holdable(model, images)
    # the first image and one or two others, since the trial saw only the first PROBE_IMAGES
    if not values_are_trusted() and not _is_same_function(model, found, images[:: max(1, len(images) // 2)]):
        _trials.pop(model, None)
        found = Holdable()
    modules = [module for module in model.modules() if module not in _held]
    with _applied(found, _cast_dtype(images)):
        _held.update(modules)
        try:
            yield
        finally:
            for module in modules:
                _held.discard(module)


def foldable_pairs(model: nn.Module, images: Tensor) -> list[Pair]:
    """The (convolution, BatchNorm) pairs of a model that data really flows through one after the other."""
    model = _plain(model)
    return [] if model is None else _holdable(model, images).pairs


def _plain(model: object) -> nn.Module | None:
    """The module whose passes are those of an attack: without the wrappers that count or compile; None: no module."""
    while hasattr(model, "counted_model") or hasattr(model, "_orig_mod"):
        model = model.counted_model if hasattr(model, "counted_model") else model._orig_mod
    if hasattr(model, "merged_network"):  # with a dial in the weights another network answers
        model = model.merged_network() or model
    return model if isinstance(model, nn.Module) else None


def _cast_dtype(images: Tensor) -> torch.dtype | None:
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _holdable(model: nn.Module, images: Tensor) -> Holdable:
    """The result of a trial, from memory where the model is built as it was then."""
    folds = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if not folds and _cast_dtype(images) is None:
        return Holdable()
    trials = _trials.setdefault(model, {})
    key = (flow_key(model), _cast_dtype(images))
    if key not in trials:
        if len(trials) >= KEPT_TRIALS:  # it counts its own calls, or is never the same twice: leave it alone
            return Holdable()
        trials[key] = _try(model, images)
    return trials[key]


def flow_key(model: nn.Module) -> tuple:
    """A key of how data flows through a model: its modules in order, their types, and their plain attributes.

    It changes with a layer that is replaced or inserted, and with a switch such as that of AdvProp's second BatchNorm.
    It never looks at the device. The comparison outside training covers what it cannot see, such as global variables.
    """
    return tuple((id(module), type(module), _switches(module)) for module in model.modules())


_of_every_module = frozenset(nn.Module().__dict__) - {"training"}


def _switches(module: nn.Module) -> tuple:
    if type(module).__module__.startswith("torch.nn.modules") and "forward" not in module.__dict__:
        return (module.training,)  # they have none
    own = ((name, _plain_value(value)) for name, value in module.__dict__.items() if name not in _of_every_module)
    return (module.training, *own)


def _plain_value(value: Any) -> object:
    """Plain values, small containers of them, and the identity of functions; None for what a model merely keeps."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (tuple, list, set, frozenset, dict)) and len(value) < 32:
        members = tuple(value.items()) if isinstance(value, dict) else tuple((None, member) for member in value)
        return members if all(isinstance(member, PLAIN) for _, member in members) else None
    return id(value) if callable(value) and not isinstance(value, nn.Module) else None


def _try(model: nn.Module, images: Tensor) -> Holdable:
    """Find what may be held, on a copy that nobody else sees."""
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    # a model that draws random numbers must not move the caller's generators
    with torch.no_grad(), torch.random.fork_rng(devices=devices), _eagerly(model):
        twin = _structural_copy(model).eval()  # statistics are shared
        pairs, casts = _find(twin, images[:PROBE_IMAGES].detach().clone())
    named = dict(model.named_modules())
    return Holdable([(named[conv], named[norm]) for conv, norm in pairs], [named[name] for name in casts])


@torch.no_grad()
def _is_same_function(model: nn.Module, found: Holdable, images: Tensor) -> bool:
    """Whether a model that is held still answers as the plain one does; waits for the device."""
    if not (found.pairs or found.casts):
        return True
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    outputs, images = [], images.detach()
    with _without_hooks(model), _eagerly(model):
        for held in (Holdable(), found):
            with torch.random.fork_rng(devices=devices), _applied(held, _cast_dtype(images)):
                outputs.append(_all_outputs(model, images.clone()))
    return _agree(*outputs, _cast_dtype(images))


def _eagerly(model: nn.Module) -> AbstractContextManager:
    """Run compiled networks as they are written: they would compile anew for a few images."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks that count or record passes are not for ours."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    taken = [(m, kind, m.__dict__[kind]) for m in model.modules() for kind in kinds if m.__dict__[kind]]
    try:
        for module, kind, hooks in taken:
            module.__dict__[kind] = type(hooks)()
        yield
    finally:
        for module, kind, hooks in taken:
            module.__dict__[kind] = hooks


def _agree(expected: list[Tensor], outputs: list[Tensor], dtype: torch.dtype | None) -> bool:
    tolerance = TOLERANCE if dtype in (None, torch.float32) else HALF_TOLERANCE
    # comparisons with NaN are false, so that a broken model is left alone
    pairs = zip(expected, outputs, strict=True)
    return all((a.float() - b.float()).abs().max() <= tolerance * a.float().abs().max() for a, b in pairs)


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


def _find(model: nn.Module, images: Tensor) -> tuple[list[tuple[str, str]], list[str]]:
    """Names of pairs, found by following outputs of convolutions, and of layers that may be cast.

    Both are empty where holding them changes what the model does.
    """
    sources, pairs, kept, runs, seen = {}, {}, [], {}, set()
    names = {module: name for name, module in model.named_modules()}
    kind, dtype = images.device.type, _cast_dtype(images)

    def note_output(conv: nn.Module, _: tuple, output: Tensor) -> None:
        kept.append(output)  # else its id could be given again
        sources[id(output)] = conv

    def note_input(norm: nn.Module, inputs: tuple) -> None:
        conv = sources.get(id(inputs[0]))
        pairs[norm] = conv if pairs.get(norm, conv) is conv else None  # None: it follows several

    def note_run(layer: nn.Module, _: tuple) -> None:
        runs[layer] = runs.get(layer, True) and torch.is_autocast_enabled(kind)

    # exact types: a subclass may compute something else
    handles = [m.register_forward_hook(note_output) for m in names if type(m) is nn.Conv2d]
    handles += [m.register_forward_pre_hook(note_input) for m in names if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
    handles += [m.register_forward_pre_hook(note_run) for m in names if type(m) in (nn.Conv2d, nn.Linear)]
    layers = [m for m in names if isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm))]
    handles += [m.register_forward_pre_hook(lambda layer, _: seen.add(layer)) for m in layers]
    expected = _all_outputs(model, images.clone())  # some models work in place
    for handle in handles:
        handle.remove()
    convs = list(pairs.values())
    # one weight cannot hold the scales of two BatchNorms
    folds = [(conv, norm) for norm, conv in pairs.items() if conv is not None and convs.count(conv) == 1]
    if seen != set(layers):  # other images may flow through what these did not: through another BatchNorm, say
        folds = []
    casts = [layer for layer, always in runs.items() if always]
    for found in (Holdable(folds, casts), Holdable(folds), Holdable([], casts)):  # the most first
        with _applied(found, dtype):
            outputs = _all_outputs(model, images.clone())
        if _agree(expected, outputs, dtype):
            return [(names[conv], names[norm]) for conv, norm in found.pairs], [names[m] for m in found.casts]
    return [], []


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


def _is_plain(module: nn.Module) -> bool:
    """Whether its weights are ordinary ones in single precision: not spread by FSDP, quantised or held already."""
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
    ordinary = all(type(p) is nn.Parameter and p.dtype == torch.float32 and not p.is_meta for p in tensors)
    return ordinary and module._parameters.get("weight") is not None


def _can_fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    held = not norm.training and norm.running_mean is not None and "forward" not in norm.__dict__
    return held and _is_plain(conv) and _has_no_hooks(conv) and _has_no_hooks(norm)


def _folded_weights(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Weight (channels last, which convolutions take over for all that follows) and bias of both in one."""
    # BatchNorm is (conv(x) - mean) * scale + shift
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias
    weight = conv.weight * scale[:, None, None, None]
    dtype = weight.dtype if dtype is None else dtype
    return weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)


def _pass_on(x: Tensor) -> Tensor:
    return x


def _drop_and_act(norm: BatchNormAct2d, x: Tensor) -> Tensor:
    return norm.act(norm.drop(x))


@contextmanager
def _applied(found: Holdable, dtype: torch.dtype | None) -> Iterator[None]:
    """Swap folded weights in, cast to `dtype` unless that is None, and the parameters back on exit.

    What stands in for a folded layer is the same function each time, so that compiled code stays valid.
    """
    taken: list[tuple[nn.Module, str, Tensor | None]] = []
    silenced: list[nn.Module] = []
    casts = set(found.casts) if dtype is not None else set()

    def swap(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            taken.append((layer, name, layer._parameters[name]))
            layer._parameters[name] = tensor

    try:
        with torch.no_grad():
            for conv, norm in found.pairs:
                if _can_fold(conv, norm):
                    weight, bias = _folded_weights(conv, norm, dtype if conv in casts else None)
                    swap(conv, weight, bias)
                    silenced.append(norm)
                    norm.forward = partial(_drop_and_act, norm) if isinstance(norm, BatchNormAct2d) else _pass_on
            for layer in casts:
                if _is_plain(layer):  # not those folded above: they are cast already
                    bias = None if layer.bias is None else layer.bias.to(dtype)
                    swap(layer, layer.weight.to(dtype), bias)
        yield
    finally:
        for layer, name, tensor in reversed(taken):
            layer._parameters[name] = tensor
        for norm in silenced:
            norm.__dict__.pop("forward", None)


__all__ = ["flow_key", "foldable_pairs", "folded"]
