"""Our attacks of AutoAttack against those of torchattacks: robust accuracy, image by image, and time.

    pip install torchattacks   # not a dependency of the package
    python training/benchmarks/parity/parity.py --model path/to/model --dataset digits --eps 0.15 --seeds 0 1 2

Both sides attack the same clean-correct images with the same budgets. Square is a random search, and torchattacks
draws one square for the whole batch, so single seeds of it differ by points: give several, and compare the means. The
row "pointwise" counts an image as robust where it stands under every attack of the run.
"""

import argparse
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.attacks import frozen
from hf_dualmoe.attacks.auto_attack import BACKENDS, VERSIONS, make_attack
from hf_dualmoe.data import DataSplits, ImageTensorDataset, load_splits, to_unit_range
from hf_dualmoe.evaluation.environment import describe_environment, pixel_radius
from hf_dualmoe.models import logits_of
from hf_dualmoe.trainer.time_estimate import synchronize
from training.benchmarks.shared.render import markdown_table, mean_and_range
from training.benchmarks.shared.run import create_parser, default_device
from training.benchmarks.shared.store import RESULTS, store_run

SEEDLESS = ("fab-t",)  # draws no random numbers, on either side
TOLERANCE = 1.0  # points by which ours may leave more images standing than theirs

Run = dict[str, Any]
Row = dict[str, Any]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="saved model folder")
    add("--dataset", default="digits", help="as `load_splits` takes it")
    add("--with_validation", action="store_true", help="attack images of the validation split too, not of test only")
    add("--num_images", type=int, default=500, help="of the dataset")
    add("--eps", type=pixel_radius, default=8 / 255, help="radius in [0, 1] pixel units, such as 8/255")
    add("--norm", choices=["linf", "l2"], default="linf")
    add("--version", choices=list(VERSIONS), default="standard", help="attacks and budgets of both sides")
    add("--batch_size", type=int, default=200)
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of both sides; the first also chooses the images")
    add("--device", default=default_device())
    add("--threads", type=int, help="CPU threads")
    add("--output", type=Path, default=RESULTS / "autoattack_parity.json", help="results file; rows of others stay")
    return parser.parse_args(arguments)


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
    """One attack on the images (N, ...) -> robust (N,) bool, and its seconds by two clocks."""
    attack = make_attack(name, VERSIONS[args.version][name], eps=args.eps, norm=args.norm, seed=seed, backend=backend)
    robust, wall, cpu = [], time.perf_counter(), time.process_time()  # the latter is fairer on a shared CPU
    for rows in torch.arange(len(images)).split(args.batch_size):
        batch, right = images[rows].to(args.device), labels[rows].to(args.device)
        robust.append(correct(model, attack(model, batch, right, ids=rows), right).cpu())
    synchronize(torch.device(args.device))
    return torch.cat(robust), {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: which images are classified right."""
    return logits_of(model, images).argmax(dim=1) == labels


def compare(name: str, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Row:
    """One row of the table: an attack by both backends on clean-correct images (N, ...)."""
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
    right = torch.cat([correct(model, x.to(args.device), y.to(args.device)).cpu() for x, y in batches])
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "seeds")}
    settings |= {"model": Path(args.model).name, "image_seed": args.seeds[0]}
    run = {"model": settings["model"], "settings": settings}
    run |= {"environment": {**describe_environment(args.device), "torchattacks": metadata.version("torchattacks")}}
    run |= {"num_images": len(images), "clean_correct": int(right.sum()), "rows": []}
    for name in VERSIONS[args.version]:
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
    whole = {row["attack"] for row in run["rows"]} == set(VERSIONS[run["settings"]["version"]])
    return run["rows"] + ([pointwise(run["rows"])] if whole else [])


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
