"""One call of PGD against as many bare forward and input-gradient passes of the same model.

The bare passes are the least that a gradient attack can do with the model as it is: cross-entropy, backward to the
images, nothing else. BatchNorm is folded, as PGD does it by itself. With torchattacks installed its PGD runs with the
same settings.
"""

import argparse
import importlib.util

from torch import Tensor, nn

from hf_dualmoe.attacks import PGD, frozen
from hf_dualmoe.attacks.folding import folded
from training.benchmarks.speed.timing import Row, bare_attack, compare, create_moe, interleaved, random_batch


class Logits(nn.Module):
    """The logits alone, as other libraries want them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)


def measure(args: argparse.Namespace) -> list[Row]:
    """PGD as in training against bare passes, and against torchattacks where that is installed."""
    model, (images, labels) = create_moe(args, args.num_experts), random_batch(args)
    attack = PGD(eps=8 / 255, steps=args.steps, step_size=2 / 255, keep_best=False)

    def bare() -> None:
        with frozen(model), folded(model, images):
            bare_attack(model, images, labels, args.steps)

    alternatives = {"PGD": lambda: attack(model, images, labels), "bare passes": bare}
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        other = torchattacks.PGD(Logits(model).eval(), eps=8 / 255, alpha=2 / 255, steps=args.steps)
        other.set_device(args.device)
        alternatives["torchattacks"] = lambda: other(images, labels)
    times = interleaved(alternatives, args.repeats, args.device)
    rows = [compare(f"PGD-{args.steps} / bare passes", times, "PGD", ["bare passes"], args.device, at_most=1.05)]
    if "torchattacks" in times:
        name = f"torchattacks' PGD-{args.steps} / ours"
        rows.append(compare(name, times, "PGD", ["torchattacks"], args.device, at_least=1.0))
    return rows
