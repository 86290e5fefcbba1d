"""Encoded images -> one uint8 array, whatever their format, mode, size or damage.

One rule for training, evaluation, the demo page and a saved model: a picture becomes what `pipeline` with the image
processor of `create_image_processor` makes of it, within rounding; what cannot become that is refused.

- The orientation that a camera noted is applied.
- Grey, black-and-white and palette images, CMYK, YCbCr and HSV are converted to RGB; transparency is dropped: the
  colour below it shows. Of an animation or a file with several pages the first is taken.
- With an `image_size`, the shorter side is resized to it (bicubic, antialiased) and the centre is cropped, however
  long or small the image is, 1 x 1 too. An image of that size already keeps every bit.
- Where grey is asked for, it is the luminance of the resized colours, 0.299 R + 0.587 G + 0.114 B.
- Refused, with the reason: damaged or truncated files; 16- and 32-bit and floating-point images (`pipeline` clips them
  at 255); colour spaces that Pillow cannot convert; more than twice `PIL.Image.MAX_IMAGE_PIXELS` (a decompression
  bomb); EPS (Pillow would start another program); paths that are no regular file; rows without an image.
"""

import io
import math
import os
import sys
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
GREY_MODES = ("1", "L", "LA", "La")
# EPS starts another program; Pillow knows the others by name but cannot show them
UNREADABLE_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()  # registers all plug-ins, which Pillow loads late: Image.OPEN has few of them before


def decode_images(
    encoded: Iterable[Mapping[str, Any]],
    total: int,
    *,
    image_size: int | None = None,
    num_channels: int | None = None,
    rows: Sequence[int] | None = None,
    progress: bool = False,
) -> tuple[Tensor, dict[int, str]]:
    """Decodes images of any format and mode that Pillow reads; one bad image does not lose the others.

    Args:
        encoded: images as `datasets.Image(decode=False)` gives them: `bytes` or, where that is None, a file's `path`.
        total: number of images.
        image_size, num_channels: see `load_splits`.
        rows: numbers by which messages call the images; default: 0 .. total - 1.
        progress: show a bar where it takes more than a second or so.

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
    for position, image in enumerate(tqdm(encoded, "decoding", total, disable=not progress or total <= 2_000)):
        try:
            pixels = _decode_image(image, image_size, num_channels)  # (C, H, W)
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


def readable_formats() -> list[str]:
    """Formats that are opened, by Pillow's names; plug-ins that were registered by now count."""
    return [name for name in Image.OPEN if name not in UNREADABLE_FORMATS]


def readable_endings() -> set[str]:
    """Endings of the files that are taken for images, in lower case, with the dot."""
    formats = set(readable_formats())
    return {ending for ending, name in Image.registered_extensions().items() if name in formats}


def open_upright(source: "str | os.PathLike | io.BytesIO") -> Image.Image:
    """Opens an image and turns it upright, in its mode or RGB: 8 bits per value, without transparency.

    Args:
        source: A file, which must be a regular one (a pipe or device could block for ever), or its bytes.

    Returns:
        A loaded image in mode "L" if it is grey, else "RGB".

    Raises:
        ValueError: It is no image, or one with more than 8 bits per value.
        OSError: It is damaged, or no regular file. Pillow raises many other errors for damage.
    """
    if not isinstance(source, io.BytesIO) and not os.path.isfile(source):
        raise FileNotFoundError("no such file")
    try:
        image = Image.open(source, formats=readable_formats())
    except UnidentifiedImageError as error:  # its own message names an object in memory
        size = source.getbuffer().nbytes if isinstance(source, io.BytesIO) else os.path.getsize(source)
        raise ValueError(f"no image that can be read ({size} bytes)") from error
    with image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("floating-point image: its range is unknown; save it with 8 bits per value")
        if image.mode.startswith("I"):
            raise ValueError("16- or 32-bit image: pipeline would clip it at 255; scale it and save it with 8 bits")
        return image.convert("L" if image.mode in GREY_MODES else "RGB")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` (bicubic, antialiased) and crops the central square, as `CLIPImageProcessor`.

    Only the square is computed: a picture of 60,000 x 1 pixels costs no more than another. The roundings of lengths
    and of the crop's corner are those of transformers 5; pixels differ from its by 2 of 255 at most.
    """
    if image.size == (size, size):
        return image
    short = min(image.size)
    whole = [int(size * side / short) for side in image.size]  # of the resized image
    corner = [(side - size) // 2 for side in whole]
    left, top = (c * old / new for c, old, new in zip(corner, image.size, whole, strict=True))
    right, bottom = ((c + size) * old / new for c, old, new in zip(corner, image.size, whole, strict=True))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def _decode_image(encoded: Mapping[str, Any] | None, image_size: int | None, num_channels: int | None) -> np.ndarray:
    """Returns uint8 (C, H, W); C is 1 for a grey image, else 3, if `num_channels` is None."""
    data, path = (encoded or {}).get("bytes"), (encoded or {}).get("path")
    if data is None and path is None:
        raise ValueError("the row holds no image")
    image = open_upright(_as_system_names_it(path) if data is None else io.BytesIO(data))
    if image_size is not None:
        image = resize_and_crop(image, image_size)
    grey = num_channels == 1 or (num_channels is None and image.mode == "L")
    pixels = np.asarray(image.convert("L" if grey else "RGB"))  # after resizing, as in a model that gets RGB
    return pixels[None] if grey else pixels.transpose(2, 0, 1)  # (H, W) or (H, W, C) -> (C, H, W)


def _as_system_names_it(path: str) -> str | bytes:
    """A path for opening: in another locale than UTF-8, such as C, the bytes of a file whose name is UTF-8."""
    if sys.getfilesystemencoding() == "utf-8":
        return path
    encoded = path.encode("utf-8", "surrogateescape")
    return encoded if os.path.isfile(encoded) else path


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    if math.prod(shape) <= MAX_RAM_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # has no name; the mapping keeps it alive after it is closed
        return np.memmap(file, np.uint8, "w+", shape=shape)


__all__ = ["MAX_RAM_BYTES", "decode_images", "open_upright", "readable_endings", "resize_and_crop"]
