"""How the speed benchmarks measure: the alternatives in turn (A B A B ...), wall and process time, ratios per round.

A machine that others use slows all alternatives of a round alike, so ratios are taken inside rounds and their median
is reported. On a CPU process time decides, with one thread: waiting for others is not part of it. On an accelerator
wall time decides, after everything queued has finished.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dualmoe import MoEConfig, MoEForImageClassification
from training.benchmarks.shared.tables import markdown_table

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
HEADER = ["what", "ratio", "range", "wall ratio", "target", "holds"]

Times = dict[str, dict[str, list[float]]]  # alternative -> clock -> seconds per round
Row = dict[str, Any]


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


def interleaved(alternatives: dict[str, Callable[[], object]], repeats: int, device: str, warmup: int = 1) -> Times:
    """Seconds of each alternative in each of `repeats` rounds, by both clocks, after `warmup` rounds."""
    times: Times = {name: {clock: [] for clock in CLOCKS} for name in alternatives}
    for number in range(warmup + repeats):
        for name, function in alternatives.items():
            synchronize(device)
            before = {clock: read() for clock, read in CLOCKS.items()}
            function()
            synchronize(device)
            for clock, read in CLOCKS.items():
                seconds = read() - before[clock]
                if number >= warmup:
                    times[name][clock].append(seconds)
    return times


def ratios(times: Times, name: str, references: list[str], clock: str) -> list[float]:
    """Per round: seconds of `name` over the sum of those of `references`."""
    sums = [sum(values) for values in zip(*(times[reference][clock] for reference in references), strict=True)]
    return [own / other for own, other in zip(times[name][clock], sums, strict=True)]


def compare(
    what: str,
    times: Times,
    name: str,
    references: list[str],
    device: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """One row of a result: how long `name` takes against `references`, and whether that meets the target.

    Args:
        at_most: Target for the ratio; None = there is none.
        at_least: Target for the inverse: `name` is that many times faster; the row then shows the inverse.
    """
    decisive = "cpu" if device == "cpu" else "wall"
    found = {clock: ratios(times, name, references, clock) for clock in CLOCKS}
    if at_least is not None:
        found = {clock: [1 / value for value in values] for clock, values in found.items()}
    row = row_of(what, found[decisive], at_most=at_most, at_least=at_least)
    seconds = {side: {clock: median(values) for clock, values in times[side].items()} for side in (name, *references)}
    return row | {"wall_ratio": median(found["wall"]), "clock": decisive, "seconds": seconds}


def row_of(what: str, values: list[float], *, at_most: float | None = None, at_least: float | None = None) -> Row:
    """A row whose ratio is the median of these values, and whether that meets the target."""
    ratio = median(values)
    holds = None
    if at_most is not None or at_least is not None:
        holds = (at_most is None or ratio <= at_most) and (at_least is None or ratio >= at_least)
    row = {"what": what, "ratio": ratio, "range": [min(values), max(values)], "wall_ratio": ratio}
    return row | {"at_most": at_most, "at_least": at_least, "holds": holds}


def render_rows(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    cells = []
    for row in rows:
        target = f">= {row['at_least']}" if row["at_most"] is None else f"<= {row['at_most']}"
        numbers = [f"{row['ratio']:.2f}", "{:.2f} to {:.2f}".format(*row["range"]), f"{row['wall_ratio']:.2f}"]
        holds = {True: "yes", False: "**NO**", None: "-"}[row["holds"]]
        cells.append([row["what"], *numbers, "-" if row["holds"] is None else target, holds])
    return markdown_table(HEADER, cells)


# --- models and images of these benchmarks ---------------------------------------------------------------------------


def create_moe(args: argparse.Namespace, num_experts: int) -> MoEForImageClassification:
    """An untrained mixture of whole networks, top-1, in eval mode on the device."""
    width = args.width if args.backbone.startswith("resnet") else None
    config = MoEConfig(
        backbone=args.backbone,
        width=width,
        image_size=args.image_size,
        num_labels=10,
        num_experts=num_experts,
        router_top_k=1,
    )
    return MoEForImageClassification(config).to(args.device).eval()


def random_batch(args: argparse.Namespace, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and labels (B,) on the device."""
    size = batch_size or args.batch_size
    images = torch.rand(size, 3, args.image_size, args.image_size, device=args.device)
    return images, torch.randint(0, 10, (size,), device=args.device)


def even_routes(num_images: int, num_experts: int, device: str | torch.device) -> Tensor:
    """(B,) the same number of images for each expert, in mixed order, as a balanced router would send them."""
    return torch.arange(num_images, device=device) % num_experts


def bare_attack(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, expert_index: Tensor | None = None
) -> None:
    """The least that a gradient attack can do: so many forward passes with gradients of the images."""
    for _ in range(steps):
        points = images.detach().requires_grad_(True)
        loss = F.cross_entropy(model(points, expert_index=expert_index).logits, labels, reduction="sum")
        torch.autograd.grad(loss, points)
