"""The AutoAttack union against torchattacks on the same model and images: time and robust accuracy.

Both sides get the images in the same batches and the published budgets; each run is a whole union, so there is one
round.
"""

import argparse

from transformers import AutoModelForImageClassification

from hf_dualmoe.attacks import autoattack
from hf_dualmoe.attacks.auto_attack import BACKENDS, VERSIONS
from hf_dualmoe.data import load_splits
from training.benchmarks.parity.parity import add_attacked, attacked_images
from training.benchmarks.speed.timing import Row, compare, interleaved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    add_attacked(parser, num_images=256)
    parser.add_argument("--version", choices=list(VERSIONS), default="standard", help="of both sides")
    parser.add_argument("--at_least", type=float, default=2.0, help="target: times faster, no more left standing")


def measure(args: argparse.Namespace) -> list[Row]:
    """Our union against torchattacks'."""
    splits = load_splits(args.dataset, max_train_samples=1)
    images, labels = attacked_images(splits, args.num_images, args.with_validation, args.seed)
    model = AutoModelForImageClassification.from_pretrained(args.model).to(args.device).eval()
    settings = {name: getattr(args, name) for name in ("eps", "norm", "seed", "batch_size", "version")}
    found = {}

    def union(backend: str) -> None:
        found[backend] = autoattack(model, images, labels, backend=backend, progress=False, **settings)

    runs = {backend: lambda backend=backend: union(backend) for backend in BACKENDS}
    times = interleaved(runs, repeats=1, device=args.device, warmup=0)
    ours, theirs = BACKENDS
    row = compare(f"{ours}: times faster", times, ours, [theirs], args.device, at_least=args.at_least)
    standing = {side: 100 * result.robust_accuracy for side, result in found.items()}
    row["what"] += f" (robust {standing[ours]:.2f} % against {standing[theirs]:.2f} %)"
    row["holds"] = row["holds"] and standing[ours] <= standing[theirs] + 1e-9
    passes = {side: result.passes for side, result in found.items()}
    return [row | {"robust_accuracy": standing, "passes": passes, "num_images": len(images)}]
