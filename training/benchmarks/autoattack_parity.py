"""Our AutoAttack union against torchattacks: robust accuracy, agreement per image, time and passes, attack by attack.

    pip install torchattacks   # not a dependency of the package
    python training/benchmarks/autoattack_parity.py --model path/to/model --dataset digits --num_images 200 --eps 0.15

Both sides attack the same clean-correct images with the same budgets. Without --model, a small CNN is trained against
PGD first. Prints one table per model and writes everything to --output.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import hf_dualmoe  # noqa: F401 - registers the model classes
from hf_dualmoe.apgd import PassCounter
from hf_dualmoe.attack_primitives import frozen
from hf_dualmoe.attacks import PGD
from hf_dualmoe.autoattack import BACKENDS, VERSIONS, autoattack, make_attack
from hf_dualmoe.data import DataSplits, ImageTensorDataset, load_splits, to_unit_range


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="saved model folders; none = train a small CNN")
    parser.add_argument("--dataset", default="digits", help="as `load_splits` takes it")
    parser.add_argument(
        "--with_validation", action="store_true", help="attack images of the validation split too, not of test only"
    )
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--eps", type=float, default=8 / 255, help="radius in [0, 1] pixel units")
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf")
    parser.add_argument(
        "--version", choices=list(VERSIONS), default="standard", help="union and budgets of both sides"
    )
    parser.add_argument("--batch_size", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument(
        "--train_samples", type=int, default=None, help="training images of the small CNN; default all"
    )
    parser.add_argument("--train_epochs", type=int, default=15, help="epochs of the small CNN")
    parser.add_argument("--output", type=Path, default=Path("autoattack_parity.json"))
    return parser.parse_args(arguments)


def train_small_cnn(splits: DataSplits, eps: float, norm: str, epochs: int, seed: int, device: str) -> nn.Module:
    """A CNN of four convolutions, trained against a short PGD."""
    torch.manual_seed(seed)
    layers, channels = [], splits.num_channels
    for width, stride in ((24, 1), (32, 2), (48, 1), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, splits.num_labels)]
    model = nn.Sequential(*layers, *head).to(device)
    attack = PGD(eps=eps, norm=norm, steps=3, keep_best=False, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-4)
    rows_per_epoch = len(splits.train.labels)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * -(-rows_per_epoch // 128))
    for _ in range(epochs):
        for rows in torch.randperm(rows_per_epoch).split(128):
            images, labels = to_unit_range(splits.train.images[rows]).to(device), splits.train.labels[rows].to(device)
            loss = F.cross_entropy(model(attack(model, images, labels)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def timed(function: Callable[[], object], device: str) -> tuple[object, dict[str, float]]:
    """Result of a call, with wall and process seconds; the latter are fairer on a shared CPU."""
    clocks = {"wall_seconds": time.perf_counter, "cpu_seconds": time.process_time}
    before = {name: clock() for name, clock in clocks.items()}
    result = function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, {name: clock() - before[name] for name, clock in clocks.items()}


def run_single(name: str, backend: str, model: nn.Module, images: Tensor, labels: Tensor, args) -> tuple[Tensor, dict]:
    """One attack on the images (N, ...) -> robust (N,) bool, and its costs."""
    budget = VERSIONS[args.version][name]
    attack = make_attack(name, budget, backend=backend, eps=args.eps, norm=args.norm, seed=args.seed)
    counter, robust, spent = PassCounter(model), [], {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    for rows in torch.arange(len(images)).split(args.batch_size):
        batch, right = images[rows].to(args.device), labels[rows].to(args.device)
        attacked, seconds = timed(lambda x=batch, y=right, ids=rows: attack(counter, x, y, ids=ids), args.device)
        spent = {clock: spent[clock] + value for clock, value in seconds.items()}
        with torch.no_grad():
            robust.append(PassCounter(model)(attacked).argmax(dim=1) == right)
    passes = {"forward": counter.forward_rows / len(images), "gradient": counter.gradient_rows / len(images)}
    return torch.cat(robust).cpu(), {**spent, "passes": passes}


def run_union(backend: str, model: nn.Module, images: Tensor, labels: Tensor, args) -> tuple[Tensor, dict]:
    """The whole union -> robust (N,) bool, and its costs."""
    settings = {"eps": args.eps, "norm": args.norm, "version": args.version, "seed": args.seed}
    result, spent = timed(
        lambda: autoattack(
            model, images, labels, **settings, batch_size=args.batch_size, progress=False, backend=backend
        ),
        args.device,
    )
    return result.robust, {**spent, "passes": result.passes, "stages": result.accuracy, "backend": result.backend}


def compare(name: str, model: nn.Module, images: Tensor, labels: Tensor, args) -> dict:
    """One row of the table: an attack, or "union", by both backends on clean-correct images."""
    row = {"attack": name}
    masks = []
    for backend in BACKENDS:
        with frozen(model):
            single = name != "union"
            robust, costs = (
                run_single(name, backend, model, images, labels, args)
                if single
                else run_union(backend, model, images, labels, args)
            )
        masks.append(robust)
        row[backend] = {"robust": int(robust.sum()), **costs}
    ours, theirs = (row[backend] for backend in BACKENDS)
    row["only_ours_broke"], row["only_theirs_broke"] = (
        int((a & ~b).sum()) for a, b in ((masks[1], masks[0]), (masks[0], masks[1]))
    )
    for clock in ("wall_seconds", "cpu_seconds"):
        row[f"{clock}_ratio"] = ours[clock] / theirs[clock]
    return row


HEADER = "attack    robust %: ours  theirs  difference  only ours / theirs broke   wall s: ours  theirs  ratio  cpu"


def print_row(row: dict, num_images: int) -> None:
    ours, theirs = (row[backend] for backend in BACKENDS)
    shares = [100 * side["robust"] / num_images for side in (ours, theirs)]
    print(
        f"{row['attack']:<9} {shares[0]:14.2f} {shares[1]:7.2f} {shares[0] - shares[1]:+11.2f}"
        f" {row['only_ours_broke']:14d} / {row['only_theirs_broke']:<12d}"
        f" {ours['wall_seconds']:10.1f} {theirs['wall_seconds']:7.1f} {row['wall_seconds_ratio']:6.2f}"
        f" {row['cpu_seconds_ratio']:5.2f}",
        flush=True,
    )


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


def main(arguments: list[str] | None = None) -> dict:
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    splits = load_splits(args.dataset, max_train_samples=args.train_samples)
    images, labels = attacked_images(splits, args.num_images, args.with_validation, args.seed)
    settings = {
        name: value if isinstance(value, int | float | str | list) else str(value)
        for name, value in vars(args).items()
    }
    results = {"settings": settings, "environment": environment(args.device), "models": {}}
    for folder in args.model or ["small CNN"]:
        if args.model:
            model = AutoModelForImageClassification.from_pretrained(folder).to(args.device).eval()
        else:
            model = train_small_cnn(splits, args.eps, args.norm, args.train_epochs, args.seed, args.device)
        with torch.no_grad():
            counter = PassCounter(model)
            batches = zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True)
            right = torch.cat([(counter(x.to(args.device)).argmax(dim=1).cpu() == y) for x, y in batches])
        count, rows = int(right.sum()), []
        results["models"][folder] = {"clean_correct": count, "num_images": len(images), "rows": rows}
        print(f"\n{folder}: {count} of {len(images)} images are right when clean\n{HEADER}", flush=True)
        for name in (*VERSIONS[args.version], "union"):
            rows.append(compare(name, model, images[right], labels[right], args))
            print_row(rows[-1], len(images))
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
