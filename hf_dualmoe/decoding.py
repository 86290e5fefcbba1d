"""Encoded images -> one uint8 array, whatever their format, mode, size or damage.

What becomes of an image is the same for all of them:

- 8 bits per value stay as they are; 16 bits are scaled (a 32-bit integer image is taken for 16 bits).
- Grey, black-and-white and palette images, CMYK, YCbCr and HSV are converted to RGB, or to grey where that is asked
  for; transparency is dropped, as `pipeline` does: the colour below it shows.
- Of an animation or a file with several pages the first is taken.
- The orientation that a camera noted is applied.
- With an `image_size`, the largest central square is resized to it, however long or small the image is, 1 x 1 too.
- Refused, with the reason: damaged or truncated files, floating-point images (their range is unknown), colour spaces
  that Pillow cannot convert, more than twice `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb), EPS (Pillow would
  start another program), paths that are no regular file, and rows without an image.
"""

import io
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

MAX_RAM_BYTES = 2 * 1024**3  # more decoded images than this live in a temporary file (in TMPDIR), paged in as needed
MAX_IMAGE_SIZE = 4096  # side in pixels, as in `MoEConfig`
Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]


def decode_images(
    encoded: Iterable[Mapping[str, Any]],
    total: int,
    *,
    image_size: int | None = None,
    num_channels: int | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[Tensor, dict[int, str]]:
    """Decodes images of any format and mode that Pillow reads; one bad image does not lose the others.

    Args:
        encoded: images as `datasets.Image(decode=False)` gives them: `bytes` or, where that is None, a file's `path`.
        total: number of images.
        image_size, num_channels: see `load_splits`.
        rows: numbers by which messages call the images; default: 0 .. total - 1.

    Returns:
        The decoded images in their order, uint8 (M, C, H, W), and position -> reason for the `total` - M bad ones.

    Raises:
        ValueError: no image can be decoded, or images differ in shape and no argument says which one to make.
    """
    if num_channels not in (None, 1, 3):
        raise ValueError(f"num_channels={num_channels}; allowed are 1 (grey) and 3 (RGB)")
    if image_size is not None and not (isinstance(image_size, int) and 1 <= image_size <= MAX_IMAGE_SIZE):
        raise ValueError(f"image_size={image_size!r}; allowed is >= 1 and <= {MAX_IMAGE_SIZE}, an integer")
    array, done, failures = None, 0, {}
    for position, image in enumerate(tqdm(encoded, "decoding", total, disable=total <= 2_000)):
        try:
            pixels = _decode_image(image, image_size, num_channels)
        except Exception as error:  # damage shows as OSError, SyntaxError, struct.error, DecompressionBombError, ...
            failures[position] = f"{_name(image)}{type(error).__name__}: {error}"
            continue
        if array is None:
            array = _allocate((total, len(pixels), pixels.shape[2], pixels.shape[2]))
            if len(pixels) == 3:
                num_channels = 3  # grey images become RGB; but colour after a grey image is refused below
        if pixels.shape != array.shape[1:]:
            raise ValueError(
                f"{_name(image)}image {position if rows is None else rows[position]} of {total} is (channels, height, "
                f"width) = {pixels.shape}, but from the first image {array.shape[1:]} was expected; set image_size or "
                "num_channels"
            )
        array[done] = pixels
        done += 1
    if array is None:
        raise ValueError(f"none of {total} images can be decoded: {failures.get(0)}")
    return torch.from_numpy(array[:done]), failures


def _name(encoded: Mapping[str, Any] | None) -> str:
    """The file of an image as the beginning of a message, where it is known."""
    path = (encoded or {}).get("path")
    return f"{path}: " if path else ""


def _open(encoded: Mapping[str, Any] | None) -> Image.Image:
    """Opens an image in one of `FORMATS`; a path must be a regular file: a pipe or device could block for ever."""
    data, path = (encoded or {}).get("bytes"), (encoded or {}).get("path")
    if data is None and path is None:
        raise ValueError("the row holds no image")
    if data is None and not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    try:
        return Image.open(path if data is None else io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # its own message names an object in memory
        size = os.path.getsize(path) if data is None else len(data)
        raise ValueError(f"no image that can be read ({size} bytes)") from error


def _decode_image(encoded: Mapping[str, Any] | None, image_size: int | None, num_channels: int | None) -> np.ndarray:
    """Returns uint8 (C, H, W); C is 1 for a grey image, else 3, if `num_channels` is None."""
    with _open(encoded) as image:
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
