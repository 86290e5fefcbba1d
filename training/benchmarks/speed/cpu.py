"""Speed on a CPU, or on any device: what each part of the package costs against the least that it could.

    python training/benchmarks/speed/cpu.py              # all parts, two at a time; about a quarter of an hour
    python training/benchmarks/speed/cpu.py pgd --steps 20 --repeats 3   # one part, here and now
    python training/benchmarks/speed/cpu.py levers --help

Nothing else should run meanwhile. Each part is a module beside this one, whose text says what is compared with what,
and runs in a process of its own on one thread. `results/speed.json` is written after each of them; one that is in it
with the same arguments is not run again, and one that failed is noted and tried again. Two parts compare with
torchattacks, which is no dependency of the package: pip install torchattacks.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.evaluation.environment import describe_environment
from training.benchmarks.shared.command_line import create_parser, default_device
from training.benchmarks.shared.files import CHECKOUT, RESULTS, read_json, write_json
from training.benchmarks.speed import autoattack, compiling, experts, levers, memory, moe_step, pgd, training_step
from training.benchmarks.speed.timing import render_rows

MODULES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (autoattack, compiling, experts, levers, memory, moe_step, pgd, training_step)
}
TRAINED = ["--model", "model_cards/digits_dual", "--dataset", "digits", "--eps", "0.15"]
TIME_LIMIT = 1800  # seconds of one part


class Part(NamedTuple):
    """A module with arguments, and the title of its table."""

    title: str
    module: str
    arguments: list[str]


PARTS: dict[str, Part] = {  # the longest first
    "autoattack": Part("AutoAttack standard, 256 digits", "autoattack", [*TRAINED, "--batch_size", "256"]),
    "training_step": Part("A training step", "training_step", []),
    "levers": Part("Levers, ResNet18 at 32 px", "levers", []),
    "compile_time": Part(
        "torch.compile, time", "compiling", ["--batches", "0", "--timed_backend", "inductor", "--repeats", "3"]
    ),
    "compile": Part("torch.compile, count", "compiling", []),
    "moe_step": Part("Mixture of four, top-1", "moe_step", []),
    "experts": Part("Number of experts and batch", "experts", []),
    "pgd": Part("PGD", "pgd", []),
    "levers_trained": Part("Levers, trained model", "levers", [*TRAINED, "--num_images", "256"]),
    "memory": Part("Memory of a training step", "memory", ["--width", "1", "--probe_batch", "4", "--memory_gb", "3"]),
}


# --- one part, here --------------------------------------------------------------------------------------------------


def run_module(name: str, arguments: list[str]) -> dict[str, Any]:
    """Measure one module's part and print it: hardware, versions, settings and what was found."""
    module = MODULES[name]
    parser = create_parser(module.__doc__)
    add = parser.add_argument
    add("--device", default=default_device())
    add("--threads", type=int, default=1, help="CPU threads; process time compares only at one")
    add("--repeats", type=int, default=5, help="rounds after the warm-up")
    add("--backbone", default="resnet18")
    add("--width", type=float, default=0.25, help="multiplier of the ResNet's channels; 1 for a GPU")
    add("--image_size", type=int, default=32)
    add("--batch_size", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="JSON file to write; without one the table is only printed")
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "model")}
    result = {"settings": settings, "environment": describe_environment(args.device), "rows": module.measure(args)}
    print(render_rows(result["rows"]), flush=True)
    if args.output:
        write_json(args.output, result)
    return result


# --- all parts, in processes -----------------------------------------------------------------------------------------


def run_part(name: str, extra: list[str], threads: int) -> dict[str, Any]:
    """Run one part in a process of its own: its result with arguments and seconds, or its error."""
    arguments = [*PARTS[name].arguments, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [sys.executable, __file__, PARTS[name].module, *arguments, "--threads", str(threads)]
        started, note = time.perf_counter(), {"arguments": arguments}
        try:
            done = subprocess.run(
                [*command, "--output", str(output)],
                capture_output=True,
                text=True,
                encoding="utf-8",
                cwd=CHECKOUT,  # which the arguments are relative to
                env=environment,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return {**note, "error": f"took more than {TIME_LIMIT} s"}
        note["seconds"] = time.perf_counter() - started
        if done.returncode:
            return {**note, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        return {**note, **read_json(output)}


def run_all(args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """Run the parts that are not done, `jobs` at a time, and write the file after each."""
    parts = read_json(args.output)["parts"] if args.output.is_file() and not args.fresh else {}
    lock = threading.Lock()

    def is_done(name: str) -> bool:
        part = parts.get(name, {"error": "not run"})
        return "error" not in part and part["arguments"] == [*PARTS[name].arguments, *extra]

    def run(name: str) -> None:
        part = run_part(name, extra, args.threads)
        print(f"{name}: {part.get('error') or 'done'} ({part.get('seconds', TIME_LIMIT):.0f} s)", flush=True)
        with lock:
            parts[name] = part
            ordered = {name: parts[name] for name in PARTS if name in parts}
            write_json(args.output, {"jobs": args.jobs, "parts": ordered})

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [name for name in PARTS if name in args.parts and not is_done(name)]))
    return {"jobs": args.jobs, "parts": parts}


# --- report ----------------------------------------------------------------------------------------------------------


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
        f"Measured on {environment['hardware']}, one thread each, {results['jobs']} at a time, with {versions}.",
    ]
    for name, part in results["parts"].items():
        title = f"**{PARTS[name].title}** (`{PARTS[name].module}`)"
        error = part.get("error")
        blocks += [f"{title}: not measured: {error}"] if error else [title, render_rows(part["rows"])]
    return "\n\n".join(blocks)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in MODULES:
        return run_module(arguments[0], arguments[1:])
    parser = create_parser(
        __doc__, "Arguments that are not listed go to all parts, such as --device cuda or --repeats 3."
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add("--jobs", type=int, default=2, help="parts at a time; 1 on a GPU")
    add("--threads", type=int, default=1, help="CPU threads of each; process time compares only at one")
    add("--fresh", action="store_true", help="measure everything anew")
    add("--output", type=Path, default=RESULTS / "speed.json")
    args, extra = parser.parse_known_args(arguments)
    return run_all(args, extra)


if __name__ == "__main__":
    main()
