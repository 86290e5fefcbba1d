"""BatchNorm layers in training mode, where a batch has one image or only some of its rows count.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def single_row_mode(module: nn.Module, num_rows: int) -> Iterator[None]:
    """Let training-mode BatchNorm layers use their running statistics for a single image, which has no variance.

    Nothing is recomputed in the backward pass meanwhile: that would happen in the other mode.
    """
    layers, checkpointed = [], []
    if num_rows == 1:
        layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        checkpointed = [m for m in module.modules() if layers and getattr(m, "grad_checkpointing", False)]
    for layer in layers:
        layer.eval()
    for part in checkpointed:
        part.grad_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
        for part in checkpointed:
            part.grad_checkpointing = True


@contextmanager
def weighted_batchnorm(module: nn.Module, weights: Tensor | None) -> Iterator[None]:
    """Let training-mode BatchNorm layers count each row as often as `weights` (B,) says, in mean, variance and running
    statistics, as if only those rows were there. One row or none uses the running statistics, as `single_row_mode`.

    Nothing changes where `weights` is None, and for layers in eval mode.

    Raises:
        NotImplementedError: A BatchNorm layer is neither `nn.BatchNorm2d` nor timm's.
    """
    layers = []
    if weights is not None:
        layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for layer in layers:
        if not isinstance(layer, nn.BatchNorm2d) or not layer.track_running_stats or layer.momentum is None:
            raise NotImplementedError(f"a {type(layer).__name__} cannot take statistics over some of its rows.")
    try:
        for layer in layers:
            layer.forward = partial(_weighted_batchnorm, layer, weights)
        # each call has a `forward` of its own, for which torch would compile anew
        with torch.compiler.set_stance("force_eager") if layers and module._compiled_call_impl else nullcontext():
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _weighted_batchnorm(layer: nn.BatchNorm2d, weights: Tensor, features: Tensor) -> Tensor:
    x = features.float()  # PyTorch's own keeps its statistics in float32 too
    rows, size = weights.sum(), x.shape[2] * x.shape[3]
    share = (weights / (rows * size).clamp_min(1))[:, None, None, None]
    mean = (share * x).sum(dim=(0, 2, 3))
    var = (share * (x - mean[:, None, None]).square()).sum(dim=(0, 2, 3))
    enough = rows > 1  # a tensor, and `where` below: an `if` would wait for the device
    with torch.no_grad():
        rate = layer.momentum * enough.float()
        # running_var is unbiased, as in nn.BatchNorm2d
        unbiased = var * (rows * size / (rows * size - 1).clamp_min(1))
        old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()  # one row uses them as they were
        layer.running_mean.lerp_(mean.detach().where(enough, old_mean).to(old_mean), rate)
        layer.running_var.lerp_(unbiased.where(enough, old_var).to(old_var), rate)
        layer.num_batches_tracked.add_(enough)
    mean, var = torch.where(enough, mean, old_mean), torch.where(enough, var, old_var)
    scale = torch.rsqrt(var + layer.eps) * (1 if layer.weight is None else layer.weight)
    shift = (0 if layer.bias is None else layer.bias) - mean * scale
    out = torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(features.dtype)
    return layer.act(layer.drop(out)) if hasattr(layer, "drop") else out  # timm's has an activation of its own
