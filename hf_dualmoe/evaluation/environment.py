"""Around an evaluation: checks of its input, digests, descriptions of model and hardware."""

import hashlib
import io
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks.flags import digest, weights_digest
from ..data.datasets import ImageTensorDataset, to_unit_range
from ..models.loading import NormalizedClassifier
from ..models.outputs import logits_of

PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets", "huggingface_hub", "hf_dualmoe")
LOOK = 8  # images to try a model on

# --- checks ----------------------------------------------------------------------------------------------------------


def check_class_names(model: nn.Module, class_names: list[str], names_too: bool = True) -> None:
    """Refuse a dataset whose labels do not mean what the model's outputs mean.

    Args:
        model: Model; without a config nothing is known of its classes.
        class_names: Name of each class of the dataset, in label order.
        names_too: Whether to compare names besides their number; names like LABEL_0 say nothing and match any.

    Raises:
        ValueError: The numbers of classes, their names or their order differ.
    """
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    if not id2label:
        return
    names = [str(id2label[i]) for i in sorted(id2label)]
    if len(names) != len(class_names):
        raise ValueError(
            f"dataset has {len(class_names)} classes ({_few(class_names)}) but the model has {len(names)} "
            f"(id2label: {_few(names)}); they must be the same classes."
        )
    if not names_too or names == class_names or names == [f"LABEL_{i}" for i in range(len(names))]:
        return
    first = next(i for i, pair in enumerate(zip(names, class_names, strict=True)) if pair[0] != pair[1])
    how = "in another order than" if sorted(names) == sorted(class_names) else "other than"
    raise ValueError(
        f"dataset has class names {how} the model's id2label: label {first} is {class_names[first]!r} in the dataset "
        f"and {names[first]!r} in the model. Where both mean the same, pass check_names=False "
        "(--ignore_class_names)."
    )


def check_image_shape(model: nn.Module, images: torch.Tensor) -> None:
    """Refuse images of another size or number of channels than the model's config names: a CNN would take them.

    Args:
        model: Model; where its config names no size, or no channels, these may be any.
        images: Shape (N, C, H, W).

    Raises:
        ValueError: They differ; the message names both shapes.
    """
    config, found = getattr(model, "config", None), tuple(images.shape[1:])
    size = getattr(config, "image_size", None)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    wanted = (getattr(config, "num_channels", None), *size)
    if any(side not in (None, given) for side, given in zip(wanted, found, strict=True)):
        wanted = [given if side is None else side for side, given in zip(wanted, found, strict=True)]
        raise ValueError(
            f"dataset's images are {' x '.join(map(str, found))} (channels x height x width), but the model takes "
            f"{' x '.join(map(str, wanted))}; load them with the model's image_size and num_channels."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def pixel_radius(text: str) -> float:
    """A radius from a command line, such as 8/255 or 0.031; ValueError where it is neither."""
    numerator, _, denominator = text.partition("/")
    divisor = float(denominator or 1)
    if divisor == 0:
        raise ValueError(f"{text!r} divides by zero.")
    return float(numerator) / divisor


def check_num_images(num_images: int | None, num_available: int) -> None:
    """Raise a ValueError where more images are asked for than there are."""
    if (num_images or 1) > num_available:
        raise ValueError(
            f"num_images={num_images!r}, but the dataset has {num_available} images; allowed is 1 to {num_available}."
        )


@torch.no_grad()
def check_outputs(model: nn.Module, dataset: ImageTensorDataset, batch_size: int, device: torch.device) -> None:
    """Look at the logits of the first images before hours are spent; `model` is in eval mode.

    Raises:
        ValueError: Most of them are NaN or infinite, or they have another number of classes than the dataset.
    """
    few = min(batch_size, LOOK)  # a whole batch may not fit into memory, which the evaluation itself copes with
    logits = logits_of(model, to_unit_range(dataset.images[:few].to(device)))
    if logits.ndim != 2 or logits.shape[1] != len(dataset.class_names):
        raise ValueError(
            f"model returned logits of shape {tuple(logits.shape)}; expected (images, {len(dataset.class_names)}), "
            "the number of classes of dataset."
        )
    bad = int((~torch.isfinite(logits)).any(dim=1).sum())
    if 2 * bad > len(logits):  # a few bad images are left to the evaluation, which counts them as wrong
        raise ValueError(f"model returned logits that are NaN or infinite for {bad} of {len(logits)} clean images.")


# --- files and digests -----------------------------------------------------------------------------------------------


def print_in_any_encoding() -> None:
    """Let a script print any text: where a terminal or pipe has no letter for it (C locale, Windows), as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader or a crash never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def model_digest(model: nn.Module) -> str:
    """Digest of weights and configuration; of a dual model without `alpha`, which measurements carry in their name."""
    # where a model comes from and how it was saved, not what it computes
    unrelated = ("alpha", "auto_map", "transformers_version", "_name_or_path", "dtype", "architectures")

    def related(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(name): related(inner) for name, inner in value.items() if name not in unrelated}

    config = getattr(model, "config", None)
    settings = related(config.to_dict()) if hasattr(config, "to_dict") else {}
    text = json.dumps(settings, sort_keys=True, default=str) + weights_digest(model)  # equal in any order of fields
    return hashlib.sha256(text.encode()).hexdigest()[:16]  # 64 bits are plenty: nobody looks for a collision


def digest_of_weights(model: nn.Module) -> str:
    """Digest of the weights alone, the same in whatever precision they are held."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # float32 holds half precision exactly: a model saved in it is the one that is measured
    return digest({n: t.detach().float() if t.is_floating_point() else t for n, t in tensors.items()})[:16]


def data_digest(dataset: ImageTensorDataset) -> str:
    """Digest of images and labels."""
    return digest({"images": dataset.images, "labels": dataset.labels})[:16]


# --- descriptions ----------------------------------------------------------------------------------------------------


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Kind, architecture, dial and number of parameters of a model, for a report; `weights` is a digest of them."""
    config = getattr(model, "config", None)
    description = {
        "kind": {"dual_moe": "dual model", "robust_moe": "mixture of experts"}.get(
            getattr(config, "model_type", None), type(unwrapped(model)).__name__
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": digest_of_weights(model),
    }
    if hasattr(config, "alpha") and hasattr(config, "mixing"):
        maps = ("standard_logit_map", "robust_logit_map")
        description |= {name: getattr(config, name) for name in ("alpha", "mixing", *maps) if hasattr(config, name)}
    robust = getattr(config, "robust", config)
    fields = ("backbone", "backbone_kwargs", "stem", "width", "image_size", "num_channels", "num_experts")
    fields += ("router_top_k", "router", "shared_stages")
    return description | {name: getattr(robust, name) for name in fields if hasattr(robust, name)}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the normalisation that `load_classifier` puts in front."""
    return model.network if isinstance(model, NormalizedClassifier) else model


def _cpu_name() -> str:
    """Model name of the processor where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), platform.machine())


def describe_environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Python and library versions, and the hardware that `device` is on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None  # not installed, or run from a source folder
    device = torch.device(device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": device.type,
        "hardware": f"{hardware}, {os.cpu_count()} CPU cores",
    }


__all__ = ["check_class_names", "check_outputs", "describe_environment", "describe_model", "digest_of_weights"]
