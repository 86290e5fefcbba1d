"""Our AutoAttack union against torchattacks: robust accuracy, agreement per image, time and passes, attack by attack.

    pip install torchattacks   # not a dependency of the package
    python training/benchmarks/parity/parity.py --model path/to/model --dataset digits --eps 0.15 --seeds 0 1 2

Both sides attack the same clean-correct images with the same budgets. Square is a random search, and torchattacks
draws one square for the whole batch, so single seeds of it differ by points: give several, and compare the means. The
row "pointwise" counts an image as robust where it stands under every attack of the run; "union" is `autoattack`, anew.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.attacks import autoattack, frozen
from hf_dualmoe.attacks.apgd import PassCounter
from hf_dualmoe.attacks.auto_attack import BACKENDS, VERSIONS, make_attack
from hf_dualmoe.data import DataSplits, ImageTensorDataset, load_splits, to_unit_range
from hf_dualmoe.evaluation.environment import describe_environment, pixel_radius
from training.benchmarks.shared.render import markdown_table, mean_and_range
from training.benchmarks.shared.run import create_parser, default_device
from training.benchmarks.shared.store import RESULTS, store_run

SEEDLESS = ("fab-t",)  # draws no random numbers, on either side
TOLERANCE = 1.0  # points by which ours may leave more images standing than theirs
CLOCKS = {"wall_seconds": time.perf_counter, "cpu_seconds": time.process_time}  # the latter fairer on a shared CPU

Run = dict[str, Any]
Row = dict[str, Any]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__)
    add_attacked(parser, num_images=500)
    add = parser.add_argument
    add("--version", choices=list(VERSIONS), default="standard", help="union and budgets of both sides")
    add("--attacks", nargs="*", help="some of the version's attacks, and union; default: all")
    add("--batch_size", type=int, default=200)
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of both sides; the first also chooses the images")
    add("--device", default=default_device())
    add("--threads", type=int, help="CPU threads")
    add("--output", type=Path, default=RESULTS / "autoattack_parity.json", help="results file; rows of others stay")
    args = parser.parse_args(arguments)
    if args.model is None:
        parser.error("--model is missing; give a saved model folder.")
    known = [*VERSIONS[args.version], "union"]
    if unknown := set(args.attacks or ()) - set(known):
        parser.error(f"--attacks has {', '.join(sorted(unknown))}, which version {args.version!r} does not run.")
    args.attacks = args.attacks or known
    return args


def add_attacked(parser: argparse.ArgumentParser, num_images: int) -> None:
    """Arguments that say which model is attacked, on which images and how far; `num_images` is a default."""
    add = parser.add_argument
    add("--model", help="saved model folder")
    add("--dataset", default="digits", help="as `load_splits` takes it")
    add("--with_validation", action="store_true", help="attack images of the validation split too, not of test only")
    add("--num_images", type=int, default=num_images, help="of the dataset")
    add("--eps", type=pixel_radius, default=8 / 255, help="radius in [0, 1] pixel units, such as 8/255")
    add("--norm", choices=["linf", "l2"], default="linf")


def attacked_images(splits: DataSplits, num_images: int, with_validation: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and labels (N,), none of them trained on; N = num_images."""
    sets = [splits.validation, splits.test] if with_validation else [splits.test]
    images, labels = torch.cat([s.images for s in sets]), torch.cat([s.labels for s in sets])
    chosen = ImageTensorDataset(images, labels, splits.class_names).take(num_images, seed)
    return to_unit_range(chosen.images), chosen.labels


# --- measuring -------------------------------------------------------------------------------------------------------


def attack_once(
    name: str, backend: str, seed: int, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> tuple[Tensor, Row]:
    """One attack, or the whole "union", on the images (N, ...) -> robust (N,) bool, and its costs."""
    settings = {"eps": args.eps, "norm": args.norm, "seed": seed, "backend": backend}
    if name == "union":
        settings |= {"version": args.version, "batch_size": args.batch_size, "progress": False}
        result, spent = timed(lambda: autoattack(model, images, labels, **settings), args.device)
        return result.robust, {**spent, "passes": result.passes, "stages": result.accuracy}
    attack, counter, robust = make_attack(name, VERSIONS[args.version][name], **settings), PassCounter(model), []

    def attack_all() -> None:
        for rows in torch.arange(len(images)).split(args.batch_size):
            batch, right = images[rows].to(args.device), labels[rows].to(args.device)
            attacked = attack(counter, batch, right, ids=rows)
            with torch.no_grad():
                robust.append(PassCounter(model)(attacked).argmax(dim=1) == right)

    _, spent = timed(attack_all, args.device)
    passes = {"forward": counter.forward_rows / len(images), "gradient": counter.gradient_rows / len(images)}
    return torch.cat(robust).cpu(), {**spent, "passes": passes}


def timed(function: Callable[[], Any], device: str) -> tuple[Any, dict[str, float]]:
    """Result of a call, with wall and process seconds."""
    before = {name: clock() for name, clock in CLOCKS.items()}
    result = function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, {name: clock() - before[name] for name, clock in CLOCKS.items()}


def compare(name: str, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Row:
    """One row of the table: an attack, or "union", by both backends on clean-correct images (N, ...)."""
    row: Row = {"attack": name, "seeds": args.seeds[:1] if name in SEEDLESS else args.seeds}
    with frozen(model):
        for backend in BACKENDS:
            found = [attack_once(name, backend, seed, model, images, labels, args) for seed in row["seeds"]]
            standing = ["".join(map(str, robust.int().tolist())) for robust, _ in found]
            row[backend] = {"standing": standing, "costs": [costs for _, costs in found]}
    return row


def measure(args: argparse.Namespace) -> Run:
    """Compare on one model; results are written and printed as they come."""
    splits = load_splits(args.dataset, max_train_samples=1)
    images, labels = attacked_images(splits, args.num_images, args.with_validation, args.seeds[0])
    model = AutoModelForImageClassification.from_pretrained(args.model).to(args.device).eval()
    batches = zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True)
    with torch.no_grad():
        right = torch.cat([PassCounter(model)(x.to(args.device)).argmax(dim=1).cpu() == y for x, y in batches])
    unkept = ("output", "attacks", "seeds")
    settings = {name: value for name, value in vars(args).items() if name not in unkept}
    settings |= {"model": Path(args.model).name, "image_seed": args.seeds[0]}
    run = {"model": settings["model"], "settings": settings}
    run |= {"environment": {**describe_environment(args.device), "torchattacks": metadata.version("torchattacks")}}
    run |= {"num_images": len(images), "clean_correct": int(right.sum()), "rows": []}
    for name in args.attacks:
        run["rows"].append(compare(name, model, images[right], labels[right], args))
        print(" | ".join(cells(run, run["rows"][-1])), flush=True)
        store_run(run, args.output)
    return run


# --- report ----------------------------------------------------------------------------------------------------------


def pointwise(rows: list[Row]) -> Row:
    """The row that counts an image as robust where it stands under every attack; seed by seed."""

    def standing(backend: str, number: int) -> str:
        seen = [found[min(number, len(found) - 1)] for found in (row[backend]["standing"] for row in rows)]
        return "".join(map(min, zip(*seen, strict=True)))

    seeds = max((row["seeds"] for row in rows), key=len)
    sides = {b: {"standing": [standing(b, number) for number in range(len(seeds))], "costs": []} for b in BACKENDS}
    return {"attack": "pointwise", "seeds": seeds, **sides}


def all_rows(run: Run) -> list[Row]:
    """The measured rows of a run, and the pointwise one where all attacks of the version are there."""
    singles = [row for row in run["rows"] if row["attack"] != "union"]
    whole = {row["attack"] for row in singles} == set(VERSIONS[run["settings"]["version"]])
    return run["rows"] + ([pointwise(singles)] if whole else [])


HEADER = ["model, images, version", "clean %", "attack", "ours: robust %", "torchattacks", "difference", "CPU time"]


def cells(run: Run, row: Row) -> list[str]:
    """The cells of one row: robust accuracies in % with their range over seeds, CPU time as ours over theirs."""
    ours, theirs = ([100 * s.count("1") / run["num_images"] for s in row[b]["standing"]] for b in BACKENDS)
    seconds = [sum(cost["cpu_seconds"] for cost in row[backend]["costs"]) for backend in BACKENDS]
    difference = mean(ours) - mean(theirs)
    return [
        f"{run['model']}, {run['num_images']}, {run['settings']['version']}",
        f"{100 * run['clean_correct'] / run['num_images']:.2f}",
        row["attack"],
        mean_and_range(ours, ".2f"),
        mean_and_range(theirs, ".2f"),
        f"{difference:+.2f}" + (" **too weak**" if difference > TOLERANCE + 1e-9 else ""),
        f"{seconds[0] / seconds[1]:.2f} x" if seconds[1] else "-",
    ]


def render(results: dict[str, Any]) -> str:
    """The table of a results file."""
    return markdown_table(HEADER, [cells(run, row) for run in results["runs"] for row in all_rows(run)])


def main(arguments: list[str] | None = None) -> Run:
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return measure(args)


if __name__ == "__main__":
    main()
