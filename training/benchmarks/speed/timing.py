"""How the speed benchmarks measure: the alternatives in turn (A B A B ...), wall and process time, ratios per round.

A machine that others use slows all alternatives of a round alike, so ratios are taken inside rounds and their median
is reported. On a CPU process time decides, with one thread: waiting for others is not part of it. On an accelerator
wall time decides, after everything queued has finished.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from hf_dualmoe.trainer.time_estimate import synchronize
from training.benchmarks.shared.render import markdown_table

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
HEADER = ["what", "ratio", "range", "wall ratio", "target", "holds"]

Times = dict[str, dict[str, list[float]]]  # alternative -> clock -> seconds per round
Row = dict[str, Any]


def interleaved(alternatives: dict[str, Callable[[], object]], repeats: int, device: str, warmup: int = 1) -> Times:
    """Seconds of each alternative in each of `repeats` rounds, by both clocks, after `warmup` rounds."""
    times: Times = {name: {clock: [] for clock in CLOCKS} for name in alternatives}
    for number in range(warmup + repeats):
        for name, function in alternatives.items():
            synchronize(torch.device(device))
            before = {clock: read() for clock, read in CLOCKS.items()}
            function()
            synchronize(torch.device(device))
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
