"""Was eps meant in pixels? The classic mistake is a radius for normalised images: 8/255 divided by a std of 0.225."""

import logging

import torch
from torch import nn

from ..attacks.base import check_eps
from ..data.datasets import ImageTensorDataset
from ..models.loading import NormalizedClassifier

# L-inf, in pixels: beyond all published work on colour images; a quarter of the range
DOUBTFUL, SURELY_WRONG = 0.1, 0.25
LOOK = 256  # images to look at for colours

logger = logging.getLogger(__name__)


def check_eps_is_in_pixels(
    model: nn.Module, images: ImageTensorDataset, eps: float, norm: str, name: str = "eps"
) -> None:
    """Warn of an L-inf radius that makes sense for normalised images only, and refuse one that erases colour photos.

    Grey images, such as digits, are written with few values: there eps = 0.3 is usual. Models that normalise by
    themselves, ours among them, leave nothing to mistake.

    Args:
        model: Classifier that `load_classifier` gave.
        images: Images that are attacked.
        eps: Radius.
        norm: Its norm.
        name: What the radius is called.

    Raises:
        ValueError: eps is at least a quarter of the range of pixel values, on colour images; or, in L2, larger than
            the distance of any two images.
    """
    if norm == "l2" and eps > 0:  # certificates have more norms, and refuse radii of 0 and below themselves
        check_eps(eps, norm, images.images.shape[1:], name)
    normalises = isinstance(model, NormalizedClassifier) and max(model.config.image_std) < 1  # else nothing to mistake
    if norm != "linf" or eps < DOUBTFUL or not normalises or not has_colours(images):
        return
    std = sum(model.config.image_std) / len(model.config.image_std)
    text = (
        f"{name}={eps:.4g} counts in pixels: it is {255 * eps:.0f}/255, on colour images. If it was meant for images "
        f"normalised by a std of {std:.3g}, as this model takes them inside, it is {255 * eps * std:.3g}/255: give "
        f"--{name} {255 * eps * std:.3g}/255."
    )
    if eps >= SURELY_WRONG:
        raise ValueError(f"{text} At {SURELY_WRONG:g} and above, no classifier of photos has anything left to see.")
    logger.warning(text)


def has_colours(images: ImageTensorDataset) -> bool:
    """Whether the channels of the first images differ anywhere."""
    pixels = images.images[:LOOK]
    return pixels.shape[1] > 1 and not torch.equal(pixels, pixels[:, :1].expand_as(pixels))


__all__ = ["check_eps_is_in_pixels"]
