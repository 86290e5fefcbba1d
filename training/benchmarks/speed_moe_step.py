"""Row 1: forward and input-gradient step of a top-1 mixture against one of its experts, and against a per-sample loop.

    python training/benchmarks/speed_moe_step.py

All three see the same images with the same weights, without parameter gradients and with BatchNorm folded into the
convolutions, as attacks run them. The mixture runs its router, but the expert of each image is set, so that groups are
even: an untrained router sends all images to one expert, which needs no dispatch. The loop is how a mixture runs that
is written image by image.
"""

import argparse

import torch
from speed_timing import compare, create_moe, create_parser, even_routes, interleaved, random_batch, run_script
from torch import Tensor

from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from hf_dualmoe.models.outputs import logits_of


def measure(args: argparse.Namespace) -> list[dict]:
    """Four rows: forward and step, against one expert and against the loop."""
    model = create_moe(args, args.num_experts)
    images, labels = random_batch(args)
    routes = even_routes(len(images), args.num_experts, args.device)
    expert = model.experts[0]

    def mixture(x: Tensor) -> Tensor:
        return model(x, expert_index=routes).logits

    def single(x: Tensor) -> Tensor:
        return expert(model.normalize(x))

    def forward(classifier):
        return lambda: logits_of(classifier, images)

    def step(classifier):
        return lambda: value_and_gradient(classifier, images, labels, ce_objective)

    def loop_forward() -> None:
        for i in range(len(images)):
            model(images[i : i + 1], expert_index=routes[i : i + 1])

    def loop_step() -> None:
        for i in range(len(images)):
            one = slice(i, i + 1)
            value_and_gradient(
                lambda x, at=one: model(x, expert_index=routes[at]), images[one], labels[one], ce_objective
            )

    rows = []
    with torch.no_grad(), frozen(model), folded(model, images):
        for what, own, reference, loop in (
            ("forward", forward(mixture), forward(single), loop_forward),
            ("forward + input gradient", step(mixture), step(single), loop_step),
        ):
            times = interleaved({"mixture": own, "one expert": reference}, args.repeats, args.device)
            rows.append(compare(f"{what} / one expert", times, "mixture", ["one expert"], args.device, at_most=1.15))
            times = interleaved({"mixture": own, "loop": loop}, max(1, args.repeats // 2), args.device)
            faster = 2.5 if args.device == "cpu" else 20
            rows.append(compare(f"per-sample loop / {what}", times, "mixture", ["loop"], args.device, at_least=faster))
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_moe_step")
    parser.add_argument("--num_experts", type=int, default=4)
    return run_script(parser, measure, arguments, "speed_moe_step")


if __name__ == "__main__":
    main()
