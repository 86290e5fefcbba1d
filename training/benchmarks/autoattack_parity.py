"""Our AutoAttack union against torchattacks: robust accuracy, agreement per image, time and passes, attack by attack.

    pip install torchattacks   # not a dependency of the package
    python training/benchmarks/autoattack_parity.py --model path/to/model --dataset digits --eps 0.15 --seeds 0 1 2
    python training/benchmarks/autoattack_parity.py --render   # the results file as a table, into the README

Both sides attack the same clean-correct images with the same budgets. Square is a random search, and torchattacks
draws one square for the whole batch, so single seeds of it differ by points: give several, and compare the means. The
row "pointwise" counts an image as robust where it stands under every attack of the run; "union" is `autoattack`, anew.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import mean

import torch
from readme_tables import RESULTS, markdown_table, replace_section
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import hf_dualmoe  # registers the model classes
from hf_dualmoe.attacks.apgd import PassCounter
from hf_dualmoe.attacks.auto_attack import BACKENDS, VERSIONS, autoattack, make_attack
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.data.datasets import DataSplits, ImageTensorDataset, load_splits, to_unit_range
from hf_dualmoe.evaluation.environment import pixel_radius

SEEDLESS = ("fab-t",)  # draws no random numbers, on either side
TOLERANCE = 1.0  # points by which ours may leave more images standing than theirs


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_attacked(parser, num_images=500)
    add = parser.add_argument
    add("--version", choices=list(VERSIONS), default="standard", help="union and budgets of both sides")
    add("--attacks", nargs="*", help="some of the version's attacks, and union; default: all")
    add("--batch_size", type=int, default=200)
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of both sides; the first also chooses the images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads")
    add("--output", type=Path, default=RESULTS / "autoattack_parity.json", help="results file; rows of others stay")
    add("--render", action="store_true", help="only put the table of the results file into the README")
    return parser


def add_attacked(parser: argparse.ArgumentParser, num_images: int) -> None:
    """Arguments that say which model is attacked, on which images and how far; `num_images` is a default."""
    add = parser.add_argument
    add("--model", help="saved model folder")
    add("--dataset", default="digits", help="as `load_splits` takes it")
    add("--with_validation", action="store_true", help="attack images of the validation split too, not of test only")
    add("--num_images", type=int, default=num_images)
    add("--eps", type=pixel_radius, default=8 / 255, help="radius in [0, 1] pixel units, such as 8/255")
    add("--norm", choices=["linf", "l2"], default="linf")


# --- measuring -------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], object], device: str) -> tuple[object, dict[str, float]]:
    """Result of a call, with wall and process seconds; the latter are fairer on a shared CPU."""
    clocks = {"wall_seconds": time.perf_counter, "cpu_seconds": time.process_time}
    before = {name: clock() for name, clock in clocks.items()}
    result = function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, {name: clock() - before[name] for name, clock in clocks.items()}


def run_single(name: str, backend: str, seed: int, model: nn.Module, images: Tensor, labels: Tensor, args):
    """One attack on the images (N, ...) -> robust (N,) bool, and its costs."""
    budget = VERSIONS[args.version][name]
    attack = make_attack(name, budget, backend=backend, eps=args.eps, norm=args.norm, seed=seed)
    counter, robust, spent = PassCounter(model), [], {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    for rows in torch.arange(len(images)).split(args.batch_size):
        batch, right = images[rows].to(args.device), labels[rows].to(args.device)
        attacked, seconds = timed(lambda x=batch, y=right, ids=rows: attack(counter, x, y, ids=ids), args.device)
        spent = {clock: spent[clock] + value for clock, value in seconds.items()}
        with torch.no_grad():
            robust.append(PassCounter(model)(attacked).argmax(dim=1) == right)
    passes = {"forward": counter.forward_rows / len(images), "gradient": counter.gradient_rows / len(images)}
    return torch.cat(robust).cpu(), {**spent, "passes": passes}


def run_union(backend: str, seed: int, model: nn.Module, images: Tensor, labels: Tensor, args):
    """The whole union -> robust (N,) bool, and its costs."""
    settings = {"eps": args.eps, "norm": args.norm, "version": args.version, "seed": seed, "backend": backend}
    result, spent = timed(
        lambda: autoattack(model, images, labels, **settings, batch_size=args.batch_size, progress=False), args.device
    )
    return result.robust, {**spent, "passes": result.passes, "stages": result.accuracy}


def attack_all(name: str, model: nn.Module, images: Tensor, labels: Tensor, args) -> dict[str, list[tuple]]:
    """An attack, or "union", by both backends: for each seed robust (N,) bool and costs."""
    seeds = args.seeds[:1] if name in SEEDLESS else args.seeds
    run = run_union if name == "union" else partial(run_single, name)
    with frozen(model):
        return {b: [run(b, seed, model, images, labels, args) for seed in seeds] for b in BACKENDS}


def compare(name: str, model: nn.Module, images: Tensor, labels: Tensor, args) -> dict:
    """One row of the table: an attack, or "union", by both backends on clean-correct images (N, ...)."""
    runs = attack_all(name, model, images, labels, args)
    row = {"attack": name, "seeds": args.seeds[: len(runs[BACKENDS[0]])]}
    for backend, found in runs.items():
        standing = ["".join(map(str, robust.int().tolist())) for robust, _ in found]
        row[backend] = {"standing": standing, "costs": [costs for _, costs in found]}
    return row


def environment(device: str) -> dict:
    packages = ("torch", "transformers", "timm", "torchattacks")
    return {
        "versions": {name: metadata.version(name) for name in packages} | {"hf_dualmoe": hf_dualmoe.__version__},
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }


def attacked_images(splits: DataSplits, num_images: int, with_validation: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and labels (N,), none of them trained on; N = num_images."""
    sets = [splits.validation, splits.test] if with_validation else [splits.test]
    images, labels = torch.cat([s.images for s in sets]), torch.cat([s.labels for s in sets])
    chosen = ImageTensorDataset(images, labels, splits.class_names).take(num_images, seed)
    return to_unit_range(chosen.images), chosen.labels


# --- reporting -------------------------------------------------------------------------------------------------------


def store(run: dict, path: Path) -> None:
    """Write a run into the results file; rows of an earlier one of the same settings stay, unless measured anew."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    new = {row["attack"] for row in run["rows"]}  # may be some of the attacks only
    for other in [other for other in runs if other["settings"] == run["settings"]]:
        run = run | {"rows": [row for row in other["rows"] if row["attack"] not in new] + run["rows"]}
        runs.remove(other)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n", encoding="utf-8")


def pointwise(rows: list[dict]) -> dict:
    """The row that counts an image as robust where it stands under every attack; seed by seed."""

    def standing(backend: str, number: int) -> str:
        seen = [found[min(number, len(found) - 1)] for found in (row[backend]["standing"] for row in rows)]
        return "".join(map(min, zip(*seen, strict=True)))

    seeds = max((row["seeds"] for row in rows), key=len)
    sides = {b: {"standing": [standing(b, number) for number in range(len(seeds))], "costs": []} for b in BACKENDS}
    return {"attack": "pointwise", "seeds": seeds, **sides}


def all_rows(run: dict) -> list[dict]:
    """The measured rows of a run, and the pointwise one where all attacks of the version are there."""
    singles = [row for row in run["rows"] if row["attack"] != "union"]
    whole = {row["attack"] for row in singles} == set(VERSIONS[run["settings"]["version"]])
    return run["rows"] + ([pointwise(singles)] if whole else [])


def summary(run: dict, row: dict) -> dict:
    """What a row says: robust accuracies in % by seed, for both sides, and the difference of their means in points."""
    ours, theirs = ([100 * s.count("1") / run["num_images"] for s in row[b]["standing"]] for b in BACKENDS)
    seconds = [sum(cost["cpu_seconds"] for cost in row[backend]["costs"]) for backend in BACKENDS]
    difference = mean(ours) - mean(theirs)
    found = {"ours": ours, "theirs": theirs, "difference": difference, "holds": difference <= TOLERANCE + 1e-9}
    return found | {"time": seconds[0] / seconds[1] if seconds[1] else None}


def mean_and_range(shares: list[float]) -> str:
    spread = f" ({min(shares):.1f} to {max(shares):.1f})" if len(shares) > 1 else ""
    return f"{mean(shares):.2f}{spread}"


HEADER = ["model, images, version", "clean %", "attack", "ours: robust %", "torchattacks", "difference", "CPU time"]


def cells(run: dict, row: dict) -> list[str]:
    """The cells of one row of the table."""
    settings, found = run["settings"], summary(run, row)
    what = f"{run['model']}, {run['num_images']}, {settings['version']}"
    clean = f"{100 * run['clean_correct'] / run['num_images']:.2f}"
    robust = [mean_and_range(found[side]) for side in ("ours", "theirs")]
    time_ratio = "-" if found["time"] is None else f"{found['time']:.2f} x"
    return [what, clean, row["attack"], *robust, f"{found['difference']:+.2f}", time_ratio]


def render_table(results: dict) -> str:
    """The table of a results file in Markdown; ranges are over seeds, CPU time is ours over theirs."""
    return markdown_table(HEADER, [cells(run, row) for run in results["runs"] for row in all_rows(run)])


def measure(args: argparse.Namespace) -> dict:
    """Compare on one model; results are written and printed as they come."""
    splits = load_splits(args.dataset, max_train_samples=1)
    images, labels = attacked_images(splits, args.num_images, args.with_validation, args.seeds[0])
    model = AutoModelForImageClassification.from_pretrained(args.model).to(args.device).eval()
    batches = zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True)
    with torch.no_grad():
        right = torch.cat([PassCounter(model)(x.to(args.device)).argmax(dim=1).cpu() == y for x, y in batches])
    settings = {
        name: value for name, value in vars(args).items() if name not in ("output", "render", "attacks", "seeds")
    }
    settings["image_seed"] = args.seeds[0]
    run = {"model": Path(args.model).name, "settings": settings, "environment": environment(args.device)}
    run |= {"num_images": len(images), "clean_correct": int(right.sum()), "rows": []}
    print(" | ".join(HEADER), flush=True)
    for name in args.attacks or [*VERSIONS[args.version], "union"]:
        run["rows"].append(compare(name, model, images[right], labels[right], args))
        print(" | ".join(cells(run, run["rows"][-1])), flush=True)
        store(run, args.output)
    return run


def main(arguments: list[str] | None = None) -> None:
    parser = create_parser()
    args = parser.parse_args(arguments)
    if args.render:
        replace_section("autoattack_parity", render_table(json.loads(args.output.read_text(encoding="utf-8"))))
        return
    if args.model is None:
        parser.error("--model is missing; give a saved model folder.")
    if unknown := set(args.attacks or ()) - {*VERSIONS[args.version], "union"}:
        parser.error(f"--attacks has {', '.join(sorted(unknown))}, which version {args.version!r} does not run.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    measure(args)


if __name__ == "__main__":
    main()
