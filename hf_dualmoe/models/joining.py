"""Join any two trained classifiers into a dual model that takes images in [0, 1].

    dual = join_models("user/accurate-vit", "outputs/harden/model", alpha=0.7)

Each part keeps its own normalisation and its own image size: the dual model normalises and resizes for it. An attack
counts in the pixels of the images that the dual model takes.
"""

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .class_names import are_generic, labels_of, match_names
from .loading import NormalizedClassifier, load_classifier, size_of
from .modeling_dualmoe import DualMoEForImageClassification
from .new_head import rename_classes
from .parts import has_dial, has_experts

Parts = dict[str, nn.Module]  # "standard" and "robust"


def join_models(
    standard: nn.Module | str | os.PathLike,
    robust: nn.Module | str | os.PathLike,
    alpha: float = 0.75,
    *,
    mixing: str = "probs",
    image_size: int | None = None,
    check_names: bool = True,
) -> DualMoEForImageClassification:
    """Join two classifiers; what `load_classifier` gave becomes part of the dual model and is not copied.

    Args:
        standard, robust: F_S and F_R: of `load_classifier`, or what it takes: a folder, or an id on the Hub.
        alpha: Weight of F_R in [0, 1].
        mixing: "probs", "logits" or "weights", see `DualMoEConfig`.
        image_size: Side in pixels of the images that the dual model takes; None = that of a part that is a mixture of
            ours, which cannot resize, else that of F_R.
        check_names: Whether the classes must have the same names; False = the same number of them in the same order is
            enough, and those of F_R count.

    Raises:
        ValueError: A part cannot be loaded or is a dual model itself, the two have other classes, another order of
            them, or other channels, or cannot be resized or mixed as asked for.
    """
    parts = {"standard": as_classifier(standard), "robust": as_classifier(robust)}
    for name, part in parts.items():
        if has_dial(part):
            raise ValueError(f"{name} is a dual model itself; give one of its two parts, or what its merge() returns.")
    channels = [part.config.num_channels for part in parts.values()]
    if channels[0] != channels[1]:
        raise ValueError(f"standard takes images of {channels[0]} channels and robust of {channels[1]}: not the same.")
    names, size = common_names(parts, check_names), common_size(parts, image_size)
    resizes = any(part.config.image_size != size for part in parts.values())
    fields: dict[str, Any] = {"mixing": mixing, "input_size": size if resizes else None}
    for name, part in parts.items():
        rename_classes(part, names)  # one set of names, also inside: from_models compares them
        fields |= normalisation(name, part)
    networks = [network_of(part) for part in parts.values()]
    return DualMoEForImageClassification.from_models(*networks, alpha, **fields).eval()


def as_classifier(source: nn.Module | str | os.PathLike) -> nn.Module:
    """The classifier itself, or the one in a folder or on the Hub."""
    return source if isinstance(source, nn.Module) else load_classifier(source)


def network_of(part: nn.Module) -> PreTrainedModel:
    """The network of a classifier; its config learns the image size where it says another one, or none."""
    if not isinstance(part, NormalizedClassifier):
        return part
    if size_of(part.network.config) != part.config.image_size:
        part.network.config.image_size = part.config.image_size  # DualMoEConfig reads it, to check and to resize
    return part.network


def normalisation(name: str, part: nn.Module) -> dict[str, list[float]]:
    """The fields of `DualMoEConfig` for what a part's images are normalised by; none where it does that itself."""
    if not isinstance(part, NormalizedClassifier):
        return {}
    mean, std = part.preprocessing.mean, part.preprocessing.std
    if set(mean) == {0.0} and set(std) == {1.0}:  # the identity would cost a pass over each image
        return {}
    return {f"{name}_image_mean": mean, f"{name}_image_std": std}


def common_names(parts: Parts, check_names: bool = True) -> list[str]:
    """The class names of both parts, in the words of F_R unless it has none.

    Raises:
        ValueError: The classes are others, or in another order; the message names the first differences.
    """
    standard, robust = (labels_of(parts[name].config) for name in ("standard", "robust"))
    if len(standard) != len(robust):
        first = ", ".join(map(repr, standard[:3])), ", ".join(map(repr, robust[:3]))
        raise ValueError(
            f"standard has {len(standard)} classes ({first[0]}, ...) and robust {len(robust)} ({first[1]}, ...): a "
            "dual model needs the same classes."
        )
    if are_generic(robust):
        return standard
    if are_generic(standard) or not check_names:
        return robust
    found = match_names(standard, robust)
    wrong = [i for i, at in enumerate(found) if at != i]
    if wrong:
        order = "the same classes in another order" if None not in found else "other classes"
        pairs = "; ".join(f"label {i} is {standard[i]!r} and {robust[i]!r}" for i in wrong[:3])
        raise ValueError(
            f"standard and robust have {order}: {pairs}{'; ...' if len(wrong) > 3 else ''}. Train one with the labels "
            "of the other, or, where they mean the same, give check_names=False (--ignore_class_names)."
        )
    return robust


def common_size(parts: Parts, asked: int | None) -> int:
    """The side of the images that the dual model takes.

    Raises:
        ValueError: It is below 1, or a mixture of ours, which resizes nothing, would get images of another size.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"image_size={asked!r} must be at least 1.")
    sizes = {name: part.config.image_size for name, part in parts.items()}
    fixed = {name: size for name, size in sizes.items() if has_experts(parts[name])}
    size = next(iter(fixed.values()), sizes["robust"]) if asked is None else asked
    for name, own in fixed.items():
        if own != size:
            raise ValueError(
                f"{name} is a mixture of ours for images of {own} pixels, which resizes nothing; the dual model would "
                f"take {size} pixels{'' if asked is None else f' (image_size={asked})'}."
            )
    return size


__all__ = ["join_models"]
