"""`torch.compile`: how often it compiles anew while the experts' groups change, and what it gains.

    python training/benchmarks/speed_compile.py
    python training/benchmarks/speed_compile.py --timed_backend inductor   # needs a C++ compiler; minutes

A top-1 mixture gets batches whose images split among its experts differently each time, through PGD. Every graph that
is compiled after the first batch is a recompilation. torch gives up on a function after `recompile_limit` of them, so
that is what must not be reached. The count needs no code generation: the backend only takes the graphs.

The timing is that of one expert, forward and input gradient, compiled against the same as attacks run it: not
compiled, with BatchNorm folded. The seconds that compiling takes are in the JSON.
"""

import argparse
import time
from functools import partial

import torch
from speed_timing import compare, create_moe, create_parser, interleaved, random_batch, run_script
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient


def random_routes(num_images: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """(B,) experts of a random split: even in one batch, with nearly empty groups in another."""
    shares = torch.rand(num_experts, generator=generator) ** 2 + 1e-3
    return torch.multinomial(shares, num_images, replacement=True, generator=generator)


def count_row(args: argparse.Namespace) -> dict:
    """Graphs compiled after the first of `batches` batches of different splits."""
    torch._dynamo.reset()
    counters.clear()
    model, generator = create_moe(args, args.num_experts), torch.Generator().manual_seed(args.seed)
    compiled, graphs, groups = torch.compile(model, dynamic=True, backend=args.counted_backend), [], []
    for _ in range(args.batches):
        images, labels = random_batch(args)
        routes = random_routes(len(images), args.num_experts, generator)
        groups.append(torch.bincount(routes, minlength=args.num_experts).tolist())
        PGD(steps=2, keep_best=False)(partial(compiled, expert_index=routes.to(args.device)), images, labels)
        graphs.append(counters["stats"]["unique_graphs"])
    anew, limit = graphs[-1] - graphs[0], torch._dynamo.config.recompile_limit
    row = {"what": f"recompilations in {args.batches} batches of different splits", "ratio": float(anew)}
    row |= {
        "range": [anew, anew],
        "wall_ratio": anew,
        "at_most": float(limit),
        "at_least": None,
        "holds": anew < limit,
    }
    return row | {"graphs": graphs, "group_sizes": groups, "unit": "graphs"}


def time_row(args: argparse.Namespace) -> dict:
    """One expert's gradient pass, compiled with `timed_backend` against eager with BatchNorm folded."""
    torch._dynamo.reset()
    images, labels = random_batch(args)
    plain, other = create_moe(args, 1).experts[0], create_moe(args, 1).experts[0]
    other.load_state_dict(plain.state_dict())
    compiled = torch.compile(other, backend=args.timed_backend)

    def step(network: nn.Module):
        return lambda: value_and_gradient(network, images, labels, ce_objective)

    started = time.perf_counter()
    with torch.no_grad(), frozen(plain), frozen(other), folded(plain, images):
        step(compiled)()
        seconds = time.perf_counter() - started
        times = interleaved({"compiled": step(compiled), "folded": step(plain)}, args.repeats, args.device)
    what = f"one expert's gradient pass, compiled by {args.timed_backend} / not compiled, BatchNorm folded"
    return compare(what, times, "compiled", ["folded"], args.device) | {"compile_seconds": seconds}


def measure(args: argparse.Namespace) -> list[dict]:
    """The count, unless no batches are asked for, and the time where a backend for it is given."""
    rows = [count_row(args)] if args.batches else []
    return rows + ([time_row(args)] if args.timed_backend else [])


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_compile")
    add = parser.add_argument
    add("--num_experts", type=int, default=4)
    add("--batches", type=int, default=20)
    add("--counted_backend", default="eager", help="of torch.compile, for the count")
    add("--timed_backend", help="of torch.compile, such as inductor; without one nothing is timed")
    return run_script(parser, measure, arguments, "speed_compile")


if __name__ == "__main__":
    main()
