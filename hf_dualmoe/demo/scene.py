"""The computing behind the demo page: load a model, prepare an image, look at it, attack it. No Gradio here.

Images are floats (1, C, H, W) in [0, 1]; the parts of a dual model are called "F_S", "F_R" and "F_D".
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from ..attacks.base import NORMS, check_eps
from ..attacks.pgd import PGD
from ..data.decoding import open_upright
from ..data.image_folders import scan
from ..hub.onnx import LogitsModel
from ..models.inputs_dualmoe import create_image_processor, luminance
from ..models.loading import NormalizedClassifier, load_classifier
from ..models.parts import has_dial, has_experts, mixes_weights

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 20
MAX_STEPS = 50  # about a second on one CPU core for the digits model
ENDS = {"F_S": 0.0, "F_R": 1.0}  # of the dial
MERGED_STEPS = 20  # positions of a dial in the weights to look at: each is a network of its own
USUAL_EPS = {"linf": 8 / 255, "l2": 0.5}


@dataclass(frozen=True)
class Example:
    """An image to start from: a caption and its pixels (1, C, H, W) in [0, 1]."""

    caption: str
    pixels: Tensor


@dataclass(frozen=True)
class DemoModel:
    """A model that is ready for the page.

    Args:
        model: Classifier of images in [0, 1], in eval mode, without parameter gradients.
        processor: Image processor that resizes and rescales to [0, 1], and does not normalise.
        name: Folder or Hub id, to show.
        labels: Name of each class, in label order.
        num_channels: Of the images that are attacked: 1 or 3.
        eps, norm: The attack to offer first: the one of the model's results.json, if there is one.
        examples: Images to offer.
    """

    model: nn.Module
    processor: Any
    name: str
    labels: list[str]
    num_channels: int
    eps: float = USUAL_EPS["linf"]
    norm: str = "linf"
    examples: list[Example] = field(default_factory=list)

    @property
    def dual(self) -> bool:
        """Whether there is a dial."""
        return has_dial(self.model)

    @property
    def merged(self) -> bool:
        """Whether the dial is in the weights: F_D is then a network of its own at each position."""
        return mixes_weights(self.model)

    @property
    def parts(self) -> tuple[str, ...]:
        """The models that answer: F_S, F_R and F_D, or the only one."""
        return ("F_S", "F_R", "F_D") if self.dual else ("the model",)

    @property
    def alpha(self) -> float | None:
        """Where the dial was saved; None without one."""
        return float(self.model.config.alpha) if self.dual else None


@dataclass(frozen=True)
class Route:
    """The experts that saw an image (from 0, first choice first), and the router's probability of every expert."""

    experts: tuple[int, ...]
    probs: tuple[float, ...]


@dataclass(frozen=True)
class Look:
    """What the models without a dial say about one image: per part, logits (C,) and, for mixtures, the route.

    Its pixels (1, C, H, W) are kept where F_D is no mixture of what was said, but has to be asked.
    """

    logits: dict[str, Tensor]
    routes: dict[str, Route]
    pixels: Tensor | None = None


@dataclass(frozen=True)
class AttackSettings:
    """An attack as asked for on the page: radius in [0, 1] pixel units, norm, steps, the part it aims at, its dial."""

    eps: float
    norm: str
    steps: int
    target: str
    alpha: float | None = None


@dataclass(frozen=True)
class Scene:
    """One image on the page, clean and (once attacked) attacked; the dial is not part of it."""

    clean: Tensor
    clean_look: Look
    attacked: Tensor | None = None
    attacked_look: Look | None = None
    settings: AttackSettings | None = None


# --- loading ---------------------------------------------------------------------------------------------------------


def load_demo_model(
    name: str,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
    examples: str | os.PathLike | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> DemoModel:
    """Load an image classifier for the page.

    Args:
        name: Saved folder, or id of a model on the Hub: ours, or any that `AutoModelForImageClassification` loads.
        revision: Branch, tag or commit of a model on the Hub.
        trust_remote_code: Whether to run code that comes with the model (ours needs none where this is installed).
        examples: Folder of images to offer; None = what is known to fit: scikit-learn's digits for a digits model.
        image_mean, image_std: As in `load_classifier`.

    Raises:
        ValueError: There is no such model, it is no image classifier, or the folder of examples has no image.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_classifier(name, image_mean=image_mean, image_std=image_std, **options)
    config, normalises = model.config, isinstance(model, NormalizedClassifier)
    processor = (model.processor if normalises else None) or load_processor(name, config, options)
    if normalises:  # the attack counts in pixels: normalisation belongs behind it
        processor = pixels_only(processor, model)
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threat = read_threat(Path(name, "results.json"))
    demo = DemoModel(
        model=model.requires_grad_(False).eval().to(device),  # attacks need no weight gradients
        processor=processor,
        name="/".join(Path(name).resolve().parts[-2:]) if Path(name).is_dir() else name,  # "model" alone says nothing
        labels=labels,
        num_channels=getattr(config, "num_channels", 3),
        **threat,
    )
    check_range(demo)
    return replace(demo, examples=folder_examples(demo, examples) if examples else digit_examples(demo))


def load_processor(name: str, config: Any, options: dict[str, Any]) -> Any:
    """The model's image processor, or one for the size in its config; ValueError where neither is known."""
    try:
        return AutoImageProcessor.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if not isinstance(getattr(config, "image_size", None), int):
            raise ValueError(f"model={name!r} has no image processor and no image_size: {error}") from error
        return create_image_processor(config.image_size)


def pixels_only(processor: Any, model: NormalizedClassifier) -> Callable[..., dict[str, Tensor]]:
    """An image processor whose normalisation, which the model has taken over, is undone."""

    def process(picture: Image.Image, return_tensors: str) -> dict[str, Tensor]:
        pixels = processor(picture, return_tensors=return_tensors)["pixel_values"]
        return {"pixel_values": model.denormalize(pixels)}

    return process


def check_range(demo: DemoModel) -> None:
    """Raise a ValueError unless the image processor maps black and white into [0, 1]: else eps would mean nothing."""
    # black and white squares, large enough to survive resizing
    board = Image.fromarray(np.indices((64, 64)).sum(axis=0).astype(np.uint8) // 8 % 2 * 255).convert("RGB")
    pixels = demo.processor(board, return_tensors="pt")["pixel_values"]
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"model={demo.name!r}: its {type(demo.processor).__name__} maps images to [{low:.3g}, {high:.3g}] and "
            "has no do_normalize to switch that off; expected [0, 1]."
        )


def read_threat(path: Path) -> dict[str, Any]:
    """eps and norm that a model was measured with, from its results.json; empty where there is none."""
    if not path.is_file():
        return {}
    threat = json.loads(path.read_text(encoding="utf-8")).get("threat", {})
    return {"eps": threat["eps"], "norm": threat["norm"]} if threat.get("norm") in NORMS else {}


def digit_examples(demo: DemoModel) -> list[Example]:
    """An unseen digit of each class for a model of scikit-learn's digits (8 x 8, classes "0" to "9"); else none."""
    size = getattr(demo.model.config, "image_size", None)
    if demo.labels != [str(i) for i in range(10)] or size != 8:
        return []
    from ..data.datasets import load_splits, to_unit_range  # imports datasets, which other models do not need

    test = load_splits("digits").test
    # the first of each class: the same on every start
    rows = [int((test.labels == i).nonzero()[0]) for i in range(10)]
    pixels = to_unit_range(test.images[rows])
    return [Example(f"{i}", pixels[i : i + 1].expand(1, demo.num_channels, 8, 8)) for i in range(10)]


def folder_examples(demo: DemoModel, folder: str | os.PathLike) -> list[Example]:
    """The first images, by name, in and below a folder; those that cannot be decoded are named in a warning."""
    if not Path(folder).is_dir():
        raise ValueError(f"examples={str(folder)!r} is no folder.")
    found, examples = scan(Path(folder)), []
    for path in found.root.all_images():
        try:
            examples.append(Example(path.stem, prepare(demo, open_image(path))))
        except ValueError as error:
            logger.warning("left out of the examples: %s", error)
        if len(examples) == MAX_EXAMPLES:
            break
    if not examples:
        left = f"; left out: {found.summary()}" if found.left_out else ""
        raise ValueError(f"examples={str(folder)!r} has no image that Pillow reads here{left}.")
    return examples


# --- images ----------------------------------------------------------------------------------------------------------


def open_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB and upright, by the rules of `decoding`.

    Raises:
        ValueError: The file is no image that Pillow reads, is damaged, or is one that `decoding` refuses.
    """
    try:
        return open_upright(path).convert("RGB")
    except Exception as error:  # damage shows as OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise ValueError(f"{Path(path).name} cannot be read as an image: {error}.") from error


def prepare(demo: DemoModel, image: Image.Image) -> Tensor:
    """An RGB image as the model takes it: (1, C, H, W) in [0, 1], resized as the model's processor does."""
    pixels = demo.processor(image, return_tensors="pt")["pixel_values"].float()
    if demo.num_channels == 1 and pixels.shape[1] == 3:
        pixels = luminance(pixels)  # (1, 1, H, W), as the model itself would make it
    return pixels.clamp(0, 1)  # x * (1 / 255) rounds to just above 1


# --- looking and attacking -------------------------------------------------------------------------------------------


@torch.no_grad()
def look(demo: DemoModel, pixels: Tensor) -> Look:
    """One forward pass over an image (1, C, H, W): logits and routes of all parts but F_D, which `answers` mixes."""
    pixels = pixels.to(next(demo.model.parameters()).device)
    if not demo.dual:
        output = demo.model(pixels, output_router_logits=True) if has_experts(demo.model) else demo.model(pixels)
        routes = find_route(demo.parts[0], output, "")
        return Look({demo.parts[0]: output.logits[0].float().cpu()}, routes)
    if demo.merged:
        ends = {part: demo.model(pixels, alpha=alpha, output_router_logits=True) for part, alpha in ENDS.items()}
        routes = {name: route for part, output in ends.items() for name, route in find_route(part, output, "").items()}
        return Look({part: output.logits[0].float().cpu() for part, output in ends.items()}, routes, pixels)
    output = demo.model(pixels, output_router_logits=True)
    logits = {"F_S": output.standard_logits[0].float().cpu(), "F_R": output.robust_logits[0].float().cpu()}
    return Look(logits, find_route("F_S", output, "standard_") | find_route("F_R", output, "robust_"))


def find_route(part: str, output: Any, prefix: str) -> dict[str, Route]:
    """{part: route} of the first image; empty for a part without several experts."""
    scores, index = output.get(f"{prefix}router_logits"), output.get(f"{prefix}expert_index")
    if scores is None or index is None or scores.shape[1] < 2:
        return {}
    return {part: Route(tuple(index[0].reshape(-1).tolist()), tuple(scores[0].float().softmax(0).tolist()))}


def answers(demo: DemoModel, seen: Look, alpha: float | None) -> dict[str, Tensor]:
    """Class probabilities (C,) of every part, with F_D mixed at `alpha` from what was seen: no forward pass.

    With a dial in the weights F_D is asked, which takes a pass.
    """
    logits = dict(seen.logits)
    if demo.merged:
        logits["F_D"] = merged_logits(demo, seen, alpha)
    elif demo.dual:
        logits["F_D"] = demo.model.mix(logits["F_S"][None], logits["F_R"][None], alpha)[0]
    return {part: logits[part].softmax(0) for part in demo.parts}


@torch.no_grad()
def merged_logits(demo: DemoModel, seen: Look, alpha: float | None) -> Tensor:
    """Logits (C,) of the network merged at `alpha`."""
    return demo.model(seen.pixels, alpha=alpha).logits[0].float().cpu()


def new_scene(demo: DemoModel, pixels: Tensor) -> Scene:
    """An image that was not attacked yet."""
    return Scene(pixels, look(demo, pixels))


def attack_scene(demo: DemoModel, scene: Scene, settings: AttackSettings) -> Scene:
    """Look for a change of the clean image, within the radius, that changes the answer of the part aimed at.

    PGD with a fixed start, so that the same settings give the same result.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """
    check_settings(demo, settings)
    dial = {"F_D": settings.alpha, **ENDS}.get(settings.target)
    model = LogitsModel(demo.model, dial)
    images = scene.clean.to(next(demo.model.parameters()).device)
    with torch.no_grad():
        # its own answer takes the place of the true class, which nobody knows here
        answer = model(images).argmax(dim=1)
    attacked = PGD(eps=settings.eps, norm=settings.norm, steps=settings.steps, seed=0)(model, images, answer).cpu()
    return replace(scene, attacked=attacked, attacked_look=look(demo, attacked), settings=settings)


def check_settings(demo: DemoModel, settings: AttackSettings) -> None:
    """Raise a ValueError, in the words of the page, unless the attack can be made."""
    check_eps(settings.eps, settings.norm)
    if settings.target not in demo.parts:
        raise ValueError(f"target={settings.target!r} is not one of {', '.join(demo.parts)}.")
    if not (isinstance(settings.steps, int) and 1 <= settings.steps <= MAX_STEPS):
        raise ValueError(f"steps={settings.steps!r} must be an integer from 1 to {MAX_STEPS}.")


def flipped(scene: Scene, part: str) -> bool:
    """Whether the attack sent the image to other experts of a part; where it uses all, whether the first changed."""
    clean, attacked = (look.routes[part] for look in (scene.clean_look, scene.attacked_look))
    if len(clean.experts) == len(clean.probs):  # all are in use: only their order can change
        return clean.experts[0] != attacked.experts[0]
    return clean.experts != attacked.experts


def kept_alphas(demo: DemoModel, scene: Scene, steps: int = 100) -> list[float]:
    """The positions of the dial, in hundredths (a dial in the weights: twentieths), at which F_D gives this attacked
    image the clean image's answer.

    An attack that knows the dial may find another image: this is about the one at hand.
    """
    if demo.merged:
        steps = min(steps, MERGED_STEPS)  # each position merges weights and takes a pass
    alphas = [i / steps for i in range(steps + 1)]
    if demo.merged:
        pairs = [[merged_logits(demo, seen, a) for seen in (scene.clean_look, scene.attacked_look)] for a in alphas]
        return [a for a, (clean, moved) in zip(alphas, pairs, strict=True) if clean.argmax() == moved.argmax()]
    column = torch.tensor(alphas)[:, None]  # (A, 1): all positions in one mix

    def answer(seen: Look) -> Tensor:
        pair = (seen.logits[part].expand(len(alphas), -1) for part in ("F_S", "F_R"))
        return demo.model.mix(*pair, column).argmax(dim=1)

    kept = answer(scene.clean_look) == answer(scene.attacked_look)
    return [alpha for alpha, same in zip(alphas, kept.tolist(), strict=True) if same]


def default_eps(demo: DemoModel, norm: str) -> float:
    """The radius to offer first: the one the model was measured with, else a usual one of that norm."""
    return demo.eps if norm == demo.norm else USUAL_EPS[norm]


__all__ = ["DemoModel", "load_demo_model"]
