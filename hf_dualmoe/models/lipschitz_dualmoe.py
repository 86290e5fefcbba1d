"""1-Lipschitz layers and backbones, whose robustness can be proved.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_dualmoe import MoEConfig

try:  # trains the 1-Lipschitz backbones; a trained one needs torch alone
    from deel.torchlip.normalizers import bjorck_normalization, spectral_normalization
except ImportError:
    bjorck_normalization = spectral_normalization = None


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
            # norm below 1, where Bjorck converges
            weight = bjorck_normalization(matrix / (norm + 1e-3)).view_as(self.weight)
            # where windows overlap, the operator's norm may be above its matrix's
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
        stride, padding = self.stride, self.padding
        with torch.no_grad():
            image = self.top_image
            for _ in range(2):  # two steps are enough: `top_image` is kept from forward to forward
                image = F.conv2d(image, weight, stride=stride, padding=padding)
                image = torch.nn.grad.conv2d_input(self.top_image.shape, weight, image, stride, padding)
                image = image / image.norm().clamp_min(1e-12)
            self.top_image.copy_(image)
        return F.conv2d(image, weight, stride=stride, padding=padding).norm()  # with gradient, unlike the iteration

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
    for before, after in zip(sizes, hidden_sizes, strict=False):  # `sizes` has one more, for the last layer
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
