"""How the speed benchmarks measure: the alternatives in turn (A B A B ...), wall and process time, ratios per round.

A machine that others use slows all alternatives of a round alike, so ratios are taken inside rounds and their median
is reported. On a CPU process time is judged, with one thread: waiting for others is not part of it. On an accelerator
wall time is judged, after everything queued has finished.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from hf_dualmoe import MoEConfig, MoEForImageClassification
from hf_dualmoe.evaluation.environment import describe_environment
from training.benchmarks.shared.tables import RESULTS, markdown_table, replace_section

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
HEADER = ["what", "ratio", "range", "wall ratio", "target", "holds"]

Times = dict[str, dict[str, list[float]]]  # alternative -> clock -> seconds per round


def best_device() -> str:
    """The accelerator's type, or "cpu"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


def create_parser(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all speed benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default=best_device())
    add("--threads", type=int, default=1, help="CPU threads; process time compares only at one")
    add("--repeats", type=int, default=5, help="rounds after the warm-up")
    add("--backbone", default="resnet18")
    add("--width", type=float, default=0.25, help="multiplier of the ResNet's channels; 1 for a GPU")
    add("--image_size", type=int, default=32)
    add("--batch_size", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=RESULTS / f"{name}.json")
    add("--render", action="store_true", help="only put the table of the results file into the README")
    return parser


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
) -> dict:
    """One row of a result: how long `name` takes against `references`, and whether that meets the target.

    Args:
        at_most: Target for the ratio; None = there is none.
        at_least: Target for the inverse: `name` is that many times faster; the row then shows the inverse.
    """
    judged = "cpu" if device == "cpu" else "wall"
    found = {clock: ratios(times, name, references, clock) for clock in CLOCKS}
    if at_least is not None:
        found = {clock: [1 / value for value in values] for clock, values in found.items()}
    ratio = median(found[judged])
    row = {"what": what, "ratio": ratio, "range": [min(found[judged]), max(found[judged])]}
    row |= {"wall_ratio": median(found["wall"]), "clock": judged, "at_most": at_most, "at_least": at_least}
    holds = (
        None if at_most is None and at_least is None else ratio <= at_most if at_least is None else ratio >= at_least
    )
    seconds = {alternative: {c: median(v) for c, v in clocks.items()} for alternative, clocks in times.items()}
    return row | {"holds": holds, "seconds": {n: seconds[n] for n in (name, *references)}}


def cells(row: dict) -> list[str]:
    """A row of the table."""
    target = (
        "-" if row["holds"] is None else f">= {row['at_least']}" if row["at_most"] is None else f"<= {row['at_most']}"
    )
    holds = {True: "yes", False: "NO", None: "-"}[row["holds"]]
    low, high = row["range"]
    return [row["what"], f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['wall_ratio']:.2f}", target, holds]


def render_table(result: dict) -> str:
    """The table of a results file in Markdown."""
    return markdown_table(HEADER, [cells(row) for row in result["rows"]])


def run_script(parser: argparse.ArgumentParser, measure: Callable, arguments: list[str] | None, name: str) -> dict:
    """Measure, print and write: hardware, versions, settings and rows; or only render what was written."""
    args = parser.parse_args(arguments)
    if args.render:
        result = json.loads(args.output.read_text(encoding="utf-8"))
        replace_section(name, render_table(result))
        return result
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "render")}
    result = {"settings": settings, "environment": describe_environment(args.device), "rows": measure(args)}
    print(render_table(result), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    return result


# --- models and images of these benchmarks ---------------------------------------------------------------------------


def create_moe(args: argparse.Namespace, num_experts: int = 4, **fields) -> MoEForImageClassification:
    """An untrained mixture of whole networks, top-1, in eval mode on the device."""
    width = args.width if args.backbone.startswith("resnet") else None
    config = MoEConfig(
        **{"backbone": args.backbone, "width": width, "image_size": args.image_size, "num_labels": 10},
        **{"num_experts": num_experts, "router_top_k": 1, **fields},
    )
    return MoEForImageClassification(config).to(args.device).eval()


def random_batch(args: argparse.Namespace, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and labels (B,) on the device."""
    size = batch_size or args.batch_size
    images = torch.rand(size, 3, args.image_size, args.image_size, device=args.device)
    return images, torch.randint(0, 10, (size,), device=args.device)


def even_routes(num_images: int, num_experts: int, device: str) -> Tensor:
    """(B,) the same number of images for each expert, in mixed order, as a balanced router would send them."""
    return torch.arange(num_images, device=device) % num_experts
