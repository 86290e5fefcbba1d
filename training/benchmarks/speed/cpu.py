"""Speed on a CPU, or on any device: what each part of the package costs against the least that it could.

    python training/benchmarks/speed/cpu.py                   # all parts; about a quarter of an hour
    python training/benchmarks/speed/cpu.py pgd --repeats 3 --output pgd.json

Nothing else should run meanwhile. `results/speed.json` is written after each part (`parts.py` says what is compared
with what); one that is in it with the same settings is not measured again, and one that failed is noted and tried
again. Two parts compare with torchattacks, which is no dependency of the package: pip install torchattacks.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation.environment import describe_environment
from training.benchmarks.shared.run import create_parser, default_device
from training.benchmarks.shared.store import RESULTS, read_json, write_json
from training.benchmarks.speed import parts
from training.benchmarks.speed.timing import Row, render_rows

HOW = "one thread"  # process time compares only at one
SETTINGS = {"repeats": 5, "width": 0.25, "image_size": 32, "batch_size": 128, "num_experts": 4, "steps": 10, "seed": 0}


class Part(NamedTuple):
    """The title of its table, what measures it, and settings of its own."""

    title: str
    measure: Callable[[argparse.Namespace], list[Row]]
    settings: dict[str, Any] = {}


PARTS = {
    "autoattack": Part("AutoAttack standard, 256 digits", parts.autoattack, {"batch_size": 256}),
    "training_step": Part("A training step", parts.training_step, {"repeats": 3}),
    "moe_step": Part("Mixture of four, top-1", parts.moe_step),
    "experts": Part(
        "Number of experts and batch",
        parts.experts,
        {"repeats": 3, "batch_size": 512, "width": 0.125, "most_experts": 64},
    ),
    "pgd": Part("PGD", parts.pgd),
}


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one part: settings, hardware, versions and rows, or its error."""
    torch.manual_seed(settings["seed"])
    started = time.perf_counter()
    try:
        rows = PARTS[name].measure(argparse.Namespace(**settings))
    except Exception as error:
        return {"settings": settings, "error": f"{type(error).__name__}: {error}"}
    print(f"{PARTS[name].title}\n{render_rows(rows)}", flush=True)
    environment, seconds = describe_environment(settings["device"]), time.perf_counter() - started
    return {"settings": settings, "environment": environment, "rows": rows, "seconds": seconds}


def render(results: dict[str, Any]) -> str:
    """The section of the README: what was met and missed, then every part's table."""
    measured = {name: part for name, part in results["parts"].items() if "error" not in part}
    if not measured:
        raise ValueError("results/speed.json has no part that was measured.")
    environment = next(iter(measured.values()))["environment"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "timm", "transformers"))
    targets = [row for part in measured.values() for row in part["rows"] if row["holds"] is not None]
    missed = [row["what"] for row in targets if not row["holds"]]
    absent = [PARTS[name].title for name in PARTS if name not in measured]
    blocks = [
        f"{len(targets) - len(missed)} of {len(targets)} targets met."
        + (f" Missed: {'; '.join(missed)}." if missed else "")
        + (f" Not measured: {'; '.join(absent)}." if absent else ""),
        f"Measured on {environment['hardware']}, {results['how']}, with {versions}.",
    ]
    for name, part in results["parts"].items():
        title, error = f"**{PARTS[name].title}** (`{name}`)", part.get("error")
        blocks += [f"{title}: not measured: {error}"] if error else [title, render_rows(part["rows"])]
    return "\n\n".join(blocks)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    add("--device", default=default_device())
    add("--output", type=Path, default=RESULTS / "speed.json")
    for name, value in SETTINGS.items():
        add(f"--{name}", type=type(value), default=argparse.SUPPRESS, help=f"default: {value}, or the part's own")
    args = vars(parser.parse_args(arguments))
    names, output = args.pop("parts") or list(PARTS), args.pop("output")
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"{', '.join(unknown)}: not among the parts, {', '.join(PARTS)}.")
    torch.set_num_threads(1)
    found = read_json(output)["parts"] if output.is_file() else {}
    for name in names:
        settings = {**SETTINGS, **PARTS[name].settings, **args}
        if "rows" not in found.get(name, {}) or found[name]["settings"] != settings:
            found[name] = measure(name, settings)
            ordered = {name: found[name] for name in PARTS if name in found}
            write_json(output, {"how": HOW, "parts": ordered})
    return found


if __name__ == "__main__":
    main()
