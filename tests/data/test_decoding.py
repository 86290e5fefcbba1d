"""What becomes of single images: modes, depths, channels, sizes, orientation, and those that cannot be decoded."""

import base64

import numpy as np
import pytest
import torch
from conftest import encode, solid
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_images
from transformers import pipeline
from transformers.image_utils import load_image

from hf_dualmoe.data.datasets import to_unit_range
from hf_dualmoe.data.decoding import decode_images, resize_and_crop
from hf_dualmoe.models.inputs_dualmoe import create_image_processor, luminance


def test_missing_file_is_undecodable(tmp_path):
    solid((1, 2, 3)).save(tmp_path / "a.png")
    paths = [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "b.png")]
    images, failures = decode_images(paths, 2)
    assert images[:, :, 0, 0].tolist() == [[1, 2, 3]] and list(failures) == [1]


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
    ],
    ids=["L", "1", "LA", "RGB", "RGBA", "palette", "CMYK"],
)
def test_modes(image, file_format, rgb, grey, channels):
    encoded = [encode(image, file_format)]
    assert decode_images(encoded, 1, num_channels=3)[0][0, :, 2, 3].tolist() == list(rgb)
    assert decode_images(encoded, 1, num_channels=1)[0][0, :, 2, 3].tolist() == [grey]
    images, failures = decode_images(encoded, 1)
    assert images.shape == (1, channels, 6, 6) and images.dtype == torch.uint8 and not failures


# --- the same pixels as a saved model's pipeline


@pytest.fixture(scope="module")
def photos():
    """Parts of scikit-learn's two photos, one wide, one tall, with odd differences of the sides."""
    wide, tall = (Image.fromarray(image) for image in load_sample_images().images)
    return [wide.crop((100, 50, 421, 264)), tall.crop((100, 50, 301, 364))]


LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")


def served(encoded, size, num_channels=3):
    """What a saved model gets from `pipeline`, in 0..255: `load_image`, then its processor, then its luminance."""
    picture = load_image(base64.b64encode(encoded["bytes"]).decode())
    pixels = create_image_processor(size)(picture, return_tensors="pt")["pixel_values"]
    return 255 * (luminance(pixels) if num_channels == 1 else pixels)[0]


def assert_same_pixels(encoded, size, num_channels=3):
    ours = decode_images([encoded], 1, image_size=size, num_channels=num_channels)[0][0]
    difference = (ours - served(encoded, size, num_channels)).abs()
    assert difference.max() <= 2.5 and difference.mean() < 0.3  # a grey value is rounded twice


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr", "LAB"])
def test_oblong_photos_become_what_pipeline_makes_of_them(photos, mode, num_channels):
    for photo in photos:
        image = ImageCms.profileToProfile(photo, *LAB, outputMode=mode) if mode == "LAB" else photo.convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(photo.convert("L"))
        assert_same_pixels(encode(image, "JPEG" if mode == "YCbCr" else "TIFF"), 64, num_channels)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_saved_model_answers_as_it_was_measured(photos, make_moe, tmp_path, num_channels):
    statistics = {"image_mean": [0.4] * num_channels, "image_std": [0.1] * num_channels}
    model = make_moe("vit", num_channels=num_channels, **statistics)
    model.save_pretrained(tmp_path / "model")
    classify = pipeline("image-classification", model=str(tmp_path / "model"))
    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.bmp")
        row = {"bytes": None, "path": str(tmp_path / f"{number}.bmp")}
        pixels = decode_images([row], 1, image_size=model.config.image_size, num_channels=num_channels)[0]
        measured = model(to_unit_range(pixels)).logits.softmax(dim=1)[0]
        answers = {answer["label"]: answer["score"] for answer in classify(row["path"], top_k=model.config.num_labels)}
        served = torch.tensor([answers[name] for name in model.config.id2label.values()])
        assert (served - measured).abs().max() < 2e-3


@pytest.mark.parametrize("size", [7, 64, 400])
def test_shrinking_and_enlarging_are_those_of_pipeline(photos, size):
    for photo in photos:
        assert_same_pixels(encode(photo, "BMP"), size)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert_same_pixels(encode(photos[0], "JPEG", exif=exif), size)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "CMYK"])
def test_images_of_the_models_size_keep_every_bit(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 13, 3), dtype=np.uint8)).convert(mode)
    expected = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    encoded = encode(image, "TIFF")
    assert torch.equal(decode_images([encoded], 1, image_size=13, num_channels=3)[0][0], expected)
    assert torch.equal(served(encoded, 13).round().byte(), expected)


def test_only_the_square_is_computed():
    line = Image.new("RGB", (60_000, 1), (9, 8, 7))  # as a whole it would have 60 million pixels
    assert resize_and_crop(line, 1000).getcolors() == [(1_000_000, (9, 8, 7))]


def test_luminance_is_that_of_pillow_and_keeps_grey_to_the_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    ours = luminance(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    assert (255 * ours[0, 0] - torch.from_numpy(np.array(Image.fromarray(pixels).convert("L")))).abs().max() <= 0.51
    grey = torch.rand(2, 1, 9, 9)
    assert torch.equal(luminance(grey.expand(-1, 3, -1, -1)), grey)


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


def test_downscaling_is_antialiased():
    stripes = np.zeros((32, 32), np.uint8)
    stripes[:, ::2] = 255
    small, _ = decode_images([encode(Image.fromarray(stripes))], 1, image_size=8)
    assert (small[..., 1:-1].int() - 128).abs().max() <= 20  # nearest or point sampling would give 0 or 255


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_shows_only_where_it_is_asked_for(progress, capfd):
    decode_images([encode(solid(5, (1, 1)))] * 2_001, 2_001, progress=progress)
    assert ("decoding" in capfd.readouterr().err) == progress
