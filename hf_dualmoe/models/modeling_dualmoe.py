"""Mixture-of-experts image classifiers and the dual model that mixes a standard and a robust one.

Images go in as floats in [0, 1]; normalisation is inside the model, so an attack radius always counts in pixel units.
This file travels to the Hub as remote code together with `configuration_dualmoe.py`; it imports torch, timm and
transformers only.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import copy
import difflib
import math
import numbers
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models import ResNet, is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForImageClassification, CLIPImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import find_adapter_config_file, is_peft_available, logging

from .configuration_dualmoe import MIXINGS, DualMoEConfig, MoEConfig, check_choice, side_of
from .merging_dualmoe import cached_merge, forget_merge, interpolate, weights_cosine, weights_obstacles

try:  # trains the 1-Lipschitz backbones; a trained one needs torch alone
    from deel.torchlip.normalizers import bjorck_normalization, spectral_normalization
except ImportError:
    bjorck_normalization = spectral_normalization = None

logger = logging.get_logger(__name__)

RANGE_TOLERANCE = 1e-5  # x * (1 / 255) rounds to just above 1
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# what a config from a stranger may ask for before it is refused: far above any published vision model
MAX_PARAMETERS = 20_000_000_000  # of all experts
MAX_TENSORS = 10_000  # of one network
UNRELATED = 0.1  # cosine of the weights of networks without a common start; measured on digits: 0.006, with one 0.999
INITIALISED_BY_PARENT = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)
HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision")
NO_ADAPTERS = (
    "Adapters are not loaded: their weights come from elsewhere and are not checked. To use one that you trust, load "
    "the model without it and call peft.PeftModel.from_pretrained(model, adapter)."
)
_trusts_values: ContextVar[bool] = ContextVar("trusts_values", default=False)
_keeps_shapes: ContextVar[bool] = ContextVar("keeps_shapes", default=False)
SEARCH_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


@dataclass
class MoEImageClassifierOutput(ModelOutput):
    """Output of `MoEForImageClassification`; B images, E experts, C labels.

    Args:
        loss: Scalar: cross-entropy + router_aux_loss_coef * aux_loss; only with labels.
        logits: (B, C); k = 1: the chosen expert's logits; k > 1: log-probabilities of the mixture.
        router_logits: (B, E) before softmax; only where asked for.
        expert_index: (B,) the expert used for k = 1; (B, k), highest score first, for k > 1.
        aux_loss: Scalar load-balancing loss, unweighted, over the rows that the router decided; None where nobody can
            learn from it: without labels under `no_grad` (`pipeline` can only split a batch of outputs that have a row
            per image) or with frozen routes (attacks).
        extra_logits: (B, C) of the experts `extra_expert_index`, 0 in rows without one; only where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    router_logits: Tensor | None = None
    expert_index: Tensor | None = None
    aux_loss: Tensor | None = None
    extra_logits: Tensor | None = None


@dataclass
class DualMoEImageClassifierOutput(ModelOutput):
    """Output of `DualMoEForImageClassification`; B images, C labels.

    Args:
        loss: Scalar: cross-entropy of the mixture + aux_loss; only with labels.
        logits: (B, C) log-probabilities (mixing="probs"), mixed logits (mixing="logits") or logits of the merged
            network (mixing="weights"); None where the two models saw different images.
        standard_logits, robust_logits: (B, C) logits of F_S and F_R, before any logit map. They and all else of F_S
            and F_R are None with mixing="weights", where neither runs: `model.standard` and `model.robust` tell.
        standard_router_logits, robust_router_logits: (B, E) before softmax; only where asked for.
        standard_expert_index, robust_expert_index: As in `MoEImageClassifierOutput`; None for a component without
            experts.
        aux_loss: Scalar sum of the load-balancing losses, each weighted with its router_aux_loss_coef; None as there.
        robust_extra_logits: `extra_logits` of F_R.
        router_logits, expert_index: Those of the merged network, with mixing="weights" and experts.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    standard_logits: Tensor | None = None
    robust_logits: Tensor | None = None
    standard_router_logits: Tensor | None = None
    robust_router_logits: Tensor | None = None
    standard_expert_index: Tensor | None = None
    robust_expert_index: Tensor | None = None
    aux_loss: Tensor | None = None
    robust_extra_logits: Tensor | None = None
    router_logits: Tensor | None = None
    expert_index: Tensor | None = None


@contextmanager
def trusted_values(enabled: bool = True) -> Iterator[None]:
    """Check shapes and dtypes only: values were checked where they entered.

    To look at values is to wait for the device. Training checks them on the host, in its collator.
    """
    token = _trusts_values.set(enabled or _trusts_values.get())
    try:
        yield
    finally:
        _trusts_values.reset(token)


def values_are_trusted() -> bool:
    """Whether nobody is to look at the values of tensors: within `trusted_values`, or while torch compiles."""
    return torch.compiler.is_compiling() or _trusts_values.get()


@contextmanager
def static_shapes() -> Iterator[None]:
    """Let no shape depend on values, as a CUDA graph needs: every expert runs on all images, the answers are picked.

    The function is the same: BatchNorm layers in training mode take their statistics over the images that the expert
    would have seen.
    """
    token = _keeps_shapes.set(True)
    try:
        yield
    finally:
        _keeps_shapes.reset(token)


def shapes_are_static() -> bool:
    """Whether we are within `static_shapes`."""
    return not torch.compiler.is_compiling() and _keeps_shapes.get()


def gate_weights(router_logits: Tensor, top_k: int) -> Tensor:
    """Weight (B, E) of each expert in the output: softmax of the top-k of the router logits (B, E), 0 elsewhere."""
    values, index = router_logits.float().topk(top_k, dim=1)
    return torch.zeros_like(router_logits, dtype=values.dtype).scatter(1, index, values.softmax(dim=1))


def load_balancing_loss(
    router_logits: Tensor, top_k: int = 1, all_processes: bool = False, rows: Tensor | None = None
) -> Tensor:
    """Balance loss of the Switch Transformer (https://arxiv.org/abs/2101.03961, Eq. 4-6): E * sum_i f_i * P_i.

    P_i is the mean router probability of expert i. f_i is its load, the mean weight that it has in the output: for
    top-1 the share of images sent to it, as in the paper; with all experts in use P_i itself. 1 when balanced.

    Args:
        router_logits: (B, E) before softmax.
        top_k: Experts used per image.
        all_processes: Take f over the batches of all processes, as one process with the whole batch would; all must
            call.
        rows: (B,) bool: the images that count; None = all. Not picked by indexing, which would wait for the device.

    Returns:
        Scalar in [0, E]; 0 for an empty batch. Only P carries gradient.
    """
    if router_logits.shape[0] == 0:
        return router_logits.sum()
    gates, probs = gate_weights(router_logits.detach(), top_k), router_logits.float().softmax(dim=1)
    if rows is None:
        load, mean_probs = gates.mean(dim=0), probs.mean(dim=0)  # (E,) each
    else:
        share = (rows / rows.sum().clamp_min(1))[:, None]
        load, mean_probs = (share * gates).sum(dim=0), (share * probs).sum(dim=0)
    if all_processes and dist.is_available() and dist.is_initialized():
        dist.all_reduce(load)
        load = load / dist.get_world_size()
    return router_logits.shape[1] * (load * mean_probs).sum()


def check_pixel_values(pixel_values: Tensor, num_channels: int, image_size: int | None) -> None:
    """Refuse anything but a float batch (B, C, H, W) in [0, 1].

    Values are looked at outside gradient computations only: an attack's inner passes would pay for it each step.

    Raises:
        ValueError: Shape, dtype or values are wrong; the message names what is allowed.
    """
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values has dtype {pixel_values.dtype}; expected floats in [0, 1] (divide by 255).")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels or pixel_values.shape[0] == 0:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, {num_channels}, height, width)."
        )
    if image_size is not None and pixel_values.shape[2:] != (image_size, image_size):
        height, width = pixel_values.shape[2:]
        raise ValueError(
            f"pixel_values are {height}x{width} pixels; this model takes image_size={image_size} squared."
        )
    if pixel_values.requires_grad or values_are_trusted() or pixel_values.is_meta:
        return
    low, high = (float(v) for v in torch.aminmax(pixel_values.detach()))
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # also false for NaN
        raise ValueError(
            f"pixel_values lie in [{low:.4g}, {high:.4g}]; expected [0, 1] (the model normalises inside)."
        )


def check_labels(labels: Tensor, batch_size: int, num_labels: int) -> None:
    """Refuse anything but int64 labels (B,) in [0, num_labels).

    Raises:
        ValueError: Shape, dtype or values are wrong; the message names what is allowed.
    """
    if labels.shape != (batch_size,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; expected ({batch_size},) and int64."
        )
    if values_are_trusted() or labels.is_meta:
        return
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= num_labels:
        raise ValueError(f"labels lie in [{low}, {high}]; expected values in [0, num_labels) = [0, {num_labels}).")


class Normalize(nn.Module):
    """(x - mean) / std per channel, with constants that survive construction on the meta device."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.constants = {"mean": tuple(mean), "std": tuple(std)}
        for name, values in self.constants.items():
            # float32 whatever dtype the model is loaded in: 8 bits are too few for a mean
            self.register_buffer(name, torch.empty(len(values), 1, 1, dtype=torch.float32), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Refill the buffers; `from_pretrained` leaves them uninitialised (same protocol as timm's)."""
        for name, values in self.constants.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype, device=buffer.device).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Resize(nn.Module):
    """Images (B, C, H, W) at another size (bilinear, antialiased); values stay in their range."""

    def __init__(self, size: int):
        super().__init__()
        self.size = (size, size)

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(images, size=self.size, mode="bilinear", align_corners=False, antialias=True)


# --- backbones -------------------------------------------------------------------------------------------------------


def create_backbone(config: MoEConfig, pretrained: bool = False, **timm_kwargs) -> nn.Module:
    """Build one whole timm or 1-Lipschitz network with the config's classes, channels, size, width and stem.

    Args:
        config: Configuration of the mixture.
        pretrained: Whether timm loads its pretrained weights (before the stem is replaced).
        timm_kwargs: Passed on to `timm.create_model`, such as `pretrained_cfg_overlay={"file": path}`.

    Raises:
        ValueError: The backbone is unknown, or does not take the stem or width asked for.
    """
    name = config.backbone
    if name in LIPSCHITZ_BACKBONES:
        return create_lipschitz_backbone(config, pretrained)
    arch = name.split(".")[0]
    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch, [*LIPSCHITZ_BACKBONES, *timm.list_models()], n=3)
        raise ValueError(
            f"backbone={name!r} is not a timm model" + (f"; did you mean {', '.join(close)}?" if close else ".")
        )
    is_resnet = is_model_in_modules(arch, ("resnet",))
    kwargs = {
        "num_classes": config.num_labels,
        "in_chans": config.num_channels,
        **config.backbone_kwargs,
        **timm_kwargs,
    }
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:  # ViTs: the position embedding needs the size
        kwargs.setdefault("img_size", config.backbone_image_size or config.image_size)
    if config.width is not None:
        if not is_resnet or pretrained:
            reason = "pretrained weights have full width" if pretrained else f"backbone={name!r} is no timm ResNet"
            raise ValueError(f"width={config.width!r} cannot be used: {reason}.")
        kwargs["channels"] = stage_channels(config.width)
    try:
        backbone = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # timm checks little itself: wrong arguments end in all kinds of errors
        if pretrained and not isinstance(error, (TypeError, AssertionError)):
            raise  # of the download
        raise ValueError(
            f"backbone={name!r} does not accept the arguments {kwargs} (see backbone_kwargs): {error}"
        ) from error
    if is_resnet:
        adapt_resnet_stem(backbone, config, stem_channels=None if config.width is None else kwargs["channels"][0])
    return backbone


def stage_channels(width: float | list[int]) -> tuple[int, ...]:
    """Channels of the four ResNet stages, from a multiplier (rounded to multiples of 8, at least 8) or a list."""
    if isinstance(width, (int, float)):
        return tuple(max(8, 8 * round(channels * width / 8)) for channels in (64, 128, 256, 512))
    if len(width) != 4 or min(width) < 1:
        raise ValueError(f"width={width!r} must hold 4 positive stage channels.")
    return tuple(width)


def adapt_resnet_stem(resnet: nn.Module, config: MoEConfig, stem_channels: int | None) -> None:
    """Give the network, in place, the stem of the config, narrowed to `stem_channels` unless that is None."""
    old_channels = resnet.feature_info[0]["num_chs"]
    channels = stem_channels or old_channels
    narrowed = channels != old_channels
    if config.stem == "cifar":
        resnet.conv1 = new_conv(config.num_channels, channels, kernel_size=3, padding=1)
        resnet.maxpool = nn.Identity()
    elif narrowed:
        if not isinstance(resnet.conv1, nn.Conv2d):
            raise ValueError("width cannot narrow a deep stem (resnet*d, *c, *s, *t); use stem='cifar'.")
        resnet.conv1 = new_conv(config.num_channels, channels, kernel_size=7, stride=2, padding=3)
    if narrowed:
        resnet.bn1 = type(resnet.bn1)(channels)
        block = resnet.layer1[0]
        kernel_size, padding = block.conv1.kernel_size, block.conv1.padding
        block.conv1 = new_conv(channels, block.conv1.out_channels, kernel_size=kernel_size, padding=padding)
        out_channels = resnet.feature_info[1]["num_chs"]
        if channels == out_channels:
            block.downsample = None
        else:
            position = next(i for i, m in enumerate(block.downsample) if isinstance(m, nn.Conv2d))
            block.downsample[position] = new_conv(channels, out_channels, kernel_size=1)


def new_conv(in_channels: int, out_channels: int, **kwargs) -> nn.Conv2d:
    """A bias-free convolution, initialised as timm initialises those of its ResNets."""
    conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class LipschitzWeight:
    """For a linear or convolutional layer: a weight whose operator keeps the L2 norm `scale`.

    `weight` is free; training constrains it at each forward: the spectral and Bjorck normalisation of deel-torchlip
    (https://arxiv.org/abs/2006.06520) make all singular values of the matrix equal, then it is divided by the norm of
    the operator. The result is kept in the buffer `applied_weight`, which is what eval mode applies: the weight of the
    last training forward, one optimizer step behind. So a trained layer is an ordinary one. Its norm is `scale` up to
    a few per cent, as the iterations stop early; a certificate computes a bound of its own and need not trust them.
    """

    def constrain(self, scale: float, norm: float = 1.0) -> None:
        """Start to constrain the present weight, whose operator has at most this norm."""
        self.scale = scale
        nn.init.zeros_(self.bias)
        self.register_buffer("applied_weight", scale / norm * self.weight.detach())
        self.register_buffer("top_singular_vector", torch.randn(1, self.weight[0].numel()))

    def current_weight(self) -> Tensor:
        """The constrained weight; ImportError where it has to be computed and deel-torchlip is missing."""
        if not self.training:
            return self.applied_weight
        if bjorck_normalization is None:
            raise ImportError(
                "Training a 1-Lipschitz backbone needs deel-torchlip: pip install deel-torchlip. A trained one runs "
                "without it, in eval mode."
            )
        with torch.autocast(self.weight.device.type, enabled=False):  # 8 bits are too few for the iterations
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                _, vector, _ = spectral_normalization(matrix, self.top_singular_vector)
                self.top_singular_vector.copy_(vector)
            norm = torch.linalg.norm(vector @ matrix.t())
            weight = bjorck_normalization(matrix / (norm + 1e-3)).view_as(self.weight)
            weight = self.scale / self.operator_norm(weight) * weight
        self.applied_weight.copy_(weight.detach())
        return weight

    def operator_norm(self, weight: Tensor) -> Tensor | float:
        """L2 norm of the operator of a weight that has, as a matrix, the norm 1."""
        return 1.0


class LipschitzLinear(LipschitzWeight, nn.Linear):
    """A linear layer that changes by at most `scale` times the change of its input, in L2."""

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0):
        super().__init__(in_features, out_features)
        nn.init.orthogonal_(self.weight)
        self.constrain(scale)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.current_weight(), self.bias)


class LipschitzConv2d(LipschitzWeight, nn.Conv2d):
    """A convolution with zero padding, for images of one size, that changes by at most the change of its input, in L2.

    Where windows do not overlap, the operator has the norm of the matrix. Else its largest singular value is followed
    by power iteration, from training forward to training forward. With no more output than input channels it starts
    from an orthogonal matrix at the centre of the kernel, which loses nothing; else from any orthogonal matrix.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: int, kernel_size: int, stride: int = 1, padding: int = 0
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        nn.init.orthogonal_(self.weight)
        norm = math.ceil(kernel_size / stride)  # an input pixel is in at most norm**2 windows
        if norm > 1 and out_channels <= in_channels:
            nn.init.zeros_(self.weight)
            with torch.no_grad():
                self.weight[:, :, kernel_size // 2, kernel_size // 2] = nn.init.orthogonal_(
                    self.weight[:, :, 0, 0].clone()
                )
            norm = 1
        self.constrain(1.0, norm)
        self.register_buffer("top_image", torch.randn(1, in_channels, size, size))

    def operator_norm(self, weight: Tensor) -> Tensor | float:
        if self.kernel_size == self.stride:
            return 1.0
        settings = (self.stride, self.padding)
        with torch.no_grad():
            image = self.top_image
            for _ in range(2):
                image = F.conv2d(image, weight, None, *settings)
                image = torch.nn.grad.conv2d_input(self.top_image.shape, weight, image, *settings)
                image = image / image.norm().clamp_min(1e-12)
            self.top_image.copy_(image)
        return F.conv2d(image, weight, None, *settings).norm()

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.current_weight(), self.bias, self.stride, self.padding)


class PairSort(nn.Module):
    """Sorts each pair of channels (B, C, ...): 1-Lipschitz in every Lp norm, and keeps the norm of every gradient
    (GroupSort, https://arxiv.org/abs/1811.05381)."""

    def forward(self, features: Tensor) -> Tensor:
        first, second = features.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


def check_sizes(name: str, sizes: list[int] | tuple[int, ...]) -> None:
    """Raise a ValueError unless `sizes` holds at least one size, all even and positive."""
    is_list = isinstance(sizes, (list, tuple)) and len(sizes) > 0
    if not (is_list and all(isinstance(size, int) and size > 0 and size % 2 == 0 for size in sizes)):
        raise ValueError(f"{name}={sizes!r} must be a list of even sizes of at least 2: units are sorted in pairs.")


def lipschitz_mlp(
    in_chans: int,
    num_classes: int,
    img_size: int,
    hidden_sizes: list[int] | tuple[int, ...] = (256, 256),
    logit_scale: float = 1.0,
) -> nn.Sequential:
    """A fully connected 1-Lipschitz network.

    Args:
        in_chans, num_classes, img_size: Image channels, classes, height and width in pixels.
        hidden_sizes: Units of each hidden layer, even.
        logit_scale: Constant factor of the logits, and so of their Lipschitz constant: 1-Lipschitz logits are too
            close to each other for cross-entropy. Accuracy goes up with it, certified accuracy down.
    """
    check_sizes("hidden_sizes", hidden_sizes)
    sizes = [in_chans * img_size**2, *hidden_sizes]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes, hidden_sizes, strict=False):
        layers += [LipschitzLinear(before, after), PairSort()]
    return nn.Sequential(*layers, LipschitzLinear(sizes[-1], num_classes, logit_scale))


def lipschitz_cnn(
    in_chans: int,
    num_classes: int,
    img_size: int,
    channels: list[int] | tuple[int, ...] = (32, 64, 128),
    depth: int = 2,
    hidden_size: int = 256,
    logit_scale: float = 1.0,
) -> nn.Sequential:
    """A convolutional 1-Lipschitz network.

    A convolution 3x3; stages of `depth` convolutions 3x3 and one 2x2 with stride 2, which halves the image and goes to
    the channels of the next stage; two linear layers.

    Args:
        channels: Channels of each stage, even.
        depth: Convolutions 3x3 per stage.
        hidden_size: Units of the hidden linear layer, even.
        in_chans, num_classes, img_size, logit_scale: As in `lipschitz_mlp`.
    """
    check_sizes("channels", channels)
    check_sizes("hidden_size", [hidden_size])
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth={depth!r} must be an integer of at least 1.")
    if img_size >> len(channels) == 0:
        raise ValueError(f"channels={channels!r} halves images of {img_size} pixels {len(channels)} times: too often.")
    layers: list[nn.Module] = [LipschitzConv2d(in_chans, channels[0], img_size, 3, padding=1), PairSort()]
    size = img_size
    for here, after in zip(channels, [*channels[1:], channels[-1]], strict=True):
        for _ in range(depth):
            layers += [LipschitzConv2d(here, here, size, 3, padding=1), PairSort()]
        layers += [LipschitzConv2d(here, after, size, 2, stride=2), PairSort()]
        size //= 2
    features = channels[-1] * size**2
    layers += [nn.Flatten(), LipschitzLinear(features, hidden_size), PairSort()]
    return nn.Sequential(*layers, LipschitzLinear(hidden_size, num_classes, logit_scale))


LIPSCHITZ_BACKBONES = {"lipschitz_mlp": lipschitz_mlp, "lipschitz_cnn": lipschitz_cnn}


def create_lipschitz_backbone(config: MoEConfig, pretrained: bool = False) -> nn.Sequential:
    """Build one 1-Lipschitz network for the normalised images of a config.

    Raises:
        ValueError: It takes no width or pretrained weights, or `backbone_kwargs` does not fit it.
    """
    name = config.backbone
    if pretrained or config.width is not None:
        raise ValueError(f"backbone={name!r} has no pretrained weights and takes no width={config.width!r}.")
    scale = config.backbone_kwargs.get("logit_scale", 1.0)
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ValueError(f"logit_scale={scale!r} must be a finite number > 0.")
    size = config.backbone_image_size or config.image_size
    try:
        return LIPSCHITZ_BACKBONES[name](config.num_channels, config.num_labels, size, **config.backbone_kwargs)
    except TypeError as error:
        raise ValueError(
            f"backbone={name!r} does not accept the arguments backbone_kwargs={config.backbone_kwargs}: {error}"
        ) from error


def cut_backbone(backbone: nn.Module, shared_stages: int, keep: str) -> nn.Module:
    """Keep, in place, only the shared trunk (`keep="trunk"`) or what follows it (`keep="expert"`).

    Parts cut away become identities, so that the names of the kept parameters stay those of the whole network: one
    state dict of a whole network fills trunk and experts. A trunk is called through `forward_features`.

    Raises:
        ValueError: The backbone is neither ResNet nor ViT, or has fewer stages.
    """
    if isinstance(backbone, VisionTransformer):
        stages = [(backbone.blocks, str(i)) for i in range(len(backbone.blocks))]
        stem = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
        head, tokens = ("norm", "fc_norm", "head_drop", "head"), ("pos_embed", "cls_token", "reg_token")
        if backbone.attn_pool is not None:
            raise ValueError(f"shared_stages={shared_stages} does not support a ViT with attention pooling.")
    elif isinstance(backbone, ResNet):
        stages = [(backbone, f"layer{i}") for i in range(1, 5)]
        stem, head, tokens = ("conv1", "bn1", "act1", "maxpool"), ("global_pool", "fc"), ()
    else:
        raise ValueError(f"shared_stages={shared_stages} needs a timm ResNet or ViT, not {type(backbone).__name__}.")
    if shared_stages > len(stages):
        raise ValueError(
            f"shared_stages={shared_stages} exceeds the {len(stages)} stages of {type(backbone).__name__}."
        )
    dropped = stages[shared_stages:] if keep == "trunk" else stages[:shared_stages]
    for parent, name in dropped:
        setattr(
            parent, name, nn.Sequential()
        )  # nothing to do; timm's checkpointing goes through the layers of a stage
    for name in head if keep == "trunk" else stem:
        setattr(backbone, name, nn.Identity())
    if keep == "expert":
        for name in tokens:
            setattr(backbone, name, None)
    return backbone


class Trunk(nn.Module):
    """Up-samples the images where asked to, then applies the stages shared by all experts, if any."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        resized = config.backbone_image_size not in (None, config.image_size)
        self.size = config.backbone_image_size if resized else None
        self.stages, self.num_features = None, None
        if config.shared_stages > 0:
            self.stages = create_backbone(config)
            is_vit = isinstance(self.stages, VisionTransformer)
            cut_backbone(self.stages, config.shared_stages, keep="trunk")
            self.num_features = (
                self.stages.embed_dim if is_vit else self.stages.feature_info[config.shared_stages]["num_chs"]
            )

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        if self.stages is None:
            return images
        if images.shape[0] != 1:  # len() would fix the batch size of an export
            return self.stages.forward_features(images)
        with single_row_mode(self.stages, 1):
            return self.stages.forward_features(images)


class FeaturePool(nn.Module):
    """Mean over positions: maps (B, D, H, W) or tokens (B, N, D) -> (B, D)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=1) if features.ndim == 3 else features.mean(dim=(2, 3))


def create_router(config: MoEConfig, num_features: int | None) -> nn.Sequential:
    """Build the router: normalised images (B, C, H, W), or trunk features for "features" -> logits (B, E)."""
    num_experts, channels = config.num_experts, config.num_channels
    if config.router == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * config.image_size**2, num_experts))
    if config.router == "pooled":
        grid = config.router_pool_size
        return nn.Sequential(nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(channels * grid**2, num_experts))
    if config.router == "conv":
        return nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(FeaturePool(), nn.Linear(32, num_experts)),
        )
    return nn.Sequential(FeaturePool(), nn.Linear(num_features, num_experts))


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
        with torch.compiler.set_stance("force_eager") if layers and module._compiled_call_impl else nullcontext():
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _weighted_batchnorm(layer: nn.BatchNorm2d, weights: Tensor, features: Tensor) -> Tensor:
    x = features.float()
    rows, size = weights.sum(), x.shape[2] * x.shape[3]
    share = (weights / (rows * size).clamp_min(1))[:, None, None, None]
    mean = (share * x).sum(dim=(0, 2, 3))
    var = (share * (x - mean[:, None, None]).square()).sum(dim=(0, 2, 3))
    enough = rows > 1
    with torch.no_grad():
        rate = layer.momentum * enough.float()
        unbiased = var * (rows * size / (rows * size - 1).clamp_min(1))
        old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()
        layer.running_mean.lerp_(mean.detach().where(enough, old_mean).to(old_mean), rate)
        layer.running_var.lerp_(unbiased.where(enough, old_var).to(old_var), rate)
        layer.num_batches_tracked.add_(enough)
    mean, var = torch.where(enough, mean, old_mean), torch.where(enough, var, old_var)
    scale = torch.rsqrt(var + layer.eps) * (1 if layer.weight is None else layer.weight)
    shift = (0 if layer.bias is None else layer.bias) - mean * scale
    out = torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(features.dtype)
    return layer.act(layer.drop(out)) if hasattr(layer, "drop") else out  # timm's has an activation of its own


def pick_expert(by_expert: Tensor, index: Tensor) -> Tensor:
    """The logits (B, C) of expert `index` (B,) from those of all (B, E, C); zeros where it is -1."""
    chosen = by_expert.gather(1, index.clamp_min(0)[:, None, None].expand(-1, 1, by_expert.shape[2])).squeeze(1)
    return chosen * (index >= 0)[:, None]


@contextmanager
def limited_size(copies: int = 1) -> Iterator[None]:
    """Build a model on the meta device, without memory, and give up as soon as it is beyond all measure.

    Args:
        copies: How many such models there will be.

    Raises:
        ValueError: More than `MAX_PARAMETERS` numbers, or `MAX_TENSORS` tensors per copy.
    """
    numbers = tensors = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal numbers, tensors
        numbers += copies * (0 if tensor is None else tensor.numel())
        tensors += 1
        if numbers > MAX_PARAMETERS or tensors > MAX_TENSORS:
            raise ValueError(
                f"The config asks for a model of more than {MAX_PARAMETERS:,} parameters or {MAX_TENSORS:,} tensors."
            )

    hooks = [
        register(count)
        for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook)
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def check_model_size(config: MoEConfig) -> None:
    """Raise a ValueError where a mixture would have an absurd size; nothing is allocated."""
    with limited_size(copies=config.num_experts):
        create_backbone(config)
    inputs = {"linear": config.image_size**2, "pooled": config.router_pool_size**2}.get(config.router, 0)
    if config.num_channels * inputs * config.num_experts > MAX_PARAMETERS:
        raise ValueError(f"router={config.router!r} would have more than {MAX_PARAMETERS:,} parameters.")


def refuse_adapter(name_or_path: str | os.PathLike | None, kwargs: dict) -> None:
    """Refuse a folder or repository with an adapter_config.json.

    With peft, transformers would put the adapter on the model, and for a repository take the model itself from another
    one, which the file names. A folder is refused without peft too; in a repository nobody looks for the file then.

    Args:
        name_or_path: Folder or Hub id, as given to `from_pretrained`.
        kwargs: The other arguments of `from_pretrained`; read only.

    Raises:
        ValueError: There is such a file, or an Auto class has found one.
    """
    source = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if source is None and name_or_path is not None and (is_peft_available() or os.path.isdir(name_or_path)):
        options = {name: kwargs[name] for name in SEARCH_ARGUMENTS if name in kwargs}
        if find_adapter_config_file(name_or_path, **options) is not None:
            source = name_or_path
    if source is not None:
        raise ValueError(f"{source} has an adapter_config.json. {NO_ADAPTERS}")


def check_weight_files(model: nn.Module, files: list[str] | None) -> None:
    """Refuse weights that are no safetensors, or far too small for the model, before the model takes any memory.

    Raises:
        ValueError: As above.
    """
    if files is None:
        return
    if others := [os.path.basename(file) for file in files if not file.endswith(".safetensors")]:
        raise ValueError(f"{others[0]} is not loaded: only safetensors are, since other weight files can run code.")
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    size = sum(os.path.getsize(file) for file in files)
    if numbers > 4 * size + 10**8:
        raise ValueError(f"The config asks for {numbers:,} numbers, but the weight files have {size:,} bytes only.")


def check_loaded_weights(model: nn.Module, info: dict, ignore_mismatched_sizes: bool) -> None:
    """Refuse a loaded model whose weights do not fit the config or are damaged.

    Args:
        model: The model as loaded.
        info: What `from_pretrained` reports of the loading.
        ignore_mismatched_sizes: Whether weights of another shape may be replaced by new ones.

    Raises:
        ValueError: Weights are missing, unexpected, of another shape, NaN or infinite.
    """
    mismatched = [] if ignore_mismatched_sizes else sorted(info["mismatched_keys"])
    replaced = {key for key, *_ in info["mismatched_keys"]}
    wrong = {
        "missing": sorted(set(info["missing_keys"]) - replaced),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": [f"{key} {tuple(found)} instead of {tuple(own)}" for key, found, own in mismatched],
    }
    if any(wrong.values()):
        reasons = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for kind, names in wrong.items()
            if names
        ]
        raise ValueError(f"The weights do not fit the config: {'; '.join(reasons)}.")
    for name, tensor in model.state_dict().items():
        if tensor.dtype in FLOATS and tensor.numel() > 0 and not tensor.is_meta:
            if not all(math.isfinite(value) for value in torch.aminmax(tensor)):
                raise ValueError(f"The weight {name} holds values that are NaN or infinite.")


class RobustPreTrainedModel(PreTrainedModel):
    """What the two models share: initialisation that keeps timm's, saving that needs nothing else to load, and loading
    that refuses what does not fit."""

    _auto_class = (
        "AutoModelForImageClassification"  # so that a part of a model from the Hub is saved with its code, too
    )
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # timm's attention is that of PyTorch; an F_S or F_R of transformers answers for itself
    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer scales it for gradient accumulation

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def _keep_initialisation(self) -> None:
        """Tell transformers not to initialise again what was just built on a real device."""
        for module in self.modules():
            if not any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module._is_hf_initialized = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Recompute activations in the backward pass, through timm's own checkpointing of each backbone.

        The arguments are those of the parent; timm's checkpointing has no settings.
        """
        self._set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._set_grad_checkpointing(False)

    def _set_grad_checkpointing(self, enable: bool) -> None:
        for module in self.modules():
            if hasattr(module, "set_grad_checkpointing"):  # timm's
                module.set_grad_checkpointing(enable)
            elif isinstance(module, PreTrainedModel) and not isinstance(module, RobustPreTrainedModel):
                if module.supports_gradient_checkpointing:  # an F_S or F_R of transformers
                    (module.gradient_checkpointing_enable if enable else module.gradient_checkpointing_disable)()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any part recomputes its activations; timm and transformers have different names for it."""
        names = ("grad_checkpointing", "gradient_checkpointing")
        return any(getattr(module, name, False) for module in self.modules() for name in names)

    @property
    def is_activation_checkpointing(self) -> bool:
        """The newer name of `is_gradient_checkpointing`."""
        return self.is_gradient_checkpointing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        """Load a model; as `PreTrainedModel.from_pretrained`, but from safetensors only, complete and undamaged ones.

        Takes the arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: A field of the config is out of range, the model would be absurdly large, the weights are
                damaged or do not fit the config, or there is an adapter_config.json.
            OSError: There are no weights in safetensors format.
        """
        if not kwargs.pop("use_safetensors", True):
            raise ValueError("use_safetensors=False is not allowed: other weight files can run code.")
        refuse_adapter(pretrained_model_name_or_path, kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs, **options)
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise ValueError(f"The weights are not a valid safetensors file: {error}") from error
            raise
        check_loaded_weights(model, info, ignore_mismatched_sizes)
        return (model, info) if with_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, *args, **kwargs):
        check_weight_files(model, checkpoint_files)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def load_adapter(self, *args, **kwargs) -> None:
        """Refuse adapters, which `from_pretrained` and `pipeline` would load unasked; takes any arguments.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_ADAPTERS)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save weights, config, the code files and an image processor, for all Auto classes and `pipeline`.

        Takes the arguments of `PreTrainedModel.save_pretrained`.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        push, main_process = kwargs.pop("push_to_hub", False), kwargs.get("is_main_process", True)
        if main_process and self.config.image_size is not None:
            create_image_processor(self.config.image_size).save_pretrained(save_directory)
        module = "modeling_dualmoe"
        auto_classes = ("AutoModel", "AutoModelForImageClassification")
        self.config.auto_map = {
            "AutoConfig": f"configuration_dualmoe.{type(self.config).__name__}",
            **{auto: f"{module}.{type(self).__name__}" for auto in auto_classes},
        }
        super().save_pretrained(save_directory, **kwargs)
        if push and main_process:  # the parent's own upload would miss the image processor
            repo_id = hub.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)


def luminance(images: Tensor) -> Tensor:
    """Grey (B, 1, H, W) of RGB images (B, 3, H, W): 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), as Pillow's mode L.

    Written so that grey given as RGB comes back to the bit.
    """
    red, green, blue = images.split(1, dim=1)
    return green + 0.299 * (red - green) + 0.114 * (blue - green)


def create_image_processor(image_size: int) -> CLIPImageProcessor:
    """The processor that turns any picture into what our models take: RGB, resized, centre-cropped, in [0, 1].

    Training images are made by the same rule, without this class: `decoding.resize_and_crop`.
    """
    return CLIPImageProcessor(
        do_convert_rgb=True,
        do_resize=True,
        resample=3,  # bicubic
        size={"shortest_edge": image_size},
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        do_rescale=True,
        do_normalize=False,
    )


# --- mixture of experts ----------------------------------------------------------------------------------------------


def check_same_parameters(own: dict[str, Tensor], given: dict[str, Tensor], target: str) -> None:
    """Raise a ValueError unless weights have the names and shapes of those that they are to replace."""
    wrong = set(own) ^ set(given) | {name for name in set(own) & set(given) if own[name].shape != given[name].shape}
    if wrong:
        raise ValueError(
            f"The source does not fit {target}: {len(wrong)} parameters are missing, unexpected or of another shape, "
            f"such as {', '.join(sorted(wrong)[:5])}."
        )


class MoEForImageClassification(RobustPreTrainedModel):
    """E image classifiers behind a router that sends each image to its k best experts (paper, Section 3).

    k = 1: the output is exactly f_i(x) of the expert with the highest score, at the cost of one expert; the router
    learns through the straight-through weight a_i / stopgrad(a_i). k > 1: the mixture of the k experts' probabilities
    with renormalised weights, as log-probabilities.
    """

    config_class = MoEConfig
    config: MoEConfig

    def __init__(self, config: MoEConfig):
        check_model_size(config)
        super().__init__(config)
        self.normalize = Normalize(config.image_mean, config.image_std)
        self.trunk = Trunk(config)
        self.experts = nn.ModuleList(self._create_expert() for _ in range(config.num_experts))
        self.router = create_router(config, self.trunk.num_features)
        self._keep_initialisation()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if type(module) in INITIALISED_BY_PARENT:
            return
        names = set()  # of what no weight file has filled
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                names.add(name)
        if hasattr(module, "init_non_persistent_buffers"):  # timm 1.0.22 has none
            names -= module._non_persistent_buffers_set
        if names:
            self._refill_from_fresh_backbone(module, names)

    def _refill_from_fresh_backbone(self, module: nn.Module, names: set[str]) -> None:
        """Give these tensors of a part of a backbone the values of a fresh one: the parent knows nothing of them."""
        whole_names = {id(m): name for part in self._backbone_parts() for name, m in part.named_modules()}
        if id(module) not in whole_names:
            return
        with torch.device("cpu"):
            fresh = create_backbone(self.config).get_submodule(whole_names[id(module)])
        for name in names:
            getattr(module, name).copy_(getattr(fresh, name))

    def _backbone_parts(self) -> list[nn.Module]:
        return [*self.experts] if self.trunk.stages is None else [self.trunk.stages, *self.experts]

    def _create_expert(self) -> nn.Module:
        backbone = create_backbone(self.config)
        return backbone if self.trunk.stages is None else cut_backbone(backbone, self.config.shared_stages, "expert")

    @classmethod
    def from_backbone(
        cls,
        config: MoEConfig,
        *,
        pretrained: bool = False,
        init_experts_from: "str | os.PathLike | nn.Module | None" = None,
        **timm_kwargs,
    ) -> "MoEForImageClassification":
        """Build a mixture that starts from trained weights: of one network for trunk and experts, or of a mixture.

        Args:
            config: Configuration of the mixture.
            pretrained: Start from timm's pretrained weights of `config.backbone`.
            init_experts_from: Start every expert from a trained single network ("upcycling"): a timm module of the
                same architecture, or a `MoEForImageClassification` with one expert; or start from a mixture of the
                same shape, whose router is taken over, too. A model, or the folder or Hub id of one; of a
                `MoEForImageClassification` the pixel mean and std are taken over as well.
            timm_kwargs: Passed on to `timm.create_model` with `pretrained=True`.

        Raises:
            ValueError: Both or neither source is given, or the source has other parameters than the backbone, or, with
                several experts, than the mixture.
        """
        if pretrained == (init_experts_from is not None):
            raise ValueError(
                f"Give exactly one source: pretrained={pretrained} and init_experts_from={init_experts_from!r}."
            )
        if pretrained:
            model = cls(config)
            model.load_backbone(create_backbone(config, pretrained=True, **timm_kwargs).state_dict())
            return model
        source = init_experts_from
        if isinstance(source, (str, os.PathLike)):
            source = cls.from_pretrained(source)
        if isinstance(source, cls):  # weights are of use behind the normalisation that they were trained with
            config = copy.deepcopy(config)
            config.image_mean, config.image_std = source.config.image_mean, source.config.image_std
        model = cls(config)
        if isinstance(source, cls) and len(source.experts) > 1:
            check_same_parameters(
                model.state_dict(), source.state_dict(), f"a mixture with num_experts={config.num_experts}"
            )
            model.load_state_dict(source.state_dict())
        else:
            model.load_backbone(source.backbone_state_dict() if isinstance(source, cls) else source.state_dict())
        return model

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The weights of a one-expert model under the names of its whole timm backbone.

        Raises:
            ValueError: The model has several experts.
        """
        if len(self.experts) != 1:
            raise ValueError(f"A single backbone needs num_experts=1; this model has num_experts={len(self.experts)}.")
        trunk = {} if self.trunk.stages is None else self.trunk.stages.state_dict()
        return {**trunk, **self.experts[0].state_dict()}

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Fill the trunk and every expert from the state dict of one whole backbone.

        Raises:
            ValueError: Names or shapes differ from those of the backbone.
        """
        parts = self._backbone_parts()
        own = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
        check_same_parameters(own, state_dict, f"backbone={self.config.backbone!r}")
        for part in parts:
            part.load_state_dict(state_dict, strict=False)  # a part reads its own names only; all were checked above

    def _prepare(self, pixel_values: Tensor) -> Tensor:
        """Check and normalise; a one-channel model also takes RGB (as `pipeline` sends) and sees its luminance."""
        channels = self.config.num_channels
        is_rgb = pixel_values.ndim == 4 and pixel_values.shape[1] == 3
        if channels == 1 and is_rgb and pixel_values.is_floating_point():
            pixel_values = luminance(pixel_values)
        check_pixel_values(pixel_values, channels, self.config.image_size)
        images = self.normalize(pixel_values)
        return images if torch.is_autocast_enabled(images.device.type) else images.to(self.dtype)

    def _encode(self, pixel_values: Tensor, route: bool = True) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) -> trunk output for the experts, and float32 router logits (B, E), 0 unless `route`."""
        images = self._prepare(pixel_values)
        hidden = self.trunk(images)
        if not route:
            return hidden, images.new_zeros(len(images), len(self.experts), dtype=torch.float32)
        router_logits = self.router(hidden if self.config.router == "features" else images)
        return hidden, router_logits.float()

    def route(self, pixel_values: Tensor) -> Tensor:
        """Router logits (B, E), before softmax, of images (B, C, H, W); runs no more than the router needs."""
        images = self._prepare(pixel_values)
        return self.router(self.trunk(images) if self.config.router == "features" else images).float()

    def expert_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every expert (B, E, C), at the cost of E experts, and router logits (B, E) before softmax."""
        hidden, router_logits = self._encode(pixel_values)
        return torch.stack([expert(hidden) for expert in self.experts], dim=1), router_logits

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        expert_index: Tensor | None = None,
        output_router_logits: bool | None = None,
        extra_expert_index: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MoEImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W) floats in [0, 1].
            labels: (B,) int64; with them the output carries the training loss.
            expert_index: (B,) int64: the expert to use for each image instead of the router's choice; -1 leaves the
                choice to the router. So one batch can serve several terms of a loss.
            output_router_logits: Whether to return the router logits; default: the config's.
            extra_expert_index: (B,) int64: an expert whose own logits to return as well, -1 = none. It shares the
                trunk's work with the rest.
            return_dict: False gives a tuple of the fields that are not None. The config's field of this name has no
                effect, since the code around the model reads fields by name.

        Raises:
            ValueError: Wrong shape, dtype or values of an argument.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        balanced = labels is not None or (torch.is_grad_enabled() and self._learns_routes())
        hidden, router_logits = self._encode(pixel_values, route=balanced or wanted or len(self.experts) > 1)
        forced = self._forced_rows("expert_index", expert_index, len(pixel_values))
        extra = self._forced_rows("extra_expert_index", extra_expert_index, len(pixel_values))
        mix = self._hard_route if self.config.router_top_k == 1 else self._soft_route
        logits, index, extra_logits = mix(
            hidden, router_logits, expert_index, forced, None if extra is None else extra_expert_index
        )
        aux_loss, loss = None, None
        if balanced:
            aux_loss = load_balancing_loss(
                router_logits,
                self.config.router_top_k,
                all_processes=self.training and torch.is_grad_enabled(),  # where DDP makes all processes call forward
                rows=None if forced is None else ~forced,
            )
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels)
            loss = F.cross_entropy(logits.float(), labels) + self.config.router_aux_loss_coef * aux_loss
        output = MoEImageClassifierOutput(
            loss, logits, router_logits if wanted else None, index, aux_loss, extra_logits
        )
        return output.to_tuple() if return_dict is False else output

    def _learns_routes(self) -> bool:
        """Whether a balance loss would move any weight; an attack freezes them all."""
        parts = [self.router, self.trunk] if self.config.router == "features" else [self.router]
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def _forced_rows(self, name: str, index: Tensor | None, batch_size: int) -> Tensor | None:
        """(B,) bool: the rows for which the argument `name` names an expert; None where it was not given."""
        if index is None:
            return None
        if index.shape != (batch_size,) or index.dtype != torch.int64:
            raise ValueError(
                f"{name} has shape {tuple(index.shape)} and dtype {index.dtype}; "
                f"expected ({batch_size},) and torch.int64."
            )
        if not values_are_trusted():
            low, high = (int(v) for v in torch.aminmax(index))
            if low < -1 or high >= len(self.experts):
                raise ValueError(f"{name} lies in [{low}, {high}]; expected -1 or values below {len(self.experts)}.")
        return index >= 0

    def _hard_route(
        self,
        hidden: Tensor,
        router_logits: Tensor,
        expert_index: Tensor | None,
        forced: Tensor | None,
        extra: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """k = 1: logits (B, C) of one expert per image, its index (B,), and the logits (B, C) of the extra experts."""
        index = router_logits.argmax(dim=1)
        if forced is not None:
            index = torch.where(forced, expert_index, index)
        logits, extra_logits = self._run_experts(hidden, index, None, extra)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.router.parameters()):
            # exp(log a - stopgrad(log a)) = a / stopgrad(a): exactly 1, with the gradient of log a
            log_gate = router_logits.log_softmax(dim=1).gather(1, index[:, None])
            weight = torch.exp(log_gate - log_gate.detach())
            if forced is not None:
                weight = torch.where(forced[:, None], torch.ones_like(weight), weight)
            logits = logits * weight.to(logits.dtype)
        return logits, index, extra_logits

    def _soft_route(
        self,
        hidden: Tensor,
        router_logits: Tensor,
        expert_index: Tensor | None,
        forced: Tensor | None,
        extra: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """k > 1: log-probabilities (B, C) of the mixture, its experts (B, k), logits (B, C) of the extra ones."""
        batch_size, top_k = len(hidden), self.config.router_top_k
        values, index = router_logits.topk(top_k, dim=1)
        if top_k == len(self.experts) and forced is None:  # all experts see all rows: nothing to sort
            by_expert = self._run_all(hidden)
            log_gate = router_logits.log_softmax(dim=1)
            logits = (log_gate[:, :, None] + by_expert.float().log_softmax(dim=2)).logsumexp(dim=1)
            if extra is None:
                return logits, index, None
            return logits, index, pick_expert(by_expert, extra)
        log_gate = values.log_softmax(dim=1)
        used = torch.ones_like(index, dtype=torch.bool)
        if forced is not None:  # a forced row uses its first slot only, with weight 1
            index = torch.where(forced[:, None], expert_index[:, None], index)
            used[:, 1:] = ~forced[:, None]
            only_first = torch.zeros_like(log_gate).masked_fill(~used, -torch.inf)
            log_gate = torch.where(forced[:, None], only_first, log_gate)
        if shapes_are_static():
            return self._mix_all(hidden, index, used, log_gate, extra)
        slot = used.flatten().nonzero().squeeze(1)
        rows = torch.arange(batch_size, device=hidden.device).repeat_interleave(top_k)
        expert_logits, extra_logits = self._run_experts(hidden, index.flatten()[slot], rows[slot], extra)
        expert_log_probs = expert_logits.float().log_softmax(dim=1)
        by_slot = expert_log_probs.new_zeros(batch_size * top_k, expert_log_probs.shape[1])
        by_slot = by_slot.index_copy(0, slot, expert_log_probs).view(batch_size, top_k, -1)
        return (log_gate[:, :, None] + by_slot).logsumexp(dim=1), index, extra_logits

    def _run_experts(
        self, hidden: Tensor, expert_of: Tensor, rows: Tensor | None, extra: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`_dispatch`, and with it one more expert `extra` (B,) for each row, -1 = none: (N, C) and (B, C) logits."""
        if shapes_are_static() and not (extra is None and len(self.experts) == 1):
            by_expert = self._run_all(hidden, self._uses(expert_of[:, None], extra))
            return pick_expert(by_expert, expert_of), None if extra is None else pick_expert(by_expert, extra)
        if extra is None:
            return self._dispatch(hidden, expert_of, rows), None
        wanted = (extra >= 0).nonzero().squeeze(1)
        rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
        outputs = self._dispatch(hidden, torch.cat([expert_of, extra[wanted]]), torch.cat([rows, wanted]))
        logits, found = outputs.split([len(expert_of), len(wanted)])
        return logits, found.new_zeros(len(hidden), found.shape[1]).index_copy(0, wanted, found)

    def _dispatch(self, hidden: Tensor, expert_of: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run each expert once on its group of rows.

        Args:
            hidden: (B, ...) trunk output.
            expert_of: (N,) the expert of each unit of work.
            rows: (N,) the row of `hidden` of each unit of work; None = row n for unit n.

        Returns:
            (N, C) logits in the order of `expert_of`.
        """
        if rows is None and len(self.experts) == 1:
            return self._run_expert(0, hidden)
        sizes = torch.bincount(expert_of, minlength=len(self.experts)).tolist()
        if rows is None and max(sizes) == len(hidden):  # one group: nothing to sort or copy
            return self._run_expert(sizes.index(len(hidden)), hidden)
        order = expert_of.argsort(stable=True)
        groups = hidden[order if rows is None else rows[order]].split(sizes)
        outputs = [self._run_expert(i, group) for i, group in enumerate(groups) if len(group) > 0]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return torch.cat(outputs)[back]

    def _mix_all(
        self, hidden: Tensor, index: Tensor, used: Tensor, log_gate: Tensor, extra: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_soft_route` in static shapes, from the experts of each row, which of them it uses, and their log weights,
        (B, k) each."""
        by_expert = self._run_all(hidden, self._uses(index, extra, used))
        nowhere = log_gate.new_full((len(hidden), len(self.experts)), -torch.inf)
        # a slot that is not used may name an expert twice: the larger weight, that of the used slot, counts
        log_weights = nowhere.scatter_reduce(1, index, log_gate.masked_fill(~used, -torch.inf), "amax")
        logits = (log_weights[:, :, None] + by_expert.float().log_softmax(dim=2)).logsumexp(dim=1)
        return logits, index, None if extra is None else pick_expert(by_expert, extra)

    def _uses(self, index: Tensor, extra: Tensor | None, used: Tensor | None = None) -> Tensor:
        """(B, E): how often each row goes to each expert, from `index` (B, k), where `used`, and `extra` (B,)."""
        ones = torch.ones_like(index, dtype=torch.float32) if used is None else used.float()
        counts = ones.new_zeros(len(index), len(self.experts)).scatter_add(1, index, ones)
        if extra is None:
            return counts
        return counts.scatter_add(1, extra.clamp_min(0)[:, None], (extra >= 0).float()[:, None])

    def _run_all(self, hidden: Tensor, uses: Tensor | None = None) -> Tensor:
        """Logits (B, E, C) of every expert; BatchNorm counts each row as often as `uses` (B, E) says, once if None."""
        outputs = []
        for i, expert in enumerate(self.experts):
            with weighted_batchnorm(expert, None if uses is None else uses[:, i]):
                outputs.append(self._run_expert(i, hidden))
        return torch.stack(outputs, dim=1)

    def _run_expert(self, i: int, hidden: Tensor) -> Tensor:
        with single_row_mode(self.experts[i], len(hidden)):
            return self.experts[i](hidden)


# --- dual model ------------------------------------------------------------------------------------------------------


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
    return torch.logaddexp((1 - alpha).log() + log_standard, alpha.log() + log_robust)


class DualMoEForImageClassification(RobustPreTrainedModel):
    """The dual model F_D(x) = (1 - alpha) F_S(x) + alpha F_R(x) of a standard and a robust classifier (paper, Eq. 7).

    alpha = 0 is F_S alone, alpha = 1 is F_R alone; `set_alpha` or `forward(..., alpha=)` turn the dial at run time.
    With mixing="weights" the dial is in the weights: see `merging_dualmoe` and `merge`.
    """

    config_class = DualMoEConfig
    config: DualMoEConfig

    def __init__(self, config: DualMoEConfig):
        super().__init__(config)
        self.standard = create_component(config.standard, config)
        self.robust = create_component(config.robust, config)
        self._create_normalizers()
        self._keep_initialisation()
        self.post_init()

    def _create_normalizers(self) -> None:
        for name in ("standard", "robust"):
            mean, std = getattr(self.config, f"{name}_image_mean"), getattr(self.config, f"{name}_image_std")
            normalizer = nn.Identity() if mean is None or std is None else Normalize(mean, std)
            size = side_of(name, getattr(getattr(self.config, name), "image_size", None))
            if self.config.input_size not in (None, size):
                normalizer = nn.Sequential(Resize(size), normalizer)
            setattr(self, f"normalize_{name}", normalizer)

    @classmethod
    def from_models(
        cls, standard: PreTrainedModel, robust: PreTrainedModel, alpha: float = 0.75, **config_kwargs
    ) -> "DualMoEForImageClassification":
        """Join two trained image classifiers; any model that `AutoModelForImageClassification` gives will do.

        Args:
            standard: F_S.
            robust: F_R, with the same labels in the same order.
            alpha: Weight of F_R in [0, 1].
            config_kwargs: Further fields of `DualMoEConfig`, such as `standard_image_mean` and `standard_image_std`
                for a model that expects normalised images, or `mixing`.

        Raises:
            ValueError: The two disagree on labels, image size or channels, alpha is out of range, mixing="weights" and
                they cannot be merged, or one could not be built again from its config, as loading will.
        """
        named = common_labels(standard.config.id2label, robust.config.id2label)
        config_kwargs = {"id2label": named, "label2id": {name: i for i, name in named.items()}, **config_kwargs}
        configs = copy.deepcopy((standard.config, robust.config))
        for config, model in zip(configs, (standard, robust), strict=True):
            config.architectures = [type(model).__name__]  # transformers has two classes for some model types
        config = cls.config_class(standard=configs[0], robust=configs[1], alpha=alpha, **config_kwargs)
        with torch.device("meta"):  # no second copy of the weights
            joined = cls(config)
        for name, model in (("standard", standard), ("robust", robust)):
            target = f"a {type(getattr(joined, name)).__name__} of {name}.config, which would be built on loading"
            check_same_parameters(getattr(joined, name).state_dict(), model.state_dict(), target)
        joined.standard = standard
        joined.robust = copy.deepcopy(robust) if robust is standard else robust  # shared tensors cannot be saved
        joined._create_normalizers()
        if joined.config.mixing == "weights":
            joined._check_mergeable()
        return joined.train(standard.training)

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the two components' dtypes, in which both are saved and loaded again: nothing is rounded."""
        return torch.promote_types(self.standard.dtype, self.robust.dtype)

    def set_alpha(self, alpha: float) -> None:
        """Turn the dial: the weight of F_R in [0, 1], from now on and in what is saved.

        Raises:
            ValueError: alpha is out of range.
        """
        check_alpha(alpha)
        forget_merge(self)
        self.config.alpha = float(alpha)

    def set_mixing(self, mixing: str) -> None:
        """Say what alpha mixes, from now on and in what is saved: "probs", "logits" or "weights".

        Raises:
            ValueError: There is no such mixing, or F_S and F_R cannot be merged.
        """
        check_choice("mixing", mixing, MIXINGS)
        if mixing == "weights":
            self._check_mergeable()
        self.config.mixing = mixing

    def merge(self, alpha: float | None = None) -> PreTrainedModel:
        """The network with weights and BatchNorm statistics (1 - alpha) theta_S + alpha theta_R, as a plain model.

        Of the class of F_R, in eval mode, with weights of its own: to be saved, attacked or trained like any other.
        Images that F_R gets normalised by `robust_image_mean` and `robust_image_std` must be given to it so.

        Args:
            alpha: Weight of F_R in [0, 1]; None = the config's.

        Raises:
            ValueError: alpha is out of range, or F_S and F_R cannot be merged; the message says why.
        """
        alpha = self._merging_alpha(alpha)
        self._check_mergeable()
        return self._interpolated(alpha)

    def _interpolated(self, alpha: float) -> PreTrainedModel:
        self._refuse_unmergeable()
        model = interpolate(self.standard, self.robust, alpha)
        model.config.id2label, model.config.label2id = dict(self.config.id2label), dict(self.config.label2id)
        return model

    @torch.compiler.disable
    def merged_network(self, alpha: float | None = None) -> PreTrainedModel | None:
        """With mixing="weights" the network that answers, kept until alpha or a weight changes; else None.

        Writes through `tensor.data` are only seen after `set_alpha`, `train` or `eval`.
        """
        if self.config.mixing != "weights":
            return None
        alpha = self._merging_alpha(alpha)
        return cached_merge(self, (self.standard, self.robust), alpha, make=lambda: self._interpolated(alpha))

    def _refuse_unmergeable(self) -> None:
        obstacles = self.config.merge_obstacles() or weights_obstacles(self.standard, self.robust)
        if obstacles:
            raise ValueError(f"F_S and F_R cannot be merged: {'; '.join(obstacles)}.")

    def _check_mergeable(self) -> None:
        """Refuse what cannot be merged; warn where it can, but hardly to any use."""
        self._refuse_unmergeable()
        cosine = weights_cosine(self.standard, self.robust)
        if cosine < UNRELATED:
            logger.warning_once(
                f"F_S and F_R look trained apart (cosine of their weights {cosine:.3f}). Between networks without a "
                "common start there is none that is of use; see what `sweep_alpha` measures there."
            )

    def _merging_alpha(self, alpha: float | Tensor | None) -> float:
        """The one position of the dial that a network can have."""
        alpha = self.config.alpha if alpha is None else alpha
        check_alpha(alpha)
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise ValueError(
                f"alpha has shape {tuple(alpha.shape)}, but with mixing='weights' one network answers for all images: "
                "give one number."
            )
        return float(alpha)

    def train(self, mode: bool = True) -> "DualMoEForImageClassification":
        """As `nn.Module.train`; a merged network is made anew at the next call."""
        forget_merge(self)
        return super().train(mode)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        alpha: float | Tensor | None = None,
        expert_index: Tensor | None = None,
        robust_pixel_values: Tensor | None = None,
        output_router_logits: bool | None = None,
        extra_expert_index: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> DualMoEImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images with both models and mix; with mixing="weights" with the merged network alone.

        Args:
            pixel_values: (B, C, H, W) floats in [0, 1].
            labels: (B,) int64; with them the output carries the training loss.
            alpha: Weight of F_R for this call: a number in [0, 1], or (not with mixing="weights") a tensor that
                broadcasts against (B, 1); None = the config's.
            expert_index: As in `MoEForImageClassification.forward`, for F_R or the merged network.
            robust_pixel_values: (B', C, H, W) other images for F_R: training shows F_S clean and F_R attacked images
                in one call, so that DDP sees one forward; there is then no mixture and `logits` is None.
            output_router_logits: Whether to return the router logits.
            extra_expert_index: As in `MoEForImageClassification.forward`, for F_R.
            return_dict: As in `MoEForImageClassification.forward`.

        Raises:
            ValueError: Wrong shape, dtype or values of an argument; or, with mixing="weights", the model is in train
                mode or was given what only training needs.
        """
        if self.config.mixing == "weights":
            self._refuse_training(robust_pixel_values, extra_expert_index)
            output = self._forward_merged(pixel_values, labels, alpha, expert_index, output_router_logits)
            return output.to_tuple() if return_dict is False else output
        alpha = self.config.alpha if alpha is None else alpha
        check_alpha(alpha)
        if isinstance(alpha, Tensor) and alpha.numel() != 1 and alpha.shape != (len(pixel_values), 1):
            raise ValueError(
                f"alpha has shape {tuple(alpha.shape)}; expected one number, or ({len(pixel_values)}, 1)."
            )
        own_images = robust_pixel_values is None
        robust_labels = labels if own_images else None
        standard = self._run("standard", pixel_values, labels, None, output_router_logits)
        robust = self._run(
            "robust",
            pixel_values if own_images else robust_pixel_values,
            robust_labels,
            expert_index,
            output_router_logits,
            extra_expert_index,
        )
        parts = [self._weighted_aux_loss("standard", standard), self._weighted_aux_loss("robust", robust)]
        parts = [part for part in parts if part is not None]
        aux_loss = sum(parts) if parts else None
        logits, loss = None, None
        if own_images:
            logits = self.mix(standard.logits, robust.logits, alpha)
            if labels is not None:
                check_labels(labels, len(pixel_values), self.config.num_labels)
                loss = F.cross_entropy(logits, labels) + (0 if aux_loss is None else aux_loss)
        output = DualMoEImageClassifierOutput(
            loss=loss,
            logits=logits,
            standard_logits=standard.logits,
            robust_logits=robust.logits,
            standard_router_logits=standard.get("router_logits"),
            robust_router_logits=robust.get("router_logits"),
            standard_expert_index=standard.get("expert_index"),
            robust_expert_index=robust.get("expert_index"),
            aux_loss=aux_loss,
            robust_extra_logits=robust.get("extra_logits"),
        )
        return output.to_tuple() if return_dict is False else output

    def _refuse_training(self, robust_pixel_values: Tensor | None, extra_expert_index: Tensor | None) -> None:
        if self.training or robust_pixel_values is not None or extra_expert_index is not None:
            raise ValueError(
                "mixing='weights' is a dial for trained models: no gradient reaches F_S and F_R. Train with "
                "mixing='probs' and call set_mixing('weights') then, or train the network that merge() gives."
            )

    def _forward_merged(
        self,
        pixel_values: Tensor,
        labels: Tensor | None,
        alpha: float | Tensor | None,
        expert_index: Tensor | None,
        output_router_logits: bool | None,
    ) -> DualMoEImageClassifierOutput:
        network = self.merged_network(alpha)
        output = self._run("robust", pixel_values, labels, expert_index, output_router_logits, network=network)
        logits, aux_loss, loss = output.logits.float(), self._weighted_aux_loss("robust", output), None
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels)
            loss = F.cross_entropy(logits, labels) + (0 if aux_loss is None else aux_loss)
        return DualMoEImageClassifierOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            router_logits=output.get("router_logits"),
            expert_index=output.get("expert_index"),
        )

    def mix(self, standard_logits: Tensor, robust_logits: Tensor, alpha: float | Tensor | None = None) -> Tensor:
        """`mix_logits` under this model's logit maps, mixing rule and (by default) alpha."""
        alpha = self.config.alpha if alpha is None else alpha
        standard_logits = apply_logit_map(standard_logits, self.config.standard_logit_map)
        robust_logits = apply_logit_map(robust_logits, self.config.robust_logit_map)
        return mix_logits(standard_logits, robust_logits, alpha, self.config.mixing)

    def _run(
        self,
        name: str,
        pixel_values: Tensor,
        labels: Tensor | None,
        expert_index: Tensor | None,
        output_router_logits: bool | None,
        extra_expert_index: Tensor | None = None,
        network: nn.Module | None = None,
    ) -> ModelOutput:
        model = getattr(self, name) if network is None else network
        if has_experts(model):  # labels only tell it that its balance loss is wanted
            return model(pixel_values, labels, expert_index, output_router_logits, extra_expert_index)
        if expert_index is not None or extra_expert_index is not None:
            raise ValueError(f"expert_index was given, but the {name} model has no experts.")
        check_pixel_values(pixel_values, getattr(model.config, "num_channels", 3), self.config.input_size)
        output = model(getattr(self, f"normalize_{name}")(pixel_values).to(model.dtype))
        return ModelOutput(logits=output[0]) if isinstance(output, tuple) else output  # config.return_dict=False

    def _weighted_aux_loss(self, name: str, output: ModelOutput) -> Tensor | None:
        if output.get("aux_loss") is None:
            return None
        return getattr(self.config, name).router_aux_loss_coef * output.aux_loss


def common_labels(standard: dict[int, str], robust: dict[int, str]) -> dict[int, str]:
    """The label names of two components: those of the one that has any, or of both where they agree.

    Raises:
        ValueError: They disagree.
    """
    generic = [all(name == f"LABEL_{i}" for i, name in names.items()) for names in (standard, robust)]
    if standard != robust and not (any(generic) and len(standard) == len(robust)):
        raise ValueError(f"standard has labels {standard} but robust has {robust}; they must agree in order.")
    return {i: str(name) for i, name in (standard if generic[1] else robust).items()}


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


def has_experts(model: nn.Module) -> bool:
    """Whether `model` is our mixture of experts; by name, since remote code has a class of its own."""
    return getattr(model.config, "model_type", None) == MoEConfig.model_type


def create_component(config: PreTrainedConfig, dual_config: DualMoEConfig) -> PreTrainedModel:
    """Build F_S or F_R with the dual model's number of labels."""
    if config.num_labels != dual_config.num_labels:
        config.num_labels = dual_config.num_labels
    if config.model_type == MoEConfig.model_type:
        return MoEForImageClassification(config)
    with limited_size():
        AutoModelForImageClassification.from_config(config)
    return AutoModelForImageClassification.from_config(config)


__all__ = [
    "DualMoEForImageClassification",
    "DualMoEImageClassifierOutput",
    "MoEForImageClassification",
    "MoEImageClassifierOutput",
    "apply_logit_map",
    "gate_weights",
    "load_balancing_loss",
    "mix_logits",
]
