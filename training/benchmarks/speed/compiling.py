"""`torch.compile`: how often it compiles anew while the experts' groups change, and what it gains.

A top-1 mixture gets batches whose images split among its experts differently each time, through PGD. Every graph that
is compiled after the first batch is a recompilation. torch gives up on a function after `recompile_limit` of them, so
that is what must not be reached. The count needs no code generation: the backend only takes the graphs.

With `--timed_backend inductor` (needs a C++ compiler; minutes) one expert's forward and input gradient is timed,
compiled, against the same as attacks run it: not compiled, with BatchNorm folded. The seconds that compiling takes are
in the JSON.
"""

import argparse
import time
from functools import partial

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hf_dualmoe.attacks import PGD, frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from training.benchmarks.speed.timing import Row, compare, create_moe, interleaved, random_batch, row_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--batches", type=int, default=20, help="0: nothing is counted")
    parser.add_argument("--timed_backend", help="of torch.compile, such as inductor; without one nothing is timed")


def measure(args: argparse.Namespace) -> list[Row]:
    """The count, unless no batches are asked for, and the time where a backend for it is given."""
    rows = [count_row(args)] if args.batches else []
    return rows + ([time_row(args)] if args.timed_backend else [])


def random_routes(num_images: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """(B,) experts of a random split: even in one batch, with nearly empty groups in another."""
    shares = torch.rand(num_experts, generator=generator) ** 2 + 1e-3
    return torch.multinomial(shares, num_images, replacement=True, generator=generator)


def count_row(args: argparse.Namespace) -> Row:
    """Graphs compiled after the first of `batches` batches of different splits."""
    torch._dynamo.reset()
    counters.clear()
    model, generator = create_moe(args, args.num_experts), torch.Generator().manual_seed(args.seed)
    compiled, graphs, groups = torch.compile(model, dynamic=True, backend="eager"), [], []
    for _ in range(args.batches):
        images, labels = random_batch(args)
        routes = random_routes(len(images), args.num_experts, generator)
        groups.append(torch.bincount(routes, minlength=args.num_experts).tolist())
        PGD(steps=2, keep_best=False)(partial(compiled, expert_index=routes.to(args.device)), images, labels)
        graphs.append(counters["stats"]["unique_graphs"])
    most = torch._dynamo.config.recompile_limit - 1
    what = f"recompilations in {args.batches} batches of different splits"
    row = row_of(what, [float(graphs[-1] - graphs[0])], at_most=float(most))
    return row | {"graphs": graphs, "group_sizes": groups}


def time_row(args: argparse.Namespace) -> Row:
    """One expert's gradient pass, compiled with `timed_backend` against eager with BatchNorm folded."""
    torch._dynamo.reset()
    images, labels = random_batch(args)
    plain, other = create_moe(args, 1).experts[0], create_moe(args, 1).experts[0]
    other.load_state_dict(plain.state_dict())
    compiled = torch.compile(other, backend=args.timed_backend)
    steps = {
        name: partial(value_and_gradient, network, images, labels, ce_objective)
        for name, network in (("compiled", compiled), ("folded", plain))
    }
    started = time.perf_counter()
    with torch.no_grad(), frozen(plain), frozen(other), folded(plain, images):
        steps["compiled"]()
        seconds = time.perf_counter() - started
        times = interleaved(steps, args.repeats, args.device)
    what = f"one expert's gradient pass, compiled by {args.timed_backend} / not compiled, BatchNorm folded"
    return compare(what, times, "compiled", ["folded"], args.device) | {"compile_seconds": seconds}
