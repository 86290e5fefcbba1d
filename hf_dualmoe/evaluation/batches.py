"""Work on a dataset in batches: one bad image costs no other, and a batch that is too large is halved."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks.base import Attack, Classifier, device_of, frozen
from ..attacks.precision import full_precision
from ..data.datasets import ImageTensorDataset, to_unit_range
from .memory import free_memory, is_out_of_memory
from .store import Found
from .work import Work, classify


@contextmanager
def count_passes(module: nn.Module) -> Iterator[dict[str, float]]:
    """Count the images that `module` is called on: "forward", and "gradient" where an input gradient may follow."""
    counts = {"forward": 0, "gradient": 0}

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        images = args[0] if args else kwargs["pixel_values"]
        counts["forward"] += len(images)
        # an attack asks for it
        counts["gradient"] += len(images) if images.requires_grad and torch.is_grad_enabled() else 0

    handle = module.register_forward_pre_hook(note, with_kwargs=True)  # kwargs: our models name their images
    try:
        yield counts
    finally:
        handle.remove()


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
        if not retry or (len(ids) > 1 and is_out_of_memory(error)):  # memory is the caller's: it halves the batch
            raise
        if len(ids) == 1:
            found.failed[:] = True
            found.texts["error"] = [f"image {int(ids)}: {type(error).__name__}: {error}"]
            return found
        alone = Found.joined([run_batch(work, dataset, one, device, True) for one in ids.split(1)])
        if alone.failed.all():  # then it is not the images' fault
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
    parts, right = [Found(rows[:0])], 0  # one process of many may have no images
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
                batch_size = len(ids) // 2  # of what was tried: the last batch may be smaller than batch_size
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
    attack: Attack | None = None,
    batch_size: int = 256,
    description: str | None = None,
) -> Tensor:
    """Which images are classified rightly, clean or under an attack.

    Args:
        classifier: Callable from images (B, C, H, W) in [0, 1] to logits; a module is held in eval mode.
        dataset: Images and labels.
        attack: Attack to apply first; a seeded one gives the same images for any batch size.
        batch_size: Images per forward.
        description: Label of the progress bar, which shows the running accuracy; None = no bar.

    Returns:
        (N,) bool on the CPU, in dataset order.

    Raises:
        ValueError: The classifier returns NaN or infinite logits.
    """
    with full_precision(), frozen(classifier):
        found = run_batches(
            classify(classifier, attack),
            dataset,
            torch.arange(len(dataset)),
            batch_size=batch_size,
            device=device_of(classifier),
            description=description,
            retry=False,
        )
    return found.tensors["right"]


__all__ = ["correct_mask", "count_passes", "run_batches"]
