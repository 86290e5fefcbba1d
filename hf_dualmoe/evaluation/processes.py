"""Measurements on the images of a dataset: in batches, over several processes, kept so that a restart goes on."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks.base import Classifier, frozen
from ..attacks.pgd import PGD
from ..attacks.precision import full_precision
from ..data.datasets import ImageTensorDataset, to_unit_range
from ..models.modeling_dualmoe import gate_weights
from ..models.outputs import logits_of
from ..models.parts import answering, has_experts
from .environment import check_outputs, data_digest, model_digest, write_text
from .memory import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
KEPT = ("*.safetensors", "*.partial", "*.images")  # files of measurements
WAITS = count()  # how often all processes have waited for the main one
Work = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]  # (images, labels, ids) of a batch -> see `run_batch`


# --- processes -------------------------------------------------------------------------------------------------------


class Processes:
    """The processes that share an evaluation: those of an accelerator, or this one alone without."""

    def __init__(self, accelerator: "Accelerator | None" = None):
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.is_main = self.rank == 0

    def share(self, num_images: int) -> Tensor:
        """Numbers of the images that are this process's: every `count`-th, (n,) int64; n differs by one at most."""
        return torch.arange(self.rank, num_images, self.count)

    def gather(self, value: Any) -> list[Any]:
        """What each process passes, by rank, on all of them."""
        return [value] if self.count == 1 else gather_object([value])

    def await_main(self) -> None:
        """Hold the other processes until the main one gets here, however long: a barrier would time out."""
        if self.count == 1 or not (dist.is_available() and dist.is_initialized()):
            return
        store, key = dist.distributed_c10d._get_default_store(), f"hf_dualmoe: main got to wait {next(WAITS)}"
        if self.is_main:
            store.set(key, "here")
        else:
            store.wait([key], timedelta(days=365))

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the main process, on all of them; its exception is raised on all of them too."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = make()
            except Exception as error:
                result[1] = error
        self.await_main()
        if self.count > 1:
            broadcast_object_list(result)
        if result[1] is not None:
            raise result[1]
        return result[0]


# --- one measurement -------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a measurement found on N images; the processes' parts join with `joined`.

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

    @classmethod
    def joined(cls, parts: "list[Found]") -> "Found":
        """All parts as one, its images in ascending order."""
        whole = cls(torch.cat([part.rows for part in parts]))
        order = whole.rows.argsort()
        whole.rows = whole.rows[order]
        whole.failed = torch.cat([part.failed for part in parts])[order]
        for name in dict.fromkeys(name for part in parts for name in part.tensors):
            kind = next(part.tensors[name].dtype for part in parts if name in part.tensors)
            nothing = False if kind == torch.bool else -1
            filled = [
                part.tensors.get(name, torch.full((len(part.rows),), nothing, dtype=kind)).to(kind) for part in parts
            ]
            whole.tensors[name] = torch.cat(filled)[order]
        for name in dict.fromkeys(name for part in parts for name in part.sums):
            whole.sums[name] = sum(part.sums.get(name, 0) for part in parts)
        for name in dict.fromkeys(name for part in parts for name in part.texts):
            whole.texts[name] = [text for part in parts for text in part.texts.get(name, [])]
        return whole


@contextmanager
def count_passes(module: nn.Module) -> Iterator[dict[str, float]]:
    """Count the images that `module` is called on: "forward", and "gradient" where an input gradient may follow."""
    counts = {"forward": 0, "gradient": 0}

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        images = args[0] if args else kwargs["pixel_values"]
        counts["forward"] += len(images)
        counts["gradient"] += len(images) if images.requires_grad and torch.is_grad_enabled() else 0

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


class Store:
    """Finished measurements, one safetensors file each, which a later run with the same settings does not repeat.

    Args:
        folder: Where to keep them; None = nowhere.
        settings: What the numbers depend on, fit for JSON.
        fresh: Delete what the folder holds.

    Raises:
        ValueError: The folder holds measurements made with other settings.
    """

    def __init__(self, folder: str | os.PathLike | None, settings: dict[str, Any], fresh: bool = False):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded = self.folder / SETTINGS
        if fresh:
            for path in (path for kind in KEPT for path in self.folder.glob(kind)):
                path.unlink()
        elif recorded.is_file():
            there = json.loads(recorded.read_text(encoding="utf-8"))
            differing = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
            if differing:
                shown = ", ".join(f"{n}: {there.get(n)!r} there, {settings.get(n)!r} here" for n in differing)
                raise ValueError(
                    f"resume_dir={str(self.folder)!r} holds measurements made with other settings ({shown}); choose "
                    "another folder (--output_dir), or start over in it with fresh=True (--fresh)."
                )
        write_text(recorded, json.dumps(settings, indent=2) + "\n")

    def path(self, name: str) -> Path:
        """The file of a measurement."""
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
        return Found(tensors.pop("_rows"), failed=tensors.pop("_failed"), tensors=tensors, **values)

    def save(self, name: str, found: Found) -> None:
        """Keep a finished measurement, in one step: a kill never leaves half a file."""
        if self.folder is None:
            return
        partial = self.path(name).with_name(self.path(name).name + ".partial")
        values = json.dumps({"sums": found.sums, "texts": found.texts})
        save_file({**found.tensors, "_rows": found.rows, "_failed": found.failed}, partial, {"measurement": values})
        partial.replace(self.path(name))


def percent(mask: Tensor) -> float:
    """Share of true entries, in %."""
    return 100 * float(mask.double().mean())


# --- images in batches -----------------------------------------------------------------------------------------------


def is_right(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: which images are classified rightly; ValueError where logits are NaN or infinite."""
    logits = logits_of(classifier, images)
    if not torch.isfinite(logits).all():
        raise ValueError("model returned logits that are NaN or infinite.")
    return logits.argmax(dim=1) == labels


def run_batch(work: Work, dataset: ImageTensorDataset, ids: Tensor, device: torch.device, retry: bool) -> Found:
    """Do `work` on the images `ids` (B,); where it fails and `retry` is set, on each alone: a bad one loses no other.

    Raises:
        Exception: What `work` raises, unless some of several images succeed; where memory runs out for several images,
            none is tried alone.
    """
    batch = dataset.__getitems__(ids)
    images, labels = to_unit_range(batch["pixel_values"].to(device)), batch["labels"].to(device)
    found = Found(ids, failed=torch.zeros(len(ids), dtype=torch.bool))
    try:
        result = work(images, labels, ids)
    except Exception as error:
        if not retry or (len(ids) > 1 and is_out_of_memory(error)):
            raise
        if len(ids) == 1:
            found.failed[:] = True
            found.texts["error"] = [f"image {int(ids)}: {type(error).__name__}: {error}"]
            return found
        alone = Found.joined([run_batch(work, dataset, one, device, True) for one in ids.split(1)])
        if alone.failed.all():
            raise
        return alone
    found.tensors = {name: value.cpu() for name, value in result.items() if isinstance(value, Tensor)}
    found.sums = {name: value for name, value in result.items() if isinstance(value, (int, float))}
    found.texts = {name: [value] for name, value in result.items() if isinstance(value, str)}
    return found


@torch.no_grad()
def run_batches(
    work: Work,
    dataset: ImageTensorDataset,
    rows: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    description: str | None = None,
    retry: bool = True,
    smaller: Callable[[int], None] = lambda batch_size: None,
) -> Found:
    """Do `work` on the images `rows` (n,), with a bar that shows the running accuracy ("right" of the results).

    Where a batch does not fit into memory, it and all that follow are halved; `smaller` is told the new size.
    """
    parts, right = [Found(rows[:0])], 0
    with tqdm(total=len(rows), desc=description, unit="img", disable=description is None, leave=False) as bar:
        while len(rows):
            ids = rows[:batch_size]
            part = None
            try:
                part = run_batch(work, dataset, ids, device, retry)
            except RuntimeError as error:
                if len(ids) == 1 or not is_out_of_memory(error):
                    raise
            if part is None:  # here, where the failed attempt holds no memory any more
                batch_size = len(ids) // 2
                smaller(batch_size)
                free_memory()
                continue
            parts.append(part)
            rows = rows[len(ids) :]
            right += int(parts[-1].tensors.get("right", torch.zeros(1)).sum())
            bar.update(len(ids))
            bar.set_postfix_str(f"{100 * right / sum(len(part.rows) for part in parts):.2f} %")
    found = Found.joined(parts)
    if len(found.rows) and found.failed.all():
        raise RuntimeError(found.texts["error"][0])
    return found


def correct_mask(
    classifier: Classifier,
    dataset: ImageTensorDataset,
    *,
    attack: PGD | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    description: str | None = None,
) -> Tensor:
    """Which images are classified rightly, clean or under an attack.

    Args:
        classifier: Callable from images (B, C, H, W) in [0, 1] to logits; a module is held in eval mode.
        dataset: Images and labels.
        attack: Attack to apply first; a seeded one gives the same images for any batch size.
        batch_size: Images per forward.
        device: Where the classifier is.
        description: Label of the progress bar, which shows the running accuracy; None = no bar.

    Returns:
        (N,) bool on the CPU, in dataset order.

    Raises:
        ValueError: The classifier returns NaN or infinite logits.
    """
    work, rows = classify(classifier, attack), torch.arange(len(dataset))
    options = {"batch_size": batch_size, "device": torch.device(device), "description": description}
    with full_precision(), frozen(classifier):
        return run_batches(work, dataset, rows, **options, retry=False).tensors["right"]


def classify(classifier: Classifier, attack: PGD | None = None) -> Work:
    """Work that finds which images are right (after an attack), and of a mixture the routes and loads."""

    def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Any]:
        if attack is not None:
            images = attack(classifier, images, labels, ids=ids)
        routed = routing(answering(classifier), images) if has_experts(answering(classifier)) else {}
        return {"right": is_right(classifier, images, labels), **routed}

    return work


def routing(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Of a mixture: the first choice of expert for each image, and the sums of the experts' weights in the outputs."""
    scores = model.route(images)
    loads = gate_weights(scores, model.config.router_top_k).sum(dim=0, dtype=torch.float64)
    return {"route": scores.argmax(dim=1), **{f"load_{i}": load for i, load in enumerate(loads.tolist())}}


# --- measurements ----------------------------------------------------------------------------------------------------


class Measurer:
    """Takes measurements on a dataset with the other processes, unless they are found finished.

    Args:
        dataset: Images and labels.
        processes: Who shares the images.
        store: Finished measurements.
        batch_size: Images per forward.
        device: Where the model is.
        progress: Whether to show progress bars.

    Attributes:
        failures: Name of a measurement -> why it is missing, or which images failed.
        cost: Name -> mean `forward` and `gradient` passes per image, and `seconds`.
        smaller_batches: Name -> what did not fit into memory, and how many images were looked at at once instead.
    """

    def __init__(
        self,
        dataset: ImageTensorDataset,
        processes: Processes,
        store: Store,
        *,
        batch_size: int,
        device: torch.device,
        progress: bool,
    ):
        self.dataset, self.processes, self.store = dataset, processes, store
        self.batch_size, self.device, self.progress = batch_size, device, progress and processes.is_main
        self.failures: dict[str, str] = {}
        self.cost: dict[str, dict[str, float]] = {}
        self.smaller_batches: dict[str, str] = {}

    def measure(
        self,
        name: str,
        work: Work,
        counted: nn.Module,
        *,
        dataset: ImageTensorDataset | None = None,
        at_once: bool = False,
    ) -> Found | None:
        """Take a measurement, or find it finished.

        Args:
            name: Name in the report and the store; says all that it depends on beside the store's settings.
            work: What to do on a batch.
            counted: Module whose passes count.
            dataset: Other images than those of the evaluation.
            at_once: Give `work` all images of this process in one batch.

        Returns:
            What was found on all images by all processes; None where it failed, which the report then says.
        """
        dataset = self.dataset if dataset is None else dataset
        found = self.processes.from_main(lambda: self.store.load(name))
        if found is None:
            found = self._measure(name, work, counted, dataset, at_once)
        if found is not None:
            cost = {key: found.sums[key] / len(dataset) for key in ("forward", "gradient")}
            self.cost[name] = {**cost, "seconds": round(found.sums["seconds"], 3)}
            if "memory" in found.texts:
                self.smaller_batches[name] = found.texts["memory"][0]
            if found.failed.any():
                error = found.texts["error"][0]
                self.failures[name] = f"{int(found.failed.sum())} images failed and count as wrong ({error})"
        return found

    def _measure(self, name, work, counted, dataset, at_once) -> Found | None:
        rows, started, asked = self.processes.share(len(dataset)), time.perf_counter(), self.batch_size
        options: dict[str, Any] = {"batch_size": self.batch_size, "retry": True, "smaller": self.use_smaller_batches}
        if at_once:
            options = {"batch_size": max(len(rows), 1), "retry": False}
        bar = name if self.progress and not at_once else None
        try:
            with count_passes(counted) as passes:
                part = run_batches(work, dataset, rows, **options, device=self.device, description=bar)
            part.sums = {**passes, **part.sums}
            if self.batch_size < asked:
                part.texts["memory"] = [f"{asked} images did not fit into memory; batches of {self.batch_size}"]
        except Exception as error:
            logger.debug("%s failed", name, exc_info=True)
            part = f"{type(error).__name__}: {error}"
        parts = self.processes.gather(part)
        errors = [part for part in parts if isinstance(part, str)]
        if errors:
            logger.warning("%s failed and is left out: %s", name, errors[0])
            self.failures[name] = errors[0]
            return None
        found = Found.joined(parts)
        found.sums["seconds"] = time.perf_counter() - started
        self.processes.from_main(lambda: self.store.save(name, found))
        return found

    def use_smaller_batches(self, batch_size: int) -> None:
        """Look at so many images at once from here on."""
        logger.warning("Out of memory with batches of %d images: going on with %d.", self.batch_size, batch_size)
        self.batch_size = batch_size


def measurer_of(
    model: nn.Module,
    dataset: ImageTensorDataset,
    processes: Processes,
    *,
    batch_size: int,
    progress: bool,
    resume_dir: str | os.PathLike | None,
    fresh: bool,
    **settings: Any,
) -> dict[str, Any]:
    """Look at the model's first outputs and open the store of its measurements: the arguments of a `Measurer`.

    Args:
        model: The model that is measured, in eval mode.
        resume_dir, fresh: Folder of the `Store`, and whether to start over in it.
        **settings: What the numbers depend on beside the model and the images, fit for JSON.

    Raises:
        ValueError: As `check_outputs` and `Store`.
    """
    device = device_of(model)
    check_outputs(model, dataset, batch_size, device)
    settings = {"model": model_digest(model), "images": data_digest(dataset), **settings}
    store = processes.from_main(lambda: Store(resume_dir, settings, fresh))
    options = {"batch_size": batch_size, "device": device, "progress": progress}
    return {"dataset": dataset, "processes": processes, "store": store, **options}


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are; the CPU where it has none."""
    return next(model.parameters(), torch.zeros(0)).device


__all__ = ["Found", "Measurer", "Processes", "Store", "correct_mask", "percent", "run_batches"]
