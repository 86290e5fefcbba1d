"""Row 6: what a top-1 mixture costs against the number of its experts, and against the batch.

    python training/benchmarks/speed_experts.py

Experts have the same size and get the same number of images. One forward and input-gradient step, without parameter
gradients and with BatchNorm folded, as attacks run it; the cost of a batch is given per image.
"""

import argparse
from contextlib import ExitStack

import torch
from speed_timing import compare, create_moe, create_parser, even_routes, interleaved, random_batch, run_script
from torch import Tensor

from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient


def step_of(model: torch.nn.Module, images: Tensor, labels: Tensor):
    """A call that does one step on the images, evenly routed."""
    routes = even_routes(len(images), model.config.num_experts, images.device)

    def step() -> None:
        value_and_gradient(lambda x: model(x, expert_index=routes), images, labels, ce_objective)

    return step


def measure(args: argparse.Namespace) -> list[dict]:
    """A row per number of experts against one expert, and per batch against the largest."""
    models = {f"{count} experts": create_moe(args, count) for count in (1, *args.experts)}
    images, labels = random_batch(args)
    with torch.no_grad(), ExitStack() as held:
        for model in models.values():
            held.enter_context(frozen(model))
            held.enter_context(folded(model, images))
        return rows_of(models, images, labels, args)


def rows_of(
    models: dict[str, torch.nn.Module], images: Tensor, labels: Tensor, args: argparse.Namespace
) -> list[dict]:
    """The rows of `measure`, of models that are held still."""
    steps = {name: step_of(model, images, labels) for name, model in models.items()}
    times = interleaved(steps, args.repeats, args.device)
    rows = [
        compare(f"{name} / 1 expert, batch {len(images)}", times, name, ["1 experts"], args.device, at_most=1.3)
        for name in steps
        if name != "1 experts"
    ]
    batches = [size for size in args.batches if size < len(images)]
    by_batch = {
        f"batch {size}": step_of(models[f"{args.experts[0]} experts"], *random_batch(args, size))
        for size in (*batches, len(images))
    }
    times = interleaved(by_batch, args.repeats, args.device)
    whole = f"batch {len(images)}"
    for size in batches:
        row = compare(f"batch {size} / batch {len(images)}, per image", times, f"batch {size}", [whole], args.device)
        scale = len(images) / size
        row |= {"ratio": row["ratio"] * scale, "range": [v * scale for v in row["range"]]}
        rows.append(row | {"wall_ratio": row["wall_ratio"] * scale})
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_experts")
    parser.set_defaults(batch_size=512, width=0.125, repeats=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 128, 256])
    return run_script(parser, measure, arguments, "speed_experts")


if __name__ == "__main__":
    main()
