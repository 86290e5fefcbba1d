"""What goes into a model: images in [0, 1] and labels, checked; their normalisation; the image processor.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPImageProcessor

RANGE_TOLERANCE = 1e-5  # x * (1 / 255) rounds to just above 1
_trusts_values: ContextVar[bool] = ContextVar("trusts_values", default=False)


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
    # a meta tensor has no values: such models are built to see their size
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


def check_expert_index(name: str, index: Tensor | None, batch_size: int, num_experts: int) -> None:
    """Refuse anything but None, or one expert per image: int64 (B,) in [-1, num_experts), -1 where none is named.

    Raises:
        ValueError: Shape, dtype or values are wrong; the message names what is allowed.
    """
    if index is None:
        return
    if index.shape != (batch_size,) or index.dtype != torch.int64:
        raise ValueError(
            f"{name} has shape {tuple(index.shape)} and dtype {index.dtype}; expected ({batch_size},) and torch.int64."
        )
    if values_are_trusted():
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < -1 or high >= num_experts:
        raise ValueError(f"{name} lies in [{low}, {high}]; expected -1 or values below {num_experts}.")


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
        return functional.interpolate(images, size=self.size, mode="bilinear", align_corners=False, antialias=True)


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


__all__ = ["Normalize", "create_image_processor", "luminance", "trusted_values", "values_are_trusted"]
