"""What a top-1 mixture costs against the number of its experts, and against the batch.

Experts have the same size and get the same number of images. One forward and input-gradient step, without parameter
gradients and with BatchNorm folded, as attacks run it; the cost of a batch is given per image.
"""

import argparse
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from hf_dualmoe.attacks import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from training.benchmarks.speed.timing import Row, compare, create_moe, even_routes, interleaved, random_batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    parser.set_defaults(batch_size=512, width=0.125, repeats=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 128, 256])


def step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One step on the images, evenly routed."""
    routes = even_routes(len(images), model.config.num_experts, images.device)
    value_and_gradient(lambda x: model(x, expert_index=routes), images, labels, ce_objective)


def measure(args: argparse.Namespace) -> list[Row]:
    """A row per number of experts against one expert, and per batch against the largest."""
    models = {f"{count} experts": create_moe(args, count) for count in (1, *args.experts)}
    images, labels = random_batch(args)
    with torch.no_grad(), ExitStack() as held:
        for model in models.values():
            held.enter_context(frozen(model))
            held.enter_context(folded(model, images))
        by_count = {name: partial(step, model, images, labels) for name, model in models.items()}
        times = interleaved(by_count, args.repeats, args.device)
        against = f" / 1 expert, batch {len(images)}"
        rows = [
            compare(name + against, times, name, ["1 experts"], args.device, at_most=1.3) for name in [*models][1:]
        ]
        return rows + batch_rows(models[f"{args.experts[0]} experts"], args)


def batch_rows(model: nn.Module, args: argparse.Namespace) -> list[Row]:
    """A row per smaller batch against the largest, per image."""
    sizes = [size for size in args.batches if size < args.batch_size]
    steps = {f"batch {size}": partial(step, model, *random_batch(args, size)) for size in (*sizes, args.batch_size)}
    times, whole = interleaved(steps, args.repeats, args.device), f"batch {args.batch_size}"
    for size in sizes:
        for clock, seconds in times[f"batch {size}"].items():
            times[f"batch {size}"][clock] = [value * args.batch_size / size for value in seconds]
    return [
        compare(f"batch {size} / {whole}, per image", times, f"batch {size}", [whole], args.device) for size in sizes
    ]
