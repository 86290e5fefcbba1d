"""Weights of the paper's released code as models of this package.

    from hf_dualmoe.models.converting import from_official

    from_official("checkpoint/res18_moe-RT_ER-6.t7").save_pretrained("official-rt-er")  # safetensors

The code, https://github.com/TIML-Group/Robust-MoE-Dual-Model, saves pickles whose entry "net" is the state dict of a
top-1 mixture of ResNet18s or ViT-Small/16s behind a linear router, or of a dual model of two of these. They are read
with PyTorch's `weights_only`, so that none can run code.
"""

import math
import os
import pickle
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .configuration_dualmoe import MoEConfig
from .modeling_dualmoe import DualMoEForImageClassification
from .moe_dualmoe import MoEForImageClassification
from .pretrained_dualmoe import check_same_parameters

# per channel, in [0, 1]; the code writes them in 255ths: cifar10_RT_ER.py and cifar10_JTDMoE.py
CIFAR_MEAN = [125.307 / 255, 122.961 / 255, 113.8575 / 255]
CIFAR_STD = [51.5865 / 255, 50.847 / 255, 51.255 / 255]
RENAMES = (  # pattern of a name in the released code -> name here
    (r"^experts\.(\d+)\.(?:net|vit)\.", r"experts.\1."),
    (r"^router\.gate\.", "router.1."),
    (r"\.shortcut\.", ".downsample."),
    (r"^(experts\.\d+)\.linear\.", r"\1.fc."),
)
BACKBONES = {"net": {"backbone": "resnet18", "stem": "cifar"}, "vit": {"backbone": "vit_small_patch16_224"}}


def from_official(
    path: str | os.PathLike,
    *,
    alpha: float = 0.7,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    class_names: Sequence[str] | None = None,
) -> MoEForImageClassification | DualMoEForImageClassification:
    """Read a checkpoint of the paper's released code; the model gives its logits.

    Args:
        path: File that `torch.save` wrote there, such as "checkpoint/dual_model_res18-JTDMoE.t7".
        alpha: Of a dual model, the weight of F_R in [0, 1], which the file does not hold; default: that of the code.
        image_mean, image_std: Per-channel normalisation in [0, 1] pixel units that the weights were trained with,
            which the file does not hold either; default: that of the code's CIFAR-10 scripts.
        class_names: Name of each class, in label order; None = LABEL_0, LABEL_1, ...

    Returns:
        The model in eval mode. Its images are in [0, 1]; a dual model mixes logits, as the code does.

    Raises:
        ValueError: The file is no such checkpoint, or holds more than tensors and plain data.
    """
    state = read_state(path)
    settings = {"image_mean": image_mean or CIFAR_MEAN, "image_std": image_std or CIFAR_STD}
    if class_names is not None:
        settings["id2label"] = dict(enumerate(class_names))
        settings["label2id"] = {name: i for i, name in enumerate(class_names)}
    parts = [part_of(state, prefix) for prefix in ("Smoe.", "Rmoe.")]
    if not any(parts):
        return create_mixture(state, settings)
    standard, robust = (create_mixture(part, settings) for part in parts)
    return DualMoEForImageClassification.from_models(standard, robust, alpha, mixing="logits")


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the prefix that `DataParallel` puts before each name."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"path={str(path)!r} cannot be read as tensors and plain data alone: {str(error).splitlines()[0]} "
            'If you trust it, read it where it was written and save its weights alone: torch.save({"net": ...}, path).'
        ) from error
    state = content.get("net", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"path={str(path)!r} holds no state dict, nor one under 'net'.")
    return part_of(state, "module.") or state


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def create_mixture(state: dict[str, Tensor], settings: dict) -> MoEForImageClassification:
    """The mixture with the weights of one of the released code; `settings` are the fields that they do not show."""
    found = next((re.match(r"experts\.0\.(net|vit)\.", name) for name in state if name.startswith("experts.0.")), None)
    gate = state.get("router.gate.weight")
    if not found or gate is None or gate.ndim != 2:
        raise ValueError(
            "The checkpoint has no experts.0.net, experts.0.vit or router.gate: not a mixture of that code."
        )
    renamed = {new_name(name): tensor for name, tensor in state.items()}
    head = renamed.get("experts.0.fc.bias", renamed.get("experts.0.head.bias"))
    config = MoEConfig(
        **BACKBONES[found[1]],
        num_experts=len(gate),
        image_size=math.isqrt(gate.shape[1] // 3),  # the gate sees 3 * size**2 numbers
        num_labels=0 if head is None else len(head),
        **settings,
    )
    model = MoEForImageClassification(config).eval()
    check_same_parameters(model.state_dict(), renamed, f"{len(gate)} experts {config.backbone!r} and a linear router")
    model.load_state_dict(renamed)
    return model


def new_name(name: str) -> str:
    """The name here of a parameter or buffer of the released code."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


__all__ = ["from_official"]
