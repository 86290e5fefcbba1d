"""Row 2: one call of PGD against as many bare forward and input-gradient passes of the same model.

    python training/benchmarks/speed_pgd.py

The bare passes are the least that a gradient attack can do with the model as it is: cross-entropy, backward to the
images, nothing else. BatchNorm is folded, as PGD does it by itself. With torchattacks installed its PGD runs with the
same settings.
"""

import argparse
import importlib.util

import torch
import torch.nn.functional as F
from speed_timing import compare, create_moe, create_parser, interleaved, random_batch, run_script

from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.pgd import PGD


class Logits(torch.nn.Module):
    """The logits alone, as other libraries want them."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def measure(args: argparse.Namespace) -> list[dict]:
    """PGD as in training against bare passes, and against torchattacks where that is installed."""
    model = create_moe(args, args.num_experts)
    images, labels = random_batch(args)
    attack = PGD(eps=8 / 255, steps=args.steps, step_size=2 / 255, keep_best=False)

    def bare() -> None:
        with frozen(model), folded(model, images):
            for _ in range(args.steps):
                points = images.detach().requires_grad_(True)
                loss = F.cross_entropy(model(points).logits, labels, reduction="sum")
                torch.autograd.grad(loss, points)

    def ours() -> None:
        attack(model, images, labels)

    alternatives = {"PGD": ours, "bare passes": bare}
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


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_pgd")
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    return run_script(parser, measure, arguments, "speed_pgd")


if __name__ == "__main__":
    main()
