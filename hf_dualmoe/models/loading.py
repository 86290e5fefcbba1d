"""One way in: a saved image classifier, ours or any of transformers, as a classifier of images in [0, 1].

    model = load_classifier("microsoft/resnet-50")  # a folder or an id on the Hub
    logits = model(images).logits                   # (B, 3, 224, 224) in [0, 1]; model.config.image_size is 224

Attacks count in pixels, so the normalisation that a model expects becomes part of it. We show its image processor
pictures of one colour; what comes out gives size, mean and standard deviation, whatever the processor's settings are
called and whatever its rescale factor is.
"""

import copy
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .configuration_dualmoe import DualMoEConfig, MoEConfig
from .inputs_dualmoe import Normalize, create_image_processor
from .outputs import logits_of
from .parts import has_dial, has_experts

BLACK, WHITE, OTHER = (0, 0, 0), (255, 255, 255), (200, 30, 90)
SIZES = ((96, 64), (64, 96), (96, 64))  # of the pictures: what is made of them must not depend on it
FRAMING_TOLERANCE = 2 / 255  # of a picture of coordinates; another interpolation stays below it
SMALLEST_REACH = 1 / 16  # from black to white, normalised: ImageNet's is above 4, that of 16 bits below 1 / 50
# the line of a card that we wrote; the config of another architecture stays as it is
MARKER = "<!-- Rendered from results.json by hf_dualmoe. Delete this line to edit the card: it is then left alone. -->"
GIVE_NORMALISATION = (
    "If it takes RGB images as (x - mean) / std for x in [0, 1], pass image_mean and image_std (--image_mean, "
    "--image_std; 0 and 1 where it normalises by itself)."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """Input that a model expects: square images x in [0, 1] of `size` pixels, as (x - mean) / std per channel."""

    size: int
    mean: list[float]
    std: list[float]


class NormalizedClassifier(nn.Module):
    """A classifier of normalised images as one of images in [0, 1]; made by `load_classifier`.

    Args:
        network: Model of transformers that expects normalised images.
        preprocessing: What it takes.
        processor: Image processor that makes that of pictures; None = nobody knows one.

    Attributes:
        config: A copy of the network's, with `image_size`, `num_channels`, `image_mean` and `image_std` as they are
            here.
    """

    def __init__(self, network: PreTrainedModel, preprocessing: Preprocessing, processor: Any = None):
        super().__init__()
        self.network, self.preprocessing, self.processor = network, preprocessing, processor
        self.normalize = Normalize(preprocessing.mean, preprocessing.std)
        self.config = copy.deepcopy(network.config)
        self.config.image_size, self.config.num_channels = preprocessing.size, len(preprocessing.mean)
        self.config.image_mean, self.config.image_std = preprocessing.mean, preprocessing.std

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Output of the network for images (B, C, H, W) in [0, 1]."""
        return self.network(self.normalize(pixel_values).to(self.network.dtype), **options)

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Images in [0, 1] from normalised ones."""
        pixels = pixel_values.float()  # a processor that does not rescale makes uint8
        return pixels * self.normalize.std.to(pixels) + self.normalize.mean.to(pixels)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save the network as what it is, with its image processor: transformers alone loads and serves it again."""
        self.network.save_pretrained(folder)
        if self.processor is None:
            logger.warning("%s: no image processor is saved, since none is known; pipeline needs one.", folder)
        else:
            self.processor.save_pretrained(folder)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass, as the network does."""
        self.network.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The older name of `activation_checkpointing_enable`, for transformers before 5.23."""
        self.network.gradient_checkpointing_enable(**options)


def load_classifier(
    name_or_path: str | os.PathLike,
    *,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
    image_size: int | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = torch.float32,
) -> nn.Module:
    """Load an image classifier that takes images (B, C, size, size) in [0, 1], where size is its `config.image_size`.

    Args:
        name_or_path: Saved folder, or id on the Hub: our models, which normalise by themselves and come back as they
            are, or any other that `AutoModelForImageClassification` loads.
        image_mean, image_std: Of a model without an image processor, or in the place of what its processor says: a
            number, or one per channel. Both or none.
        image_size: Size of the images, of a model that neither its config nor its processor knows it of.
        revision: Branch, tag or commit of a model on the Hub.
        trust_remote_code: Whether to run code that comes with the model.
        dtype: Of the weights; "auto" = as saved. Half precision rounds small steps of an attack away.

    Returns:
        The model in eval mode; its outputs have `logits`.

    Raises:
        ValueError: There is no such model, it is no image classifier or lacks weights, or what it takes is not known:
            it has no image processor, or one that does more than resize, crop, rescale and normalise. The message says
            what to pass.
    """
    name = os.fspath(name_or_path)
    given = (image_mean, image_std) != (None, None)
    if given and None in (image_mean, image_std):
        raise ValueError(f"image_mean={image_mean!r} and image_std={image_std!r}: give both or none.")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    network = load_network(name, dtype, options)
    if has_dial(network) or has_experts(network):
        if given or image_size is not None:
            raise ValueError(
                f"model={name!r} normalises by itself; image_mean, image_std and image_size are for other models."
            )
        return network
    processor, problem = load_processor(name, options)
    if given:
        channels = channels_of(network.config)
        size = image_size or size_of(network.config) or size_made_by(processor, name)
        mean, std = per_channel("image_mean", image_mean, channels), per_channel("image_std", image_std, channels)
        wanted = Preprocessing(size, mean, std)
        processor = normalising_processor(wanted)
    elif processor is None:
        raise ValueError(f"model={name!r} has no image processor that can be loaded ({problem}). {GIVE_NORMALISATION}")
    else:
        if image_size is not None:
            raise ValueError(f"image_size={image_size!r}: the image processor of {name!r} decides; see image_mean.")
        wanted = what_is_made_by(processor, name)
        warn_of_other_framing(processor, wanted, name)
    return tried(NormalizedClassifier(network, wanted, processor).eval(), name)


def load_network(name: str, dtype: torch.dtype | str, options: dict[str, Any]) -> PreTrainedModel:
    """The model as transformers loads it; a ValueError where there is none, or not all of one."""
    # no id on the Hub looks like this, so the Hub is not asked
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model={name!r}: there is no such folder.")
    try:
        network, info = AutoModelForImageClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        there = "cannot be loaded as an image classifier"
        nowhere = "is neither a saved image classifier nor the id of one on the Hub"
        what = there if Path(name, "config.json").is_file() else nowhere
        raise ValueError(f"model={name!r} {what}: {first_line(error)}") from error
    missing = sorted(map(str, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]))
    if missing:
        raise ValueError(
            f"model={name!r} has no trained weights for {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}: it is "
            "no image classifier yet. Train it first."
        )
    config = network.config
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"model={name!r} does not choose one of several classes (problem_type={config.problem_type!r}, "
            f"num_labels={config.num_labels})."
        )
    return network.eval()


def tried(model: NormalizedClassifier, name: str) -> NormalizedClassifier:
    """The model, once it has classified a grey image; a ValueError where it cannot."""
    config = model.config
    shape = config.num_channels, config.image_size, config.image_size
    try:
        with torch.no_grad():
            logits = logits_of(model, torch.full((1, *shape), 0.5))
    except Exception as error:
        raise ValueError(
            f"model={name!r} takes no images of (channels, height, width) = {shape}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if logits.shape != (1, config.num_labels):
        raise ValueError(
            f"model={name!r} returned logits of shape {tuple(logits.shape)}; expected {(1, config.num_labels)}."
        )
    return model


# --- what a model takes ----------------------------------------------------------------------------------------------


def load_processor(name: str, options: dict[str, Any]) -> tuple[Any, str]:
    """A model's image processor and "", or None and why it cannot be loaded."""
    try:
        return AutoImageProcessor.from_pretrained(name, **options), ""
    except (OSError, ValueError, KeyError, ImportError) as error:
        return None, first_line(error)


def what_is_made_by(processor: Any, name: str) -> Preprocessing:
    """Size, mean and standard deviation of an image processor, from what it makes of pictures of one colour.

    Raises:
        ValueError: It pads, tiles, swaps channels, expects 16 bits per value, or makes images that are not square or
            have no three channels.
    """
    colours = zip((BLACK, WHITE, OTHER), SIZES, strict=True)
    made = [process(processor, Image.new("RGB", size, colour), name) for colour, size in colours]
    shape, *others = [tuple(pixels.shape) for pixels in made]
    if len(shape) == 4 and shape[1] != 3:
        raise refusal(processor, name, f"of RGB pictures it makes images of {shape[1]} channels")
    if len(shape) != 4 or shape[:2] != (1, 3) or shape[2] != shape[3] or others != [shape, shape]:
        raise refusal(processor, name, f"of RGB pictures it makes {shape} and {others[0]}, not squares of one size")
    black, white, other = (pixels[0, :, 0, 0].double() for pixels in made)
    reach = white - black  # 1 / std
    expected = black + reach * torch.tensor(OTHER).double() / 255  # where (x - mean) / std puts the third colour
    tolerance = 1e-3 * reach
    # a picture of one colour must stay one: padding would show
    flat = all(((p - p[:, :, :1, :1]).abs().amax(dim=(0, 2, 3)) <= tolerance).all() for p in made)
    if not (flat and (reach > 0).all() and ((other - expected).abs() <= tolerance).all()):
        raise refusal(processor, name, "it changes colours by more than a factor and an offset, or pads")
    if (reach < SMALLEST_REACH).any():
        low, high = float(black.min()), float(white.max())
        reason = f"it maps black and white to {low:.3g} and {high:.3g}, as if pictures had 16 bits per value and not 8"
        raise refusal(processor, name, reason)
    # seven digits are what float32 holds: 0.485, not 0.48500001
    mean, std = ([float(f"{value:.7g}") for value in values.tolist()] for values in (-black / reach, 1 / reach))
    return Preprocessing(shape[-1], mean, std)


def process(processor: Any, picture: Image.Image, name: str) -> Tensor:
    """The pixel values of one picture."""
    try:
        return torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"]).float()
    except Exception as error:
        raise refusal(processor, name, f"{type(error).__name__}: {first_line(error)}") from error


def refusal(processor: Any, name: str, reason: str) -> ValueError:
    """The error for a processor that does more than resize, crop, rescale and normalise."""
    does = f"model={name!r}: its {type(processor).__name__} does more than resize, crop, rescale and normalise"
    return ValueError(f"{does} ({reason}). {GIVE_NORMALISATION}")


def warn_of_other_framing(processor: Any, wanted: Preprocessing, name: str) -> None:
    """Say so where a processor stretches or crops pictures otherwise than our decoding of data does."""
    rows, columns = np.indices((96, 144))
    coordinates = np.stack([rows * 255 / 95, columns * 255 / 143, rows * 0], axis=2)  # colours say where a pixel was
    picture, size = Image.fromarray(coordinates.astype(np.uint8)), wanted.size
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (wanted.mean, wanted.std))
    theirs = process(processor, picture, name) * std + mean
    if float((theirs - process(create_image_processor(size), picture, name)).abs().mean()) > FRAMING_TOLERANCE:
        logger.warning(
            f"{name}: its {type(processor).__name__} frames pictures in another way than data are decoded here "
            f"(shorter side to {size} pixels, centre cropped): where that changes the images, numbers may differ from "
            "those of pipeline."
        )


def normalising_processor(wanted: Preprocessing) -> Any:
    """Our image processor with a normalisation; None for grey images, which it does not make."""
    if len(wanted.mean) != 3:
        return None
    processor = create_image_processor(wanted.size)
    processor.do_normalize, processor.image_mean, processor.image_std = True, wanted.mean, wanted.std
    return processor


def size_of(config: PreTrainedConfig) -> int | None:
    """The image size in a config; None where there is none, or height and width differ."""
    size = getattr(config, "image_size", None)
    sides = set(size) if isinstance(size, Sequence) and not isinstance(size, str) else {size}
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) else None


def size_made_by(processor: Any, name: str) -> int:
    """The side of the squares that a processor makes; a ValueError where there is none or it makes others."""
    shape = () if processor is None else process(processor, Image.new("RGB", SIZES[0]), name).shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"image_size=None: neither the config nor a processor of {name!r} says it; give it.")
    return shape[-1]


def channels_of(config: PreTrainedConfig) -> int:
    """The number of channels that a config names; 3 where it names none."""
    channels = getattr(config, "num_channels", None)
    return channels if isinstance(channels, int) else 3


def per_channel(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    """A number per channel; a ValueError where there are others, or one is no number or no standard deviation."""
    values = [float(v) for v in (value if isinstance(value, Sequence) else [value])]
    values = values * channels if len(values) == 1 else values
    low = 0 if name == "image_std" else -math.inf
    if len(values) != channels or not all(low < v < math.inf for v in values):
        allowed = "finite and > 0" if name == "image_std" else "finite"
        raise ValueError(f"{name}={value!r} must be {allowed}: one number, or one for each of {channels} channels.")
    return values


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- whose folder it is ----------------------------------------------------------------------------------------------


def is_foreign(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a model that this project did not make: it is read, and nothing is written there.

    Ours are of our two kinds, or of any other whose results.json or card says that it was made here.
    """
    if not Path(folder, "config.json").is_file():
        return False
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind in (MoEConfig.model_type, DualMoEConfig.model_type) or is_report(Path(folder, "results.json")):
        return False
    card = Path(folder, "README.md")
    return not (card.is_file() and MARKER in card.read_text(encoding="utf-8", errors="replace"))


def is_report(path: Path) -> bool:
    """Whether a file is a report of ours on a model that was trained here; results.json is a common name."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or no JSON in UTF-8
        return False
    parts = [report.get(name) for name in ("metrics", "training")] if isinstance(report, dict) else [None]
    return all(isinstance(part, dict) for part in parts) and "method" in parts[-1]


def check_results_folder(output_dir: str | os.PathLike) -> None:
    """Raise a ValueError where results would be written into the folder of somebody else's model."""
    if is_foreign(output_dir):
        raise ValueError(
            f"output_dir={os.fspath(output_dir)!r} holds a model that hf_dualmoe did not make; nothing is written "
            "there. Choose another folder."
        )


__all__ = ["NormalizedClassifier", "check_results_folder", "is_foreign", "load_classifier"]
