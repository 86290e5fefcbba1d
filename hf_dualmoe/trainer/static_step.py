"""A training step as a function of tensors that stay where they are, which `step_graph.py` can record."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..losses.adversarial import LossOutput
from ..models.experts_dualmoe import static_shapes

if TYPE_CHECKING:
    from .trainer import RobustTrainer

RADII = ("eps", "step_size")  # what the warm-up of an attack changes
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "_unique2", "unique_dim", "equal")


# --- what a step may not do ------------------------------------------------------------------------------------------


class WaitWatch(TorchDispatchMode):
    """Notes the operations within it that wait for the device or copy from the host; `names` are those found."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _waits(func, args, out):
            self.names.append(str(func))
        return out


def _waits(func: Any, args: tuple, out: Any) -> bool:
    name = func.overloadpacket.__name__
    if name in WAITING or name == "lift_fresh":  # the last: a number or list that becomes a tensor
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave" and func._overloadname == "Tensor":
        return True
    if name in ("copy_", "_to_copy"):
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
        return source.device != target.device
    return False


# --- the static step -------------------------------------------------------------------------------------------------


class StaticAttack:
    """An attack whose radii are tensors, so that a recorded step reads the present ones.

    Args:
        attack: A `PGD` or `NFGSM`.
        device: Where the tensors are.
    """

    def __init__(self, attack: Any, device: torch.device):
        names = [f.name for f in fields(attack) if f.name in RADII and getattr(attack, f.name) is not None]
        self.radii = {name: torch.empty((), device=device) for name in names}
        self.attack = replace(attack, **self.radii)
        self.fill(attack)

    def fill(self, attack: Any) -> None:
        """Take over the radii of an attack with the same settings."""
        for name, radius in self.radii.items():
            radius.fill_(getattr(attack, name))


@dataclass
class StepResult:
    """Results of a step: tensors on the device, which the next replay overwrites.

    Args:
        loss: Scalar, divided by the number of accumulated steps.
        output: What the objective returned.
        images: (B, C, H, W) augmented images.
        gradients: One per parameter of the step; None where the loss does not depend on it.
        values: (1 + terms,) float32: the loss before the division, and each term.
    """

    loss: Tensor
    output: LossOutput
    images: Tensor
    gradients: list[Tensor | None]
    values: Tensor


class StaticStep:
    """One step of a trainer as a function of tensors that stay where they are.

    Args:
        trainer: Whose objective, attacks and augmentation it runs.
        batch: What one batch looks like: {"pixel_values", "labels"} on the device.
    """

    def __init__(self, trainer: "RobustTrainer", batch: dict[str, Tensor]):
        self.trainer = trainer
        self.batch = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
        self.accumulation = torch.ones((), device=trainer.args.device)  # a Python number would be recorded for good
        self.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self.sums: dict[str, Tensor] = {}  # of the log: (sum, count) each, added up in place
        self.attacks = {name: StaticAttack(a, trainer.args.device) for name, a in trainer.step_attacks().items()}
        self.radii_change = trainer.eps_changes

    def fill(self, batch: dict[str, Tensor]) -> None:
        """Take over a batch, and all that changes from step to step."""
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor, non_blocking=True)  # into the memory that the graph reads
        self.accumulation.fill_(self.trainer.current_gradient_accumulation_steps)
        if self.radii_change:
            for name, attack in self.trainer.step_attacks().items():
                self.attacks[name].fill(attack)

    def run(self) -> StepResult:
        """The step: the same operations on the same tensors each time."""
        trainer = self.trainer
        torch.clear_autocast_cache()  # within an autocast of the caller, casts of older weights would be recorded
        if self.radii_change:
            attacks = {name: static.attack for name, static in self.attacks.items()}
        else:
            attacks = trainer.step_attacks()
        with static_shapes():
            labels = self.batch["labels"]
            images, targets = trainer.mix(trainer.to_images(self.batch["pixel_values"]), labels)
            output = trainer.run_objective(trainer.model, images, targets, labels, attacks)
        loss = output.loss / self.accumulation
        # not backward(): the Trainer sets .grad to None between steps, and a graph writes to fixed tensors
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self._sum_up(output)
        values = torch.stack([value.detach().float() for value in (output.loss, *output.terms.values())])
        output.loss = output.loss.detach()
        torch.clear_autocast_cache()
        aligned = [g if g is None else _like(g, p) for g, p in zip(gradients, self.parameters, strict=True)]
        return StepResult(loss.detach(), output, images, aligned, values)

    def _sum_up(self, output: LossOutput) -> None:
        for name, added in self.trainer.log_sums(output, self.batch["labels"]).items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(added)
            self.sums[name].add_(added)  # in place, so that replays add to the same tensor

    def take_sums(self) -> dict[str, Tensor]:
        """The sums since the last call."""
        taken = {name: total.clone() for name, total in self.sums.items()}
        for total in self.sums.values():
            total.zero_()
        return taken


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the memory layout of its parameter, as `.grad` has it: optimizers are fast on equal layouts."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


__all__ = ["StaticStep", "StepResult", "WaitWatch"]
