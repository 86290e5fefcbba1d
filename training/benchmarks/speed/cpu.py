"""All speed benchmarks, one command; what they found goes into results/speed.json and from there into the READMEs.

    pip install torchattacks   # not a dependency of the package; two comparisons need it
    python training/benchmarks/speed/cpu.py            # two at a time, each on one thread; about a quarter of an hour
    python training/benchmarks/speed/cpu.py --render   # only write the tables anew

Nothing else should run meanwhile. Each part is a script of its own, whose text says what is compared with what; the
file is written after each of them, and one that is in it with the same arguments is not run again. A part that fails
is noted in the file and tried again the next time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from training.benchmarks.shared.tables import HERE, RESULTS, markdown_table, marks, replace_section
from training.benchmarks.shared.tables import README as BENCHMARKS_README
from training.benchmarks.speed.timing import cells, render_table

README = HERE.parents[1] / "README.md"
MODEL = HERE.parents[1] / "model_cards" / "digits_dual"
TRAINED = ["--model", str(MODEL), "--dataset", "digits", "--eps", "0.15"]
TIME_LIMIT = 1800  # seconds of one part

PARTS: dict[str, tuple[str, str, list[str]]] = {  # name -> title, script, its arguments; the longest first
    "autoattack": ("AutoAttack standard, 256 digits", "autoattack", [*TRAINED, "--batch_size", "256"]),
    "training_step": ("A training step", "training_step", []),
    "levers": ("Levers, ResNet18 at 32 px", "levers", []),
    "compile_time": (
        "torch.compile, time",
        "compile",
        ["--batches", "0", "--timed_backend", "inductor", "--repeats", "3"],
    ),
    "compile": ("torch.compile, count", "compile", []),
    "moe_step": ("Mixture of four, top-1", "moe_step", []),
    "experts": ("Number of experts and batch", "experts", []),
    "pgd": ("PGD", "pgd", []),
    "levers_trained": ("Levers, trained model", "levers", [*TRAINED, "--batch_size", "256"]),
    "scale": ("Many devices", "scale", ["--width", "1", "--probe_batch", "4", "--memory_gb", "3"]),
}


# --- running ---------------------------------------------------------------------------------------------------------


def run_part(name: str, extra: list[str], threads: int) -> dict:
    """Run one script in a process of its own: its result with arguments and seconds, or its error."""
    _, script, arguments = PARTS[name]
    arguments = [*arguments, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [
            sys.executable,
            Path(__file__).with_name(f"{script}.py"),
            *arguments,
            "--threads",
            str(threads),
            "--output",
            output,
        ]
        started, note = time.perf_counter(), {"arguments": portable(arguments)}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=TIME_LIMIT, encoding="utf-8"
            )
        except subprocess.TimeoutExpired:
            return {**note, "error": f"took more than {TIME_LIMIT} s"}
        note["seconds"] = time.perf_counter() - started
        if done.returncode:
            return {**note, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        result = json.loads(output.read_text(encoding="utf-8"))
        for key in ("output", "render", "model"):
            result["settings"].pop(key, None)
        return {**note, **result}


def portable(arguments: list[str]) -> list[str]:
    """Arguments without the folder that this checkout happens to be in."""
    return [argument.replace(str(HERE.parents[1]) + os.sep, "") for argument in arguments]


def is_done(part: dict, name: str, extra: list[str]) -> bool:
    """Whether a part in the file is whole and was made with these arguments."""
    return "error" not in part and part.get("arguments") == portable([*PARTS[name][2], *extra])


def run_all(args: argparse.Namespace, extra: list[str]) -> dict:
    """Run the parts that are not done, `jobs` at a time, and write the file after each."""
    kept = (
        json.loads(args.output.read_text(encoding="utf-8"))["parts"]
        if args.output.is_file() and not args.fresh
        else {}
    )
    todo = [name for name in PARTS if name in args.parts and not is_done(kept.get(name, {"error": ""}), name, extra)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def run(name: str) -> None:
        part = run_part(name, extra, args.threads)
        print(f"{name}: {part.get('error') or 'done'} ({part.get('seconds', TIME_LIMIT):.0f} s)", flush=True)
        with lock:
            kept[name] = part
            ordered = {name: kept[name] for name in PARTS if name in kept}
            args.output.write_text(
                json.dumps({"jobs": args.jobs, "parts": ordered}, indent=1) + "\n", encoding="utf-8"
            )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, todo))
    return {"jobs": args.jobs, "parts": {name: kept[name] for name in PARTS if name in kept}}


# --- rendering -------------------------------------------------------------------------------------------------------


def measured(results: dict) -> dict[str, dict]:
    """The parts that have a result."""
    return {name: part for name, part in results["parts"].items() if "error" not in part}


def targets_table(results: dict) -> str:
    """A line per measurement that has a target."""
    rows = []
    for name, part in measured(results).items():
        for row in part.get("rows", []):
            if row["holds"] is None:
                continue
            what, ratio, spread, _, target, _ = cells(row)
            rows.append([f"{PARTS[name][0]}: {what}", ratio, spread, target, "met" if row["holds"] else "**missed**"])
    return markdown_table(["what", "measured", "range", "target", ""], rows)


def summary(results: dict) -> str:
    """How many targets were met, and where it was measured."""
    parts = measured(results)
    judged = [row for part in parts.values() for row in part.get("rows", []) if row["holds"] is not None]
    missed = [row["what"] for row in judged if not row["holds"]]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} targets met."]
    if missed:
        lines.append(f"Missed: {'; '.join(missed)}.")
    absent = [PARTS[name][0] for name in PARTS if name not in parts]
    if absent:
        lines.append(f"Not measured: {'; '.join(absent)}.")
    return " ".join(lines)


def place(results: dict) -> str:
    """Hardware and versions, in a line."""
    environment = next(iter(measured(results).values()))["environment"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "timm", "transformers"))
    return f"Measured on {environment['hardware']}, one thread each, {results['jobs']} at a time, with {versions}."


def plan_text(part: dict) -> str:
    """The plan for many devices, with its assumptions."""
    settings, kept = part["settings"], part["kept"]
    peaks = [
        [str(row["num_experts"]), str(row["batch"]), *(f"{row[k] / 1e9:.2f}" for k in ("predicted", "measured"))]
        + [f"{100 * row['error']:+.1f} %"]
        for row in part["peaks"]
    ]
    rows = [
        [
            *(str(line["gpus"]), f"{line['gb_per_step']:.2f}", f"{1000 * line['compute_s']:.1f}"),
            *(f"{1000 * line['exchange_s']:.1f}", f"{100 * line['efficiency']:.0f}"),
            f"{line['images_per_second']:,.0f}",
        ]
        for line in part["plan"]
    ]
    table = markdown_table(
        ["devices", "GB per step and device", "compute ms", "exchange ms", "efficiency %", "images/s"], rows
    )
    return "\n\n".join(
        [
            f"{settings['num_experts']} x {settings['backbone']}, {part['parameters'] / 1e6:.1f}M parameters, "
            f"{settings['image_size']} px, {settings['batch_size']} images per device, RT-ER with two attacks of "
            f"{settings['steps']} steps: {part['gflops_per_image']:.1f} GFLOPs per image and step. Assumed, not "
            f"measured: {settings['achieved_tflops']:g} TFLOP/s per device, {settings['link_gb_per_second']:g} GB/s "
            f"between the {settings['gpus_per_machine']} devices of a machine, "
            f"{settings['network_gb_per_second']:g} GB/s per device between machines, and no overlap of exchange and "
            "backward.",
            table,
            f"Peak memory of a step in bytes = 12 * parameters + {3 * kept['per_image'] / 1e6:.1f}e6 * images: "
            "weights, gradients and momentum, and what three images in the loss per training image keep. "
            "So the largest batch of a device is (its bytes - 12 * parameters) over the second number. "
            "A recorded step (--step_graph) keeps both parts, also between steps: what an evaluation or a last "
            "smaller batch needs comes on top, and with gradient accumulation 4 * parameters for the sums. "
            f"Measured up to {settings['memory_gb']:g} GB:",
            markdown_table(["experts", "images", "predicted GB", "measured GB", "error"], peaks),
        ]
    )


def benchmarks_text(results: dict) -> str:
    """The whole section of the benchmarks' README: every part's table, and the plan."""
    blocks = [place(results), summary(results)]
    for name, part in results["parts"].items():
        title = f"**{PARTS[name][0]}** (`speed/{PARTS[name][1]}.py`)"
        if "error" in part:
            blocks.append(f"{title}: not measured: {part['error']}")
        else:
            blocks += [title, plan_text(part) if "plan" in part else render_table(part)]
    return "\n\n".join(blocks)


def readme_text(results: dict) -> str:
    """The section of the README: targets, met or missed."""
    return "\n\n".join([summary(results), targets_table(results), place(results)])


def render(results: dict, readme: Path = README, benchmarks: Path = BENCHMARKS_README) -> None:
    """Write both sections.

    Raises:
        ValueError: No part has a result, or the READMEs have no place for them.
    """
    if not measured(results):
        raise ValueError("no part has a result yet; run speed.py without --render first.")
    for name, path in (("speed", readme), ("speed_parts", benchmarks)):
        if marks(name)[0] not in path.read_text(encoding="utf-8"):
            raise ValueError(f"{path} has no section {name!r}; expected {marks(name)[0]!r} in it.")
    replace_section("speed", readme_text(results), readme)
    replace_section("speed_parts", benchmarks_text(results), benchmarks)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments that are not listed go to all scripts, such as --device cuda or --repeats 3.",
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add("--jobs", type=int, default=2, help="parts at a time; 1 on a GPU")
    add("--threads", type=int, default=1, help="CPU threads of each; process time compares only at one")
    add("--fresh", action="store_true", help="measure everything anew")
    add("--output", type=Path, default=RESULTS / "speed.json")
    add("--render", action="store_true", help="run nothing, only write the sections of the READMEs")
    args, extra = parser.parse_known_args(arguments)
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.render else run_all(args, extra)
    if args.render or args.output == RESULTS / "speed.json":
        render(results)
    return results


if __name__ == "__main__":
    main()
