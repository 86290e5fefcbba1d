"""eps in normalised units, the classic mistake: noticed on colour images, and nowhere else."""

import logging

import foreign_models
import pytest
import torch

from hf_dualmoe.cli.eps_check import check_eps_is_in_pixels
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.models.loading import load_classifier

COLOUR = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GREY = COLOUR[:, :1].expand(-1, 3, -1, -1).contiguous()


def dataset(images):
    return ImageTensorDataset(images, torch.zeros(len(images), dtype=torch.int64), ["a", "b"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    foreign_models.save("resnet", folder)  # std 0.229, 0.224, 0.225
    return load_classifier(folder)


def test_a_radius_that_erases_photos_is_refused(model):
    with pytest.raises(ValueError, match=r"eps=0.3 counts in pixels: it is 76/255.*std of 0.226.*give --eps 17.3/255"):
        check_eps_is_in_pixels(model, dataset(COLOUR), 0.3, "linf")


def test_eight_255ths_of_normalised_images_are_named(model, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_dualmoe.cli.eps_check"):
        check_eps_is_in_pixels(model, dataset(COLOUR), 8 / 255 / 0.226, "linf")
    assert "it is 8/255: give --eps 8/255." in caplog.text


@pytest.mark.parametrize(
    ("images", "eps", "norm"),
    [(GREY, 0.3, "linf"), (COLOUR, 8 / 255, "linf"), (COLOUR, 16 / 255, "linf"), (COLOUR, 3.0, "l2")],
    ids=["digits", "8/255", "16/255", "l2"],
)
def test_usual_radii_pass_without_a_word(model, images, eps, norm, caplog):
    with caplog.at_level(logging.WARNING):
        check_eps_is_in_pixels(model, dataset(images), eps, norm)
    assert not caplog.records


def test_l2_radii_beyond_the_furthest_images_are_refused(resnet_moe):
    """sqrt(3 * 32 * 32) = 55.4: within 128, every image reaches every other."""
    for eps in (1.0, 55.4):
        check_eps_is_in_pixels(resnet_moe, dataset(COLOUR), eps, "l2")
    message = r"eps=128 is larger than 55.4, .* two images of 3 x 32 x 32 .* did you mean 128/255\?"
    with pytest.raises(ValueError, match=message):
        check_eps_is_in_pixels(resnet_moe, dataset(COLOUR), 128, "l2")


def test_models_that_normalise_by_themselves_leave_nothing_to_mistake(resnet_moe, caplog):
    check_eps_is_in_pixels(resnet_moe, dataset(COLOUR), 0.3, "linf")
    assert not caplog.records
