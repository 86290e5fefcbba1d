"""Small parts of a training step: checks on the host, exchange between processes, numbers kept finite."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainingArguments

from ..attacks.base import check_batch, check_label_range


@dataclass
class CheckedCollator:
    """A collator whose batches are checked on the host: on the device, each look would make a training step wait.

    Args:
        collator: Makes {"pixel_values", "labels"} from items.
        num_labels: Classes of the model; None = not known.
    """

    collator: Callable[[Any], dict[str, Any]]
    num_labels: int | None

    def __call__(self, items: Any) -> dict[str, Any]:
        """The batch of the collator.

        Raises:
            ValueError: Float images that are not in [0, 1], or labels that are no classes of the model.
        """
        batch = self.collator(items)
        images, labels = batch.get("pixel_values"), batch.get("labels")
        if isinstance(images, Tensor) and isinstance(labels, Tensor) and images.device.type == "cpu":
            # batches made on a device are looked at there, once: see `_has_checked_a_batch`
            if images.is_floating_point():  # uint8 is in range
                check_batch(images, labels)
            if self.num_labels is not None and labels.dtype == torch.int64 and labels.numel() > 0:
                check_label_range(labels, self.num_labels)
        return batch


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def recomputes_activations(args: TrainingArguments, model: nn.Module) -> bool:
    """Whether the backward pass runs parts of the forward pass again, by the trainer's settings or the model's own."""
    asked = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)  # renamed in 5.23
    return asked or getattr(model, "is_gradient_checkpointing", False)


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give all ranks rank 0's BatchNorm statistics: DDP does so only at its own forward, after the attack.

    One broadcast for all buffers of a type.
    """
    if not several_processes():
        return
    for dtype in sorted({buffer.dtype for buffer in model.buffers()}, key=str):  # in one order on all ranks
        buffers = [buffer for buffer in model.buffers() if buffer.dtype == dtype and buffer.numel() > 0]
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(flat, src=0)
        shared = flat.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(shared, buffers, strict=True)])


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, each of which has to call; the tensor itself where there is one."""
    if not several_processes():
        return values
    dist.all_reduce(values)  # in place
    return values / dist.get_world_size()


def keep_finite(attack: Callable[..., Tensor], labels: Tensor | None = None) -> Callable[..., Tensor]:
    """The attack, with the clean pixel wherever its result is not finite.

    A model whose gradients are not finite is judged by its loss (`on_nan_loss`), not refused for its images.

    Args:
        labels: (B,) int64 to attack in place of those of the objective; None = those.
    """

    def finite_attack(model: nn.Module, images: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
        attacked = attack(model, images, targets if labels is None else labels, **kwargs)
        return torch.where(attacked.isfinite(), attacked, images)  # masked writes would wait for the device

    return finite_attack


__all__ = [
    "CheckedCollator",
    "keep_finite",
    "mean_over_processes",
    "recomputes_activations",
    "several_processes",
    "share_buffers",
]
