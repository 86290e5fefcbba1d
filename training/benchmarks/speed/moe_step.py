"""Forward and input-gradient step of a top-1 mixture against one of its experts, and against a per-sample loop.

All three see the same images with the same weights, without parameter gradients and with BatchNorm folded into the
convolutions, as attacks run them. The mixture runs its router, but the expert of each image is set, so that groups are
even: an untrained router sends all images to one expert, which needs no dispatch. The loop is how a mixture runs that
is written image by image.
"""

import argparse

import torch
from torch import Tensor

from hf_dualmoe.attacks import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from hf_dualmoe.models import logits_of
from training.benchmarks.speed.timing import Row, compare, create_moe, even_routes, interleaved, random_batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    parser.add_argument("--num_experts", type=int, default=4)


def measure(args: argparse.Namespace) -> list[Row]:
    """Four rows: forward and step, against one expert and against the loop."""
    model, (images, labels) = create_moe(args, args.num_experts), random_batch(args)
    routes, expert = even_routes(len(images), args.num_experts, args.device), model.experts[0]

    def mixture(x: Tensor, at: slice = slice(None)) -> Tensor:
        return model(x, expert_index=routes[at]).logits

    def forward(classify, at: slice = slice(None)) -> None:
        logits_of(classify, images[at])

    def step(classify, at: slice = slice(None)) -> None:
        value_and_gradient(classify, images[at], labels[at], ce_objective)

    def loop(work) -> None:
        for i in range(len(images)):
            work(lambda x, at=slice(i, i + 1): mixture(x, at), slice(i, i + 1))

    rows, faster = [], 2.5 if args.device == "cpu" else 20
    with torch.no_grad(), frozen(model), folded(model, images):
        for what, work in (("forward", forward), ("forward + input gradient", step)):
            own = {"mixture": lambda work=work: work(mixture)}
            single = {"one expert": lambda work=work: work(lambda x: expert(model.normalize(x)))}
            times = interleaved({**own, **single}, args.repeats, args.device)
            rows.append(compare(f"{what} / one expert", times, "mixture", ["one expert"], args.device, at_most=1.15))
            looped = {"loop": lambda work=work: loop(work)}
            times = interleaved({**own, **looped}, max(1, args.repeats // 2), args.device)
            rows.append(compare(f"per-sample loop / {what}", times, "mixture", ["loop"], args.device, at_least=faster))
    return rows
