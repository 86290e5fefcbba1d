"""What a measurement found, and the folder that keeps it, so that a restart does not repeat it."""

import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .environment import write_text

logger = logging.getLogger("hf_dualmoe.evaluation.processes")  # all warnings about measurements under one name

FORMAT = 2  # of the files; measurements in another one are refused
SETTINGS = "settings.json"
KEPT = ("*.safetensors", "*.partial", "*.images")  # files of measurements


@dataclass(frozen=True)
class Outcome:
    """Which of N images are classified rightly.

    Args:
        right: (N,) bool.
        failed: (N,) bool: images of which that is not known; they are False in `right`, and so count as wrong.
    """

    right: Tensor
    failed: Tensor

    def __and__(self, other: "Outcome") -> "Outcome":
        """Right in both; known where it is known in both, or where one of them says wrong."""
        wrong = [~part.right & ~part.failed for part in (self, other)]
        return Outcome(self.right & other.right, (self.failed | other.failed) & ~wrong[0] & ~wrong[1])


@dataclass
class Found:
    """Result of a measurement on N images; `joined` joins the parts of processes.

    Args:
        rows: (n,) int64 numbers of the images, 0 .. N-1 once joined.
        tensors: One entry per image: name -> (n,) bool or int64; False or -1 for images in `failed`.
        sums: Numbers that add up over images, such as passes.
        texts: Name -> remarks.
        failed: (n,) bool: the images on which the measurement broke down.
    """

    rows: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    failed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @property
    def outcome(self) -> Outcome:
        """Which images are right, of a measurement that looked for that."""
        return Outcome(self.tensors["right"] & ~self.failed, self.failed)

    @classmethod
    def joined(cls, parts: "list[Found]") -> "Found":
        """All parts as one, its images in ascending order."""
        whole = cls(torch.cat([part.rows for part in parts]))
        order = whole.rows.argsort()
        whole.rows = whole.rows[order]
        whole.failed = torch.cat([part.failed for part in parts])[order]
        for name in dict.fromkeys(name for part in parts for name in part.tensors):
            kind = next(part.tensors[name].dtype for part in parts if name in part.tensors)
            nothing = False if kind == torch.bool else -1  # for images that failed, of which a part has no value
            filled = [
                part.tensors.get(name, torch.full((len(part.rows),), nothing, dtype=kind)).to(kind) for part in parts
            ]
            whole.tensors[name] = torch.cat(filled)[order]
        for name in dict.fromkeys(name for part in parts for name in part.sums):
            whole.sums[name] = sum(part.sums.get(name, 0) for part in parts)
        for name in dict.fromkeys(name for part in parts for name in part.texts):
            whole.texts[name] = [text for part in parts for text in part.texts.get(name, [])]
        return whole


class Store:
    """Finished measurements, one safetensors file each, which a later run with the same settings does not repeat.

    Args:
        folder: Where to keep them; None = nowhere.
        settings: What the numbers depend on, fit for JSON.
        fresh: Delete what the folder holds.

    Raises:
        ValueError: The folder holds measurements made with other settings, or files of something else.
    """

    def __init__(self, folder: str | os.PathLike | None, settings: dict[str, Any], fresh: bool = False):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        settings = {**settings, "format of the files": FORMAT}
        recorded = self.folder / SETTINGS
        try:
            there = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {}
        except ValueError:  # no JSON: not ours
            there = {}
        kept = [path for kind in (SETTINGS, *KEPT) for path in self.folder.glob(kind)]
        if kept and not (
            isinstance(there, dict) and {"model", "images"} <= set(there)
        ):  # weights of a model, say, which fresh would delete
            raise ValueError(
                f"resume_dir={str(self.folder)!r} holds {kept[0].name}, and nothing says that it is of an evaluation; "
                "choose another folder (--output_dir)."
            )
        differing = [name for name in {**there, **settings} if there.get(name) != settings.get(name)] if there else []
        if differing and not fresh:
            shown = ", ".join(f"{n}: {there.get(n)!r} there, {settings.get(n)!r} here" for n in differing)
            raise ValueError(
                f"resume_dir={str(self.folder)!r} holds measurements made with other settings ({shown}); choose "
                "another folder (--output_dir), or start over in it with fresh=True (--fresh)."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in kept if fresh else ():
            path.unlink()
        write_text(recorded, json.dumps(settings, indent=2) + "\n")

    def path(self, name: str) -> Path:
        """The file of a measurement."""
        # fit for any file system
        return self.folder / (re.sub(r"[^a-z0-9.=]+", "-", name.lower()).strip("-") + ".safetensors")

    def load(self, name: str) -> Found | None:
        """A finished measurement; None where there is none, or its file cannot be read."""
        if self.folder is None or not self.path(name).is_file():
            return None
        try:
            with safe_open(self.path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                values = json.loads(file.metadata()["measurement"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s cannot be read (%s); it is measured again.", self.path(name), error)
            return None
        # the underscore sets these two apart from a measurement's own tensors
        return Found(tensors.pop("_rows"), failed=tensors.pop("_failed"), tensors=tensors, **values)

    def save(self, name: str, found: Found) -> None:
        """Keep a finished measurement, in one step: a kill never leaves half a file."""
        if self.folder is None:
            return
        partial = self.path(name).with_name(self.path(name).name + ".partial")
        values = json.dumps({"sums": found.sums, "texts": found.texts})
        save_file({**found.tensors, "_rows": found.rows, "_failed": found.failed}, partial, {"measurement": values})
        partial.replace(self.path(name))  # atomic


__all__ = ["Found", "Outcome", "Store"]
