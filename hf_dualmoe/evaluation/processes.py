"""Measurements on a dataset by one process or several: each takes its share of the images, all get the same result."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ..attacks.base import device_of
from ..data.datasets import ImageTensorDataset
from .batches import count_passes, run_batches
from .environment import check_outputs, data_digest, model_digest
from .store import Found, Store
from .work import Work

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# a key stays set, so each wait needs one of its own
WAITS = count()  # how often all processes have waited for the main one


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
        """Give every process the values of all, by rank."""
        return [value] if self.count == 1 else gather_object([value])

    def await_main(self) -> None:
        """Hold the other processes until the main one gets here, however long: a barrier would time out."""
        if self.count == 1 or not (dist.is_available() and dist.is_initialized()):
            return
        store, key = dist.distributed_c10d._get_default_store(), f"hf_dualmoe: main got to wait {next(WAITS)}"
        if self.is_main:
            store.set(key, "here")
        else:
            store.wait([key], timedelta(days=365))  # the default gives up after minutes

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Call `make` on the main process; return its result, or raise its exception, on all of them."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = make()
            except Exception as error:
                result[1] = error
        self.await_main()
        if self.count > 1:
            broadcast_object_list(result)  # the exception too: else the others would wait for ever
        if result[1] is not None:
            raise result[1]
        return result[0]


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
        earlier: Seconds that the measurements took which were found finished.
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
        # one bar, not many
        self.batch_size, self.device, self.progress = batch_size, device, progress and processes.is_main
        self.failures: dict[str, str] = {}
        self.cost: dict[str, dict[str, float]] = {}
        self.earlier = 0.0
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
        elif name not in self.cost:
            self.earlier += found.sums["seconds"]
        if found is not None:
            cost = {key: found.sums[key] / len(dataset) for key in ("forward", "gradient")}
            self.cost[name] = {**cost, "seconds": round(found.sums["seconds"], 3)}
            if "memory" in found.texts:
                self.smaller_batches[name] = found.texts["memory"][0]
            if found.failed.any():
                error = found.texts["error"][0]
                self.failures[name] = f"{int(found.failed.sum())} images failed and count as wrong ({error})"
        return found

    def _measure(
        self, name: str, work: Work, counted: nn.Module, dataset: ImageTensorDataset, at_once: bool
    ) -> Found | None:
        started = time.perf_counter()
        parts = self.processes.gather(self._part(name, work, counted, dataset, at_once))
        errors = [part for part in parts if isinstance(part, str)]  # without one process, some images are missing
        if errors:
            logger.warning("%s failed and is left out: %s", name, errors[0])
            self.failures[name] = errors[0]
            return None
        found = Found.joined(parts)
        found.sums["seconds"] = time.perf_counter() - started
        self.processes.from_main(lambda: self.store.save(name, found))
        return found

    def _part(
        self, name: str, work: Work, counted: nn.Module, dataset: ImageTensorDataset, at_once: bool
    ) -> Found | str:
        """Measure this process's share of the images; where that fails, return why."""
        rows, asked = self.processes.share(len(dataset)), self.batch_size
        try:
            with count_passes(counted) as passes:
                part = run_batches(
                    work,
                    dataset,
                    rows,
                    batch_size=max(len(rows), 1) if at_once else self.batch_size,
                    device=self.device,
                    description=name if self.progress and not at_once else None,
                    retry=not at_once,
                    smaller=self.use_smaller_batches,
                )
        except Exception as error:
            logger.debug("%s failed", name, exc_info=True)
            return f"{type(error).__name__}: {error}"
        part.sums = {**passes, **part.sums}
        if self.batch_size < asked:
            part.texts["memory"] = [f"{asked} images did not fit into memory; batches of {self.batch_size}"]
        return part

    def use_smaller_batches(self, batch_size: int) -> None:
        """Look at so many images at once from here on."""
        logger.warning("Out of memory with batches of %d images: going on with %d.", self.batch_size, batch_size)
        self.batch_size = batch_size


def open_measurer(
    model: nn.Module,
    dataset: ImageTensorDataset,
    processes: Processes,
    *,
    settings: Mapping[str, Any],
    batch_size: int,
    progress: bool,
    resume_dir: str | os.PathLike | None,
    fresh: bool,
) -> Measurer:
    """Look at the model's first outputs, and open the store of its measurements.

    Args:
        model: The model that is measured, in eval mode.
        dataset, processes, batch_size, progress: As in `Measurer`.
        settings: What the numbers depend on beside the model and the images, fit for JSON.
        resume_dir, fresh: Folder of the `Store`, and whether to start over in it.

    Raises:
        ValueError: As `check_outputs` and `Store`.
    """
    device = device_of(model)
    check_outputs(model, dataset, batch_size, device)
    known = {"model": model_digest(model), "images": data_digest(dataset), **settings}
    store = processes.from_main(lambda: Store(resume_dir, known, fresh))
    return Measurer(dataset, processes, store, batch_size=batch_size, device=device, progress=progress)


__all__ = ["Measurer", "Processes", "open_measurer"]
