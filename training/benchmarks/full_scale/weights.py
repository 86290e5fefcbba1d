"""Weights in half precision as files small enough to be carried singly, and back."""

import math
import shutil
from pathlib import Path

from safetensors.torch import load, save
from torch import nn

from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from training.benchmarks.shared.store import read_json

PART = 15_000_000  # bytes of a part of the weights at most


def save_whole(model: nn.Module, folder: Path) -> None:
    """Save a model so that no half of it is ever found there."""
    partial = folder.with_name("unfinished-model")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_parts(model: nn.Module, name: str, folder: Path) -> list[str]:
    """The weights as safetensors, cut into files of at most `PART` bytes; their names."""
    content = save({key: tensor.contiguous() for key, tensor in model.state_dict().items()})
    count = math.ceil(len(content) / PART)
    names = [f"{name}.safetensors.{i + 1}-of-{count}" for i in range(count)]
    for i, part in enumerate(names):
        (folder / part).write_bytes(content[i * PART : (i + 1) * PART])
    return names


def join_parts(folder: Path) -> list[Path]:
    """Make folders that `from_pretrained` loads, in `models/`, of the weights whose parts are all there.

    Args:
        folder: Holds results.json and the parts.

    Returns:
        The folders.
    """
    joined = []
    for name, entry in read_json(folder / "results.json")["weights"].items():
        if not all((folder / file).is_file() for file in entry["files"]):
            print(f"{name}: parts are missing", flush=True)
            continue
        kinds = (DualMoEForImageClassification, MoEForImageClassification)
        kind = {kind.config_class.model_type: kind for kind in kinds}[entry["config"]["model_type"]]
        model = kind(kind.config_class(**entry["config"]))
        model.load_state_dict(load(b"".join((folder / file).read_bytes() for file in entry["files"])))
        save_whole(model.half().eval(), folder / "models" / name)
        joined.append(folder / "models" / name)
    return joined
