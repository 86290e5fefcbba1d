"""The files of an AutoAttack run, from which a killed run resumes.

A small safetensors file holds what is known of every image; each batch writes it anew. Broken images are appended to
a second file, "<first file>.images": each is written once.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 2  # of both files; another one is refused, since nothing tells what it would have meant


@dataclass
class Progress:
    """What a resumed run needs beside its tensors; kept as JSON.

    Args:
        key: What the run depends on beside the model: settings, and a digest of the data.
        weights: Digest of the model's weights.
        stage: Number of the attack that runs, 0 = the look at the clean images.
        accuracy: Share of images that stood after each finished stage, in [0, 1].
        flags: Sanity checks so far, by name.
        forward_rows, gradient_rows: Passes so far.
        seconds: Wall time so far.
        broken: Images in the file of broken images; what lies behind them was never finished.
    """

    key: dict[str, Any]
    weights: str = ""
    stage: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    forward_rows: int = 0
    gradient_rows: int = 0
    seconds: float = 0.0
    broken: int = 0


class KeptState:
    """The two files of a run.

    Args:
        path: The state file.
        image: (C, H, W), one of the images: it tells shape and type of the others.
    """

    def __init__(self, path: str | os.PathLike, image: Tensor):
        self.path, self.dtype, self.shape = Path(path), image.dtype, image.shape
        size = image.numel() * image.element_size()
        self.record = np.dtype([("row", "<i8"), ("image", np.uint8, (size,))])

    def begin(self) -> None:
        """Start with no broken images."""
        images_file(self.path).write_bytes(b"")

    def append(self, rows: Tensor, found: Tensor, before: int) -> None:
        """Write broken images (n, C, H, W) and their row numbers (n,) behind the `before` ones that are there."""
        records = np.empty(len(rows), self.record)
        records["row"] = rows.numpy()
        records["image"] = found.cpu().flatten(1).contiguous().view(torch.uint8).numpy()  # NumPy has no bfloat16
        with open(images_file(self.path), "r+b") as file:  # not "ab": what a killed run left unfinished is overwritten
            file.seek(before * self.record.itemsize)
            file.write(records.tobytes())

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Write the state beside its file and move it there, so that a kill never leaves half a file."""
        partial = self.path.with_name(self.path.name + ".partial")
        metadata = {"format": str(FORMAT), "autoattack": json.dumps(asdict(progress))}
        # safetensors refuses tensors that are not contiguous
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, self.path)

    def load(self, key: Mapping[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
        """Read what was kept.

        Raises:
            ValueError: The file has another format or cannot be read, or belongs to a run with another key.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"state_file={str(self.path)!r} cannot be read ({error}); {self._remedy}.") from error
        if metadata.get("format") != str(FORMAT):
            raise ValueError(
                f"state_file={str(self.path)!r} was kept by another version of hf_dualmoe (format "
                f"{metadata.get('format', 1)}; this version keeps format {FORMAT}); {self._remedy}."
            )
        progress = Progress(**json.loads(metadata["autoattack"]))
        if differing := [name for name, value in key.items() if progress.key.get(name) != value]:
            found = ", ".join(f"{name}: {progress.key.get(name)!r} there, {key[name]!r} here" for name in differing)
            raise ValueError(f"state_file={str(self.path)!r} belongs to another run ({found}); give another file.")
        return progress, tensors

    def load_broken(self, count: int) -> tuple[Tensor, Tensor]:
        """Row numbers (count,) int64 and images (count, C, H, W) of the first `count` broken images.

        Raises:
            ValueError: There are not so many.
        """
        path = images_file(self.path)
        if not path.is_file() or path.stat().st_size < count * self.record.itemsize:
            raise ValueError(f"state_file={str(self.path)!r} has lost images that belong in {path.name}; delete both.")
        records = np.fromfile(path, self.record, count)
        # the images lie between row numbers
        images = torch.from_numpy(np.ascontiguousarray(records["image"])).view(self.dtype)
        return torch.from_numpy(records["row"].astype(np.int64)), images.view(count, *self.shape)

    @property
    def _remedy(self) -> str:
        return f"delete it and {images_file(self.path).name}, or give another file"


def images_file(state_file: Path) -> Path:
    """The file of broken images that goes with a state file."""
    return state_file.with_name(state_file.name + ".images")


def remove_state(state_file: str | os.PathLike) -> None:
    """Delete what `autoattack` kept, where it is."""
    for path in (Path(state_file), images_file(Path(state_file))):
        path.unlink(missing_ok=True)


__all__ = ["KeptState", "Progress", "remove_state"]
