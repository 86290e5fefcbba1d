"""How near training comes to a bare CUDA graph on one GPU: one command of at most four minutes.

    python training/benchmarks/speed/gpu.py               # on a CUDA GPU; no data needed
    python training/benchmarks/speed/gpu.py --rehearse    # the same lines at tiny sizes on a CPU

Measured are: whether steps with the step graph give the numbers of eager steps; bare passes of a ResNet18, eager, as a
CUDA graph and compiled; training steps of the recipes without and with the step graph, with the share of the time that
the GPU works; images per second of AutoAttack and of the adaptive union. Results are written as they come. What the
time does not suffice for is noted, and measured by the same command later: what is in the file is not repeated.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation.environment import describe_environment
from training.benchmarks.shared.run import Clock, OutOfTime, create_parser, require_positive
from training.benchmarks.shared.store import RESULTS, begin, write_json
from training.benchmarks.speed.gpu_passes import (
    time_autoattack,
    time_bare_pass,
    time_bare_step,
    time_compiled_pass,
    time_worst_case,
)
from training.benchmarks.speed.gpu_sizes import CASES, REHEARSAL, Size
from training.benchmarks.speed.gpu_steps import compare_steps, time_steps

METHODS = [("standard", "pgd")] + [(m, a) for m in ("at", "trades", "rt_er", "jtdmoe") for a in ("pgd", "nfgsm")]
BATCHES = (128, 512, 1024)
COMPILED_BATCH, AUTOATTACK_IMAGES, UNION_IMAGES = 512, 512, 256

Unit = Callable[[], dict[str, Any]]


def units(size: Size) -> dict[str, tuple[Unit, float]]:
    """What is measured, in order -> the work, and the seconds that must be left to begin it (a guess for an H100)."""
    work: dict[str, tuple[Unit, float]] = {}
    for method, attack in METHODS:
        work[f"equal {method} {attack}"] = partial(compare_steps, method, attack, size), 10
    for batch in BATCHES:
        work[f"bare {batch}"] = partial(time_bare_pass, batch, size), 5
    for name, case in CASES.items():
        work[f"graph {name}"] = partial(time_steps, case, size, graph=True), 10
        work[f"bare step {name}"] = partial(time_bare_step, case, size), 5
    for name, case in CASES.items():
        work[f"eager {name}"] = partial(time_steps, case, size, graph=False), 15
    work["autoattack"] = partial(time_autoattack, AUTOATTACK_IMAGES, size), 20
    work["worst_case"] = partial(time_worst_case, UNION_IMAGES, size), 30
    work["compiled"] = partial(time_compiled_pass, COMPILED_BATCH, size), 40
    return work


def measure(results: dict[str, Any], work: dict[str, tuple[Unit, float]], clock: Clock, path: Path) -> None:
    """Measure what is missing in `results`, and write the file after each; what is left out is noted."""
    results["notes"] = {}
    for name, (unit, seconds) in work.items():
        if name in results["units"]:
            continue
        if clock.left() < seconds:
            results["notes"][name] = "no time was left"
        else:
            run_unit(results, name, unit)
            told = results["units"].get(name) or results["notes"][name]
            print(f"[{clock.left():4.0f} s left] {name}: {told}", flush=True)
        write_json(path, results)


def run_unit(results: dict[str, Any], name: str, unit: Unit) -> None:
    """Measure one thing; an error is noted and the others go on."""
    started = time.perf_counter()
    results["notes"][name] = "the time ran out meanwhile"
    try:
        found = unit()
    except Exception as error:
        results["notes"][name] = f"{type(error).__name__}: {error}"[:500]
        return
    del results["notes"][name]
    results["units"][name] = {**found, "seconds": round(time.perf_counter() - started, 1)}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=3.7, help="hard limit, imports not counted; the rest is for the next call")
    add("--only", nargs="+", default=[""], help="measure only what begins with one of these, such as equal or bare")
    add("--fresh", action="store_true", help="start over in a results file")
    add("--output", type=Path, help="default: results/speed_gpu.json, or outputs/speed_gpu_rehearsal.json")
    add("--rehearse", action="store_true", help="tiny sizes on a CPU, eager steps in the place of graphs")
    args = parser.parse_args(arguments)
    require_positive(parser, args, "minutes")
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("there is no CUDA GPU here; --rehearse runs the same lines at tiny sizes on a CPU.")
    rehearsed = Path("outputs/speed_gpu_rehearsal.json")
    args.output = args.output or (rehearsed if args.rehearse else RESULTS / "speed_gpu.json")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    clock = Clock(60 * args.minutes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    size = REHEARSAL if args.rehearse else Size("cuda")
    same = {"rehearsal": args.rehearse, "environment": describe_environment(size.device)}
    try:
        results = {"notes": {}, "units": {}, **begin(args.output, same, args.fresh)}
    except ValueError as error:
        sys.exit(f"gpu.py: error: {error}")
    wanted = {name: unit for name, unit in units(size).items() if name.startswith(tuple(args.only))}
    try:
        with clock.limit():
            measure(results, wanted, clock, args.output)
    except OutOfTime:
        print("The time is used up; the same command measures the rest.", flush=True)
    write_json(args.output, results)
    print(f"{len(results['units'])} measured, {len(results['notes'])} not: {args.output}", flush=True)
    return int(any(found.get("holds") is False for found in results["units"].values()))


if __name__ == "__main__":
    sys.exit(main())
