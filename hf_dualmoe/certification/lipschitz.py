"""Proved Lipschitz constants of networks: products of operator norms, layer by layer.

    bound = lipschitz_bound(network, (3, 32, 32), norm="l2")
    bound.margins[y, j]  # f_y - f_j changes by at most this much per unit of the image's change

A network is a chain f = f_n o ... o f_1, and ||f(x) - f(x')||_p <= (prod_i L_i) ||x - x'||_p where L_i bounds f_i from
the p-norm to the p-norm. Two branches that are added have a constant of at most the sum of theirs (triangle
inequality). What is computed in floating point is rounded outward. A layer whose constant is not known raises
`NotApplicableError`: no number is returned that is not a proof.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..attacks.precision import check_no_autocast
from .operator_norms import (
    NORMS,
    OUTWARD,
    adaptive_pool_matrix,
    check_norm,
    conv_norm,
    dual_norm,
    matrix_norm,
    pair_norms,
)

NORM_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d)
OURS = ("LipschitzLinear", "LipschitzConv2d", "PairSort", "FeaturePool")  # by name: remote code has its own classes

Shape = tuple[int, ...]


class NotApplicableError(ValueError):
    """There is no theorem for this model; the message says which part of it has none."""


@dataclass(frozen=True)
class LipschitzBound:
    """Proved constants of a map f from inputs to C outputs.

    Args:
        norm: "l2", "linf" or "l1", of inputs and outputs.
        outputs: ||f(x) - f(x')|| <= outputs * ||x - x'||.
        margins: (C, C) float64: |(f_a - f_b)(x) - (f_a - f_b)(x')| <= margins[a, b] * ||x - x'||; 0 on the diagonal.
    """

    norm: str
    outputs: float
    margins: Tensor

    def scaled(self, factor: float) -> "LipschitzBound":
        """The bound of f after a map (or times a factor) of Lipschitz constant `factor`."""
        return LipschitzBound(self.norm, self.outputs * factor, self.margins * factor)


# --- layers ----------------------------------------------------------------------------------------------------------


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is affine with its weight as it stands; subclasses may pad, standardise or activate as well."""
    plain = type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)
    return isinstance(layer, (nn.Linear, nn.Conv2d)) and (plain or type(layer).__name__ in OURS)


def layer_weight(layer: nn.Module) -> Tensor:
    """The weight, float64, that a linear or convolutional layer applies in eval mode."""
    weight = getattr(layer, "applied_weight", layer.weight)  # a 1-Lipschitz layer keeps it apart from its free weight
    return finite(weight.detach().double(), f"the weight of a {type(layer).__name__} layer")


def finite(values: Tensor, what: str) -> Tensor:
    """The values; a NotApplicableError where one of them is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise NotApplicableError(f"{what} is NaN or infinite in places.")
    return values


def norm_scale(layer: nn.Module) -> Tensor:
    """gamma / sqrt(running_var + eps) of a BatchNorm layer: in eval mode it multiplies each channel by this."""
    if layer.running_var is None:
        raise NotApplicableError("a BatchNorm layer without running statistics mixes the images of a batch.")
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.detach().double()
    return finite(scale, "gamma / sqrt(running_var + eps) of a BatchNorm layer")


def linear_norm(layer: nn.Module, norm: str, shape: Shape, channel_scale: Tensor | None = None) -> float:
    """Operator norm of a linear or convolutional layer, followed by a factor per output channel."""
    weight = layer_weight(layer)
    if channel_scale is not None:
        weight = weight * channel_scale.to(weight.device).view(-1, *[1] * (weight.ndim - 1))
    if isinstance(layer, nn.Linear):
        return matrix_norm(weight, norm)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise NotApplicableError(f"a convolution with padding={layer.padding!r}, {layer.padding_mode!r} has no bound.")
    return conv_norm(
        weight,
        norm,
        shape[-2:],
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def average_pool_norm(layer: nn.AvgPool2d, norm: str, shape: Shape) -> float:
    """Norm of average pooling: a convolution of each channel with one constant kernel.

    Where windows do not overlap and are cut at the border, a mean of m >= 1 numbers has norm 1 in L-inf,
    m**-1/2 <= 1 in L2 and 1/m <= 1 in L1.
    """
    kernel, stride, padding = (pair(value) for value in (layer.kernel_size, layer.stride, layer.padding))
    if layer.divisor_override is not None:
        raise NotApplicableError("average pooling with divisor_override has no bound.")
    uneven = layer.ceil_mode or (padding != (0, 0) and not layer.count_include_pad)
    if not uneven:
        weight = torch.full((1, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
        return conv_norm(weight, norm, shape[-2:], stride=stride, padding=padding)
    if norm == "linf" or all(s >= k for s, k in zip(stride, kernel, strict=True)):
        return 1.0
    raise NotApplicableError("average pooling with overlapping windows that are cut at the border has no bound.")


def adaptive_pool_norm(places: Sequence[int], norm: str, shape: Shape) -> float:
    """Norm of adaptive average pooling: the Kronecker product of one matrix per axis, whose norms multiply."""
    return math.prod(matrix_norm(adaptive_pool_matrix(n, p), norm) for n, p in zip(shape[-2:], places, strict=True))


def max_pool_norm(layer: nn.MaxPool2d, norm: str, shape: Shape) -> float:
    """|max a - max b| <= max |a - b| in each window, and a pixel is in at most prod ceil(kernel / stride) windows."""
    windows = math.prod(math.ceil(k / s) for k, s in zip(pair(layer.kernel_size), pair(layer.stride), strict=True))
    if pair(layer.dilation) != (1, 1):
        raise NotApplicableError("max pooling with dilation has no bound.")
    return {"linf": 1.0, "l2": math.sqrt(windows), "l1": float(windows)}[norm]


def select_pool_norm(layer: SelectAdaptivePool2d, norm: str, shape: Shape) -> float:
    """Norm of timm's global pooling."""
    if layer.pool_type == "":
        return 1.0
    if layer.pool_type not in ("avg", "fast"):
        raise NotApplicableError(f"global pooling of type {layer.pool_type!r} has no bound.")
    return adaptive_pool_norm((1, 1), norm, shape)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A setting per axis: 3 -> (3, 3)."""
    return (value, value) if isinstance(value, int) else tuple(value)


# Functions of each number alone: the largest absolute slope.
ELEMENTWISE: dict[str, Callable[[nn.Module], float]] = {
    **dict.fromkeys(("ReLU", "ReLU6", "Hardtanh", "Tanh", "Softplus", "Softsign"), lambda layer: 1.0),
    **dict.fromkeys(("Identity", "Flatten", "Dropout", "Dropout2d", "DropPath", "DropBlock2d"), lambda layer: 1.0),
    # max and min of a pair: each pair is only permuted, and |sort a - sort b| <= |a - b|
    "PairSort": lambda layer: 1.0,
    "Sigmoid": lambda layer: 0.25,  # at 0
    "GELU": lambda layer: 1.13,  # 1.1290 near sqrt(2), exact or by tanh
    "SiLU": lambda layer: 1.1,  # 1.0998 near 2.4
    "LeakyReLU": lambda layer: max(1.0, abs(layer.negative_slope)),
    "ELU": lambda layer: max(1.0, layer.alpha),
}
POOLING: dict[str, Callable[[nn.Module, str, Shape], float]] = {
    "AvgPool2d": average_pool_norm,
    "MaxPool2d": max_pool_norm,
    "AdaptiveAvgPool2d": lambda layer, norm, shape: adaptive_pool_norm(pair(layer.output_size), norm, shape),
    "SelectAdaptivePool2d": select_pool_norm,
    "FeaturePool": lambda layer, norm, shape: adaptive_pool_norm((1, 1), norm, shape),
}


def layer_norm_bound(layer: nn.Module, norm: str, shape: Shape) -> float:
    """Lipschitz constant of one layer in eval mode.

    Raises:
        NotApplicableError: None is known.
    """
    name = type(layer).__name__
    # a stranger's class of the same name may be another function
    ours = name in OURS or type(layer).__module__.startswith(("torch.nn.", "timm."))
    if is_linear(layer):
        return linear_norm(layer, norm, shape)
    if type(layer) in NORM_LAYERS:
        return float(norm_scale(layer).abs().max()) * OUTWARD
    if name in ELEMENTWISE and ours:
        return ELEMENTWISE[name](layer)
    if name in POOLING and ours and len(shape) == 4:
        return POOLING[name](layer, norm, shape)
    if any("attention" in type(module).__name__.lower() for module in layer.modules()):
        raise NotApplicableError(
            f"{name} contains self-attention, which has no Lipschitz constant (https://arxiv.org/abs/2006.04710)."
        )
    raise NotApplicableError(f"no Lipschitz constant is known for the layer {name}.")


# --- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Residual:
    """Branches of layers whose outputs are added; an empty branch is the identity."""

    branches: list[list]


def chain_of(module: nn.Module | None) -> list:
    """A network as the list of layers and `Residual`s that it applies in turn."""
    if module is None:
        return []
    if type(module).forward is nn.Sequential.forward:  # a subclass with a forward of its own is no such chain
        return [layer for part in module for layer in chain_of(part)]
    if type(module) is ResNet:
        parts = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4", "global_pool", "fc")
        return [layer for name in parts for layer in chain_of(getattr(module, name))]
    if type(module) in (BasicBlock, Bottleneck):
        names = ["conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"]
        if type(module) is Bottleneck:  # its blur pool and drop block follow the second convolution
            names = ["conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"]
        names += ["se", "drop_path"]
        main = [layer for name in names for layer in chain_of(getattr(module, name))]
        last = module.act2 if type(module) is BasicBlock else module.act3
        return [Residual([main, chain_of(module.downsample)]), *chain_of(last)]
    return [module]


def chain_constant(chain: list, norm: str, shapes: dict[nn.Module, Shape]) -> float:
    """Product of the constants of a chain; a BatchNorm right after a linear layer is folded into it."""
    constant, position = 1.0, 0
    while position < len(chain):
        part = chain[position]
        following = chain[position + 1] if position + 1 < len(chain) else None
        if isinstance(part, Residual):
            constant *= sum(chain_constant(branch, norm, shapes) for branch in part.branches)
        # one norm of the product is below the product of norms
        elif is_linear(part) and type(following) in NORM_LAYERS:
            constant *= linear_norm(part, norm, shapes[part], norm_scale(following))
            position += 1
        else:
            constant *= layer_norm_bound(part, norm, shapes.get(part, ()))
        position += 1
    if not math.isfinite(constant):
        raise NotApplicableError("the product of the layers' Lipschitz constants overflows.")
    return constant


def chain_bound(chain: list, norm: str, shapes: dict[nn.Module, Shape], count: int) -> LipschitzBound:
    """The best constants of a chain of layers that the three norms give.

    ||d||_inf <= ||d||_2 <= ||d||_1 <= sqrt(n) ||d||_2 <= n ||d||_inf for an input of n numbers, so constants of the
    output differences in one norm, times such a factor, are constants in another. An output's change is a number: the
    norm of the outputs does not matter for it.

    Args:
        chain: Layers, from `chain_of`.
        norm: "l2", "linf" or "l1".
        shapes: Input shapes of the layers, from `input_shapes`.
        count: n.
    """
    bound = one_norm_bound(chain, norm, shapes)
    margins = bound.margins
    for other in NORMS:
        if other != norm:
            factor = norm_ratio(other, norm, count) * OUTWARD
            margins = torch.minimum(margins, factor * one_norm_bound(chain, other, shapes).margins)
    return LipschitzBound(norm, bound.outputs, margins)


def norm_ratio(of: str, to: str, count: int) -> float:
    """The largest ||d||_of / ||d||_to of vectors d of n = `count` numbers."""
    order = {"l2": 2.0, "linf": math.inf, "l1": 1.0}
    return max(1.0, count ** (1 / order[of] - 1 / order[to]))


def one_norm_bound(chain: list, norm: str, shapes: dict[nn.Module, Shape]) -> LipschitzBound:
    """Constants of a chain of layers and of the differences of its C outputs, all layers in one norm.

    Where the last layer is linear with rows w_a, |(f_a - f_b)(x) - (f_a - f_b)(x')| = |<w_a - w_b, h(x) - h(x')>| <=
    ||w_a - w_b||_dual ||h(x) - h(x')||, which is better than the constant of all outputs.
    """
    if not chain:
        raise NotApplicableError("the network has no layers.")
    if is_linear(chain[-1]) and isinstance(chain[-1], nn.Linear):
        features = chain_constant(chain[:-1], norm, shapes)
        weight = layer_weight(chain[-1]).cpu()  # (C, n)
        margins = features * pair_norms(weight, norm) * OUTWARD
        return LipschitzBound(norm, features * matrix_norm(weight, norm), margins)
    outputs = chain_constant(chain, norm, shapes)
    classes = shapes["outputs"][1]
    apart = {"l2": math.sqrt(2), "linf": 2.0, "l1": 1.0}[norm]  # dual norm of e_a - e_b
    margins = torch.full((classes, classes), outputs * apart * OUTWARD, dtype=torch.float64)
    return LipschitzBound(norm, outputs, margins.fill_diagonal_(0))


@torch.no_grad()
def input_shapes(network: nn.Module, run: Callable[[], Tensor]) -> dict:
    """The shape of what each layer of `network` gets while `run` calls it; "outputs" -> the shape of the result.

    Raises:
        ValueError: Autocast is on within, as in a model that accelerate prepared for half precision.
    """
    shapes: dict = {}

    def note(layer: nn.Module, args: tuple) -> None:
        check_no_autocast()
        if args and isinstance(args[0], Tensor):
            known, shape = shapes.get(layer), tuple(args[0].shape)
            # a layer that runs on several sizes: a kernel's norm does not fall with the size
            shapes[layer] = shape if known is None else tuple(map(max, known, shape))

    handles = [layer.register_forward_pre_hook(note) for layer in network.modules()]
    try:
        shapes["outputs"] = tuple(run().shape)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def check_eval_mode(model: nn.Module) -> None:
    """Raise a ValueError where a part of the model is in train mode: its output is then no function of one image."""
    if any(module.training for module in model.modules()):
        raise ValueError("model is in train mode; call model.eval() first.")


def lipschitz_bound(network: nn.Module, shape: Shape, norm: str = "l2") -> LipschitzBound:
    """Proved Lipschitz constants of a network without attention.

    Supported: sequences and timm ResNets of linear layers, convolutions with zero padding, BatchNorm in eval mode,
    usual activations, average and max pooling, sums of branches, and the 1-Lipschitz backbones, whose constant comes
    out near their logit scale. For other deep CNNs the bound is sound and usually far too large to
    certify anything; it is reported all the same.

    Args:
        network: Module from images (B, C, H, W) to outputs (B, K), in eval mode.
        shape: (C, H, W) of one image.
        norm: "l2", "linf" or "l1".

    Raises:
        NotApplicableError: A layer has no known constant, such as self-attention.
        ValueError: The network is in train mode, or the norm is unknown.
    """
    check_norm(norm)
    check_eval_mode(network)
    chain = chain_of(network)
    example = next(network.parameters(), torch.zeros(())).new_zeros(1, *shape)
    return chain_bound(chain, norm, input_shapes(network, lambda: network(example)), example.numel())


__all__ = [
    "LipschitzBound",
    "NotApplicableError",
    "conv_norm",
    "dual_norm",
    "lipschitz_bound",
    "matrix_norm",
]
