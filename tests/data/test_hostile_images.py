"""Every kind of picture is converted by the rules of `decoding` or refused by row or file; doubts are reported."""

import logging
import os
import struct
import threading
import zlib

import datasets
import numpy as np
import pytest
import torch
from conftest import encode
from PIL import Image

from hf_dualmoe.data.datasets import load_splits
from hf_dualmoe.data.decoding import decode_images
from hf_dualmoe.data.doubts import count_duplicates


def gradient(size=(12, 12)):
    """A colour image without two equal rows or columns."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


def palette_with_transparency():
    image = gradient().quantize(256)
    image.info["transparency"] = 3
    return image


def animated(file_format):
    frames = [Image.new("RGB", (12, 12), colour) for colour in ((10, 200, 30), (250, 0, 0), (0, 0, 250))]
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:], **lossless)


def one(image, **options):
    """The single image (C, H, W) that an encoded one becomes."""
    images, failures = decode_images([image], 1, **options)
    assert not failures and images.dtype == torch.uint8
    return images[0]


# --- converted -------------------------------------------------------------------------------------------------------

RGBA = np.concatenate([np.asarray(gradient()), np.full((12, 12, 1), 90, np.uint8)], axis=2)
CONVERTED = {
    "transparent palette PNG": (encode(palette_with_transparency()), 8),
    "transparent palette GIF": (encode(palette_with_transparency(), "GIF"), 8),
    "half transparent PNG": (encode(Image.fromarray(RGBA)), 0),
    "half transparent WebP": (encode(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), 0),
    "JPEG": (encode(gradient(), "JPEG", quality=98, subsampling=0), 12),
    "progressive JPEG": (encode(gradient(), "JPEG", quality=98, subsampling=0, progressive=True), 12),
    "BMP": (encode(gradient(), "BMP"), 0),
    "PPM": (encode(gradient(), "PPM"), 0),
    "TGA": (encode(gradient(), "TGA"), 0),
    "compressed TIFF": (encode(gradient(), "TIFF", compression="tiff_lzw"), 0),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_formats_and_modes_keep_the_colours(name):
    image, tolerance = CONVERTED[name]
    pixels = one(image, num_channels=3).int()
    assert pixels.shape == (3, 12, 12)
    expected = torch.from_numpy(np.asarray(gradient()).copy()).permute(2, 0, 1).int()
    assert (pixels - expected).abs().max() <= tolerance


def test_cmyk_jpeg_is_converted():
    cyan = encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=98)
    red, green, blue = one(cyan)[:, 4, 4].tolist()
    assert red <= 8 and green >= 247 and blue >= 247


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(file_format):
    pixels = one(animated(file_format), num_channels=3)
    assert (pixels[:, 5, 5].int() - torch.tensor([10, 200, 30])).abs().max() <= 3


def test_one_pixel_is_stretched_to_the_size_asked_for():
    dot = encode(Image.new("RGB", (1, 1), (9, 8, 7)))
    assert one(dot).tolist() == [[[9]], [[8]], [[7]]]
    assert one(dot, image_size=32).flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (3000, 7), (2, 1001)])
def test_extreme_shapes_give_their_central_square(size):
    wide = size[0] > size[1]
    array = np.zeros((size[1], size[0], 3), np.uint8)
    centre = (size[0] if wide else size[1]) // 2
    middle = slice(centre - min(size) // 2 - 2, centre + min(size) // 2 + 3)
    array[(slice(None), middle) if wide else middle] = (250, 120, 60)
    pixels = one(encode(Image.fromarray(array)), image_size=16)
    assert pixels.shape == (3, 16, 16)
    assert (pixels.int() - torch.tensor([250, 120, 60])[:, None, None]).abs().max() <= 1


# --- refused ---------------------------------------------------------------------------------------------------------


def png_that_claims(width, height):
    """A small PNG file whose header announces a huge image."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return {"bytes": b"\x89PNG\r\n\x1a\n" + body, "path": None}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n%%EOF\n"
PNG, JPEG = encode(gradient((40, 40)))["bytes"], encode(gradient((200, 200)), "JPEG")["bytes"]
REFUSED = {
    "half a PNG": (PNG[: len(PNG) // 2], "truncated|broken"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "corrupt PNG": (PNG[:60] + bytes(40) + PNG[100:], "broken|chunk|decompress|cannot|bad"),
    "no bytes": (b"", r"no image that can be read \(0 bytes\)"),
    "text": (b"<html>404</html>", r"no image that can be read \(16 bytes\)"),
    "decompression bomb": (png_that_claims(60_000, 60_000)["bytes"], "DecompressionBombError"),
    "wide bomb": (png_that_claims(2_000_000_000, 1)["bytes"], "DecompressionBombError"),
    "16 bits": (encode(Image.new("I;16", (6, 6), 300))["bytes"], "16- or 32-bit image: pipeline would clip it"),
    "16 bits, big end first": (encode(Image.new("I;16B", (6, 6)), "TIFF")["bytes"], "16- or 32-bit.*with 8 bits"),
    "32 bits": (encode(Image.new("I", (6, 6), 300), "TIFF")["bytes"], "16- or 32-bit.*with 8 bits"),
    "floating point": (encode(Image.new("F", (6, 6), 0.5), "TIFF")["bytes"], "floating-point"),
    "a program in PostScript": (EPS, "no image that can be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_without_losing_the_others(name):
    data, reason = REFUSED[name]
    good = encode(gradient())
    images, failures = decode_images([good, {"bytes": data, "path": None}, good], 3, image_size=12, num_channels=3)
    assert len(images) == 2 and torch.equal(images[0], images[1]) and list(failures) == [1]
    with pytest.raises(ValueError, match=f"none of 1 images can be decoded: .*({reason})"):
        decode_images([{"bytes": data, "path": None}], 1)


def test_row_without_an_image():
    for nothing in (None, {"bytes": None, "path": None}, {}):
        with pytest.raises(ValueError, match="the row holds no image"):
            decode_images([nothing], 1)


def test_pipes_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    paths = [tmp_path / "pipe.png", tmp_path, "/dev/zero"]
    found = []

    def decode():
        good = encode(gradient())
        found.append(decode_images([good, *({"bytes": None, "path": str(path)} for path in paths)], 4)[1])

    thread = threading.Thread(target=decode, daemon=True)  # reading the pipe would never end
    thread.start()
    thread.join(timeout=20)
    assert found and list(found[0]) == [1, 2, 3]
    assert all(f"{path}: FileNotFoundError" in found[0][i + 1] for i, path in enumerate(paths))


def test_messages_name_the_file_of_an_image_folder(tmp_path):
    for k in range(12):
        folder = tmp_path / "images" / "train" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        gradient().save(folder / f"{k}.png")
    broken = tmp_path / "images" / "train" / "a" / "4.png"
    broken.write_bytes(PNG[:100])
    with pytest.raises(ValueError, match=r"1 of \d+ images cannot be decoded, in rows \[\d+\] \(.*4\.png: OSError"):
        load_splits(str(tmp_path / "images"))
    gradient((7, 7)).save(broken)
    with pytest.raises(ValueError, match=r"4\.png: image \d+ of \d+ is .* = \(3, 7, 7\), but .*\(3, 12, 12\)"):
        load_splits(str(tmp_path / "images"))


# --- doubts about a dataset ------------------------------------------------------------------------------------------


def numbered(i):
    return encode(Image.new("RGB", (6, 6), (i % 256, i // 256, 99)))


def save(folder, **splits):
    """Write splits, each a list of (number, label); the labels are a, b, c."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    sets = {
        split: datasets.Dataset.from_dict(
            {"image": [numbered(i) for i, _ in rows], "label": [label for _, label in rows]}, features
        )
        for split, rows in splits.items()
    }
    datasets.DatasetDict(sets).save_to_disk(folder)
    return str(folder)


def test_duplicates_and_missing_classes_are_counted_and_warned_of(tmp_path, caplog):
    train = [(i, i % 2) for i in range(20)]  # no c
    test = [(i, i % 3) for i in (3, 100, 101, 7, 7, 105)]  # three are in train
    name = save(tmp_path, train=train, validation=[(50, 0), (51, 1)], test=test)
    with caplog.at_level(logging.WARNING, logger="hf_dualmoe.data.datasets"):
        splits = load_splits(name)
    assert splits.duplicates == {"test": 3}
    assert splits.missing_classes == {"train": ["c"], "validation": ["c"]}
    assert "3 of the 6 test images are in train too" in caplog.text
    assert "train has no image of 1 of the 3 classes: c" in caplog.text


def test_clean_data_raise_no_doubt(tmp_path, caplog):
    rows = [(i, i % 3) for i in range(60)]
    with caplog.at_level(logging.WARNING, logger="hf_dualmoe.data.datasets"):
        splits = load_splits(save(tmp_path, train=rows))
        digits = load_splits("digits")
    assert splits.duplicates == splits.missing_classes == digits.duplicates == digits.missing_classes == {}
    assert caplog.text == ""


@pytest.mark.parametrize("size", [4, 64])  # below and above the bytes that are looked at first
def test_duplicates_are_those_of_a_comparison_of_all_pixels(size):
    generator = torch.Generator().manual_seed(size)
    train = torch.randint(256, (30, 3, size, size), generator=generator, dtype=torch.uint8)
    others = torch.cat([train[[4, 9, 9]], train[[11, 20]]])
    others[3, 0, 0, 0] += 1  # one pixel at the edge differs
    others[4, -1, -1, -1] += 1
    assert count_duplicates(train, others) == 3
    same = (others[:, None] == train[None]).flatten(2).all(dim=2).any(dim=1)
    assert same.tolist() == [True, True, True, False, False]
    flat = torch.full((5, 3, size, size), 7, dtype=torch.uint8)
    assert count_duplicates(flat, flat[:2]) == 2
