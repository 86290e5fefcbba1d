"""Encoded images -> one uint8 array, whatever their format, mode, size or damage."""

import io
import math
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

MAX_RAM_BYTES = 2 * 1024**3  # more decoded images than this live in a temporary file (in TMPDIR), paged in as needed


def decode_images(
    encoded: Iterable[Mapping[str, Any]], total: int, *, image_size: int | None = None, num_channels: int | None = None
) -> tuple[Tensor, dict[int, str]]:
    """Decodes images of any format and mode that Pillow reads; one bad image does not lose the others.

    Args:
        encoded: images as `datasets.Image(decode=False)` gives them: `bytes` or, where that is None, a file's `path`.
        total: number of images.
        image_size, num_channels: see `load_splits`.

    Returns:
        The decoded images in their order, uint8 (M, C, H, W), and position -> reason for the `total` - M bad ones.

    Raises:
        ValueError: no image can be decoded, or images differ in shape and no argument says which one to make.
    """
    if num_channels not in (None, 1, 3):
        raise ValueError(f"num_channels={num_channels}; allowed are 1 (grey) and 3 (RGB)")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}; allowed is >= 1")
    array, done, failures = None, 0, {}
    for position, image in enumerate(tqdm(encoded, "decoding", total, disable=total <= 2_000)):
        try:
            pixels = _decode_image(image, image_size, num_channels)
        except Exception as error:  # damage shows as OSError, SyntaxError, struct.error, DecompressionBombError, ...
            failures[position] = f"{type(error).__name__}: {error}"
            continue
        if array is None:
            array = _allocate((total, len(pixels), pixels.shape[2], pixels.shape[2]))
            if len(pixels) == 3:
                num_channels = 3  # grey images become RGB; but colour after a grey image is refused below
        if pixels.shape != array.shape[1:]:
            raise ValueError(
                f"image {position} of {total} is (channels, height, width) = {pixels.shape}, but from the first image "
                f"{array.shape[1:]} was expected; set image_size or num_channels"
            )
        array[done] = pixels
        done += 1
    if array is None:
        raise ValueError(f"none of {total} images can be decoded: {failures.get(0)}")
    return torch.from_numpy(array[:done]), failures


def _decode_image(encoded: Mapping[str, Any], image_size: int | None, num_channels: int | None) -> np.ndarray:
    """Returns uint8 (C, H, W); C is 1 for a grey image, else 3, if `num_channels` is None."""
    with Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("floating-point image: its range is unknown")
        if image.mode.startswith("I"):  # 16 bit ("I" too, in practice); convert() would clip it, not scale
            image = Image.fromarray(np.rint(np.clip(image, 0, 65535) / 257).astype(np.uint8))
        grey = num_channels == 1 or (num_channels is None and image.mode in ("1", "L", "LA", "La"))
        image = image.convert("L" if grey else "RGB")  # drops transparency, as `pipeline` does
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)  # antialiased
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    if math.prod(shape) <= MAX_RAM_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # has no name; the mapping keeps it alive after it is closed
        return np.memmap(file, np.uint8, "w+", shape=shape)


__all__ = ["MAX_RAM_BYTES", "decode_images"]
