"""timm networks as trunk and experts: create them, change stem and width, cut them in two, limit their size.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import ResNet, is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from .batchnorm_dualmoe import single_row_mode
from .configuration_dualmoe import MoEConfig
from .lipschitz_dualmoe import LIPSCHITZ_BACKBONES, create_lipschitz_backbone

# what a config from a stranger may ask for before it is refused: far above any published vision model
MAX_PARAMETERS = 20_000_000_000  # of all experts
MAX_TENSORS = 10_000  # of one network


def create_backbone(config: MoEConfig, pretrained: bool = False, **timm_kwargs: Any) -> nn.Module:
    """Build one whole timm or 1-Lipschitz network with the config's classes, channels, size, width and stem.

    Args:
        config: Configuration of the mixture.
        pretrained: Whether timm loads its pretrained weights (before the stem is replaced).
        timm_kwargs: Passed on to `timm.create_model`, such as `pretrained_cfg_overlay={"file": path}`.

    Raises:
        ValueError: The backbone is unknown, or does not take the stem or width asked for.
    """
    if config.backbone in LIPSCHITZ_BACKBONES:
        return create_lipschitz_backbone(config, pretrained)
    check_timm_name(config.backbone)
    is_resnet = is_timm_resnet(config.backbone)
    if config.width is not None and (pretrained or not is_resnet):
        no_resnet = f"backbone={config.backbone!r} is no timm ResNet"
        reason = "pretrained weights have full width" if pretrained else no_resnet
        raise ValueError(f"width={config.width!r} cannot be used: {reason}.")
    channels = None if config.width is None else stage_channels(config.width)
    kwargs = {**timm_arguments(config, channels), **timm_kwargs}
    try:
        backbone = timm.create_model(config.backbone, pretrained=pretrained, **kwargs)
    except Exception as error:  # timm checks little itself: wrong arguments end in all kinds of errors
        if pretrained and not isinstance(error, (TypeError, AssertionError)):
            raise  # of the download
        raise ValueError(
            f"backbone={config.backbone!r} does not accept the arguments {kwargs} (see backbone_kwargs): {error}"
        ) from error
    if is_resnet:
        adapt_resnet_stem(backbone, config, stem_channels=None if channels is None else channels[0])
    return backbone


def check_timm_name(name: str) -> None:
    """Raise a ValueError unless timm has a model of this name, with or without the tag of pretrained weights."""
    arch = name.split(".")[0]
    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch, [*LIPSCHITZ_BACKBONES, *timm.list_models()], n=3)
        suggestion = f"; did you mean {', '.join(close)}?" if close else "."
        raise ValueError(f"backbone={name!r} is not a timm model{suggestion}")


def is_timm_resnet(name: str) -> bool:
    """Whether a model of timm is one of its ResNets, whose stem and width can be changed."""
    return is_model_in_modules(name.split(".")[0], ("resnet",))


def timm_arguments(config: MoEConfig, channels: tuple[int, ...] | None) -> dict[str, Any]:
    """The arguments of `timm.create_model` for a config, with the stage channels of a ResNet unless None."""
    arguments = {"num_classes": config.num_labels, "in_chans": config.num_channels, **config.backbone_kwargs}
    pretrained_cfg = timm.get_pretrained_cfg(config.backbone)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:  # ViTs: the position embedding needs the size
        arguments.setdefault("img_size", config.backbone_image_size or config.image_size)
    if channels is not None:
        arguments["channels"] = channels
    return arguments


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
        resnet.maxpool = nn.Identity()  # small images have no pixels to spare
    elif narrowed:
        if not isinstance(resnet.conv1, nn.Conv2d):
            raise ValueError("width cannot narrow a deep stem (resnet*d, *c, *s, *t); use stem='cifar'.")
        resnet.conv1 = new_conv(config.num_channels, channels, kernel_size=7, stride=2, padding=3)
    if narrowed:
        resnet.bn1 = type(resnet.bn1)(channels)  # backbone_kwargs may ask for another norm_layer
        block = resnet.layer1[0]
        kernel_size, padding = block.conv1.kernel_size, block.conv1.padding
        block.conv1 = new_conv(channels, block.conv1.out_channels, kernel_size=kernel_size, padding=padding)
        out_channels = resnet.feature_info[1]["num_chs"]  # entry 0 is the stem, entry n the output of stage n
        if channels == out_channels:
            block.downsample = None  # equal channels and stride 1: the identity fits
        else:
            position = next(i for i, m in enumerate(block.downsample) if isinstance(m, nn.Conv2d))
            block.downsample[position] = new_conv(channels, out_channels, kernel_size=1)


def new_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, ...],
    stride: int = 1,
    padding: int | tuple[int, ...] = 0,
) -> nn.Conv2d:
    """A bias-free convolution, initialised as timm initialises those of its ResNets."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


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
        setattr(parent, name, nn.Sequential())  # empty: timm's checkpointing goes through the layers of a stage
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
