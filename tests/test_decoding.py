"""What becomes of single images: modes, depths, channels, sizes, orientation, and those that cannot be decoded."""

import numpy as np
import pytest
import torch
from conftest import encode, solid
from PIL import Image

from hf_dualmoe.decoding import decode_images


def test_decompression_bomb_is_undecodable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    images, failures = decode_images([encode(solid(9, (6, 6))), encode(solid(9, (10, 10)))], 2)
    assert len(images) == 1 and list(failures) == [1] and "DecompressionBombError" in failures[1]


def test_missing_file_is_undecodable(tmp_path):
    solid((1, 2, 3)).save(tmp_path / "a.png")
    paths = [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "b.png")]
    images, failures = decode_images(paths, 2)
    assert images[:, :, 0, 0].tolist() == [[1, 2, 3]] and list(failures) == [1]


def gradient16():
    return Image.fromarray(np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6))


@pytest.mark.parametrize(
    ("image", "file_format", "rgb", "grey", "channels"),
    [
        (solid(200, mode="L"), "PNG", (200, 200, 200), 200, 1),
        (solid(1, mode="1"), "PNG", (255, 255, 255), 255, 1),
        (solid((200, 0), mode="LA"), "PNG", (200, 200, 200), 200, 1),
        (solid((250, 0, 0)), "PNG", (250, 0, 0), 75, 3),
        (solid((250, 0, 0, 0), mode="RGBA"), "PNG", (250, 0, 0), 75, 3),
        (solid((250, 0, 0)).quantize(4), "PNG", (250, 0, 0), 75, 3),
        (solid((0, 255, 255, 0), mode="CMYK"), "TIFF", (255, 0, 0), 76, 3),
        (Image.fromarray(np.full((6, 6), 257 * 100, np.uint16)), "PNG", (100, 100, 100), 100, 1),
        (Image.fromarray(np.full((6, 6), 257 * 100, np.int32)), "TIFF", (100, 100, 100), 100, 1),
    ],
    ids=["L", "1", "LA", "RGB", "RGBA", "palette", "CMYK", "16-bit", "32-bit"],
)
def test_modes(image, file_format, rgb, grey, channels):
    encoded = [encode(image, file_format)]
    assert decode_images(encoded, 1, num_channels=3)[0][0, :, 2, 3].tolist() == list(rgb)
    assert decode_images(encoded, 1, num_channels=1)[0][0, :, 2, 3].tolist() == [grey]
    images, failures = decode_images(encoded, 1)
    assert images.shape == (1, channels, 6, 6) and images.dtype == torch.uint8 and not failures


def test_16_bit_is_scaled_not_clipped():
    images, _ = decode_images([encode(gradient16())], 1)
    expected = np.round(np.asarray(gradient16()) / 65535 * 255)
    assert torch.equal(images[0, 0], torch.from_numpy(expected).to(torch.uint8))


def test_float_images_are_undecodable():
    encoded = [encode(solid(5)), encode(Image.new("F", (6, 6), 0.5), "TIFF")]
    assert "floating-point" in decode_images(encoded, 2)[1][1]


def test_channels_follow_the_first_image_but_colour_is_never_lost():
    grey, colour = encode(solid(50, mode="L")), encode(solid((1, 2, 3)))
    assert decode_images([colour, grey], 2)[0][:, :, 0, 0].tolist() == [[1, 2, 3], [50, 50, 50]]
    with pytest.raises(ValueError, match=r"image 1 of 2 is .* = \(3, 6, 6\), but .*\(1, 6, 6\).*num_channels"):
        decode_images([grey, colour], 2)
    assert decode_images([grey, colour], 2, num_channels=1)[0].shape == (2, 1, 6, 6)


def test_sizes():
    square, wide = encode(solid((9, 9, 9))), encode(solid((9, 9, 9), (12, 6)))
    with pytest.raises(ValueError, match=r"image 1 of 2 is .* = \(3, 6, 12\), but .*\(3, 6, 6\).*set image_size"):
        decode_images([square, wide], 2)
    with pytest.raises(ValueError, match=r"image 0 of 1 is .* = \(3, 6, 12\).*set image_size"):
        decode_images([wide], 1)
    assert decode_images([square, wide], 2, image_size=4)[0].shape == (2, 3, 4, 4)


def test_resize_keeps_the_aspect_ratio_and_crops_the_centre():
    image = Image.new("L", (40, 20), 0)
    image.paste(255, (10, 0, 30, 20))  # exactly the central square
    assert (decode_images([encode(image)], 1, image_size=20)[0] == 255).all()
    shrunk = decode_images([encode(image)], 1, image_size=10)[0]
    assert shrunk.shape == (1, 1, 10, 10) and shrunk[..., 1:-1].min() == 255


def test_downscaling_is_antialiased():
    stripes = np.zeros((32, 32), np.uint8)
    stripes[:, ::2] = 255
    small, _ = decode_images([encode(Image.fromarray(stripes))], 1, image_size=8)
    assert (small[..., 1:-1].int() - 128).abs().max() <= 20  # nearest or point sampling would give 0 or 255


def test_exif_orientation_is_applied():
    pixels = np.zeros((6, 6, 3), np.uint8)
    pixels[0] = 255  # top row white
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees: show it turned clockwise
    images, _ = decode_images([encode(Image.fromarray(pixels), exif=exif)], 1)
    assert (images[0, :, :, -1] == 255).all() and (images[0, :, :, 0] == 0).all()
