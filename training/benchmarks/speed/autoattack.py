"""The AutoAttack union against torchattacks on the same model and images: time and robust accuracy.

    pip install torchattacks   # not a dependency of the package
    python training/benchmarks/speed/autoattack.py --model path/to/model --dataset digits --eps 0.15 --with_validation

Both sides get the images in the same batches and the published budgets; each run is a whole union, so there is one
round.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.attacks.auto_attack import VERSIONS, autoattack
from hf_dualmoe.data.datasets import load_splits
from training.benchmarks.parity.parity import add_attacked, attacked_images
from training.benchmarks.speed.timing import compare, create_parser, interleaved, run_script


def measure(args: argparse.Namespace) -> list[dict]:
    """A row per version of ours against torchattacks' standard."""
    images, labels = attacked_images(
        load_splits(args.dataset, max_train_samples=1), args.num_images, args.with_validation, args.seed
    )
    model = AutoModelForImageClassification.from_pretrained(args.model).to(args.device).eval()
    settings = {"eps": args.eps, "norm": args.norm, "seed": args.seed, "batch_size": args.batch_size}
    found = {}

    def union(version: str, backend: str):
        name = f"{backend}, {version}"

        def run() -> None:
            found[name] = autoattack(
                model, images, labels, version=version, backend=backend, progress=False, **settings
            )

        return name, run

    theirs = union(args.reference_version, "torchattacks")
    ours = [union(version, "hf_dualmoe") for version in args.versions]
    times = interleaved(dict([*ours, theirs]), repeats=1, device=args.device, warmup=0)
    rows = []
    for name, _ in ours:
        row = compare(f"{name}: times faster", times, name, [theirs[0]], args.device, at_least=args.at_least)
        accuracy = {side: 100 * found[side].robust_accuracy for side in (name, theirs[0])}
        row |= {"robust_accuracy": accuracy, "stages": {side: found[side].accuracy for side in accuracy}}
        row |= {"passes": {side: found[side].passes for side in accuracy}, "num_images": len(images)}
        row["holds"] = row["holds"] and accuracy[name] <= accuracy[theirs[0]] + 1e-9
        row["what"] += f" (robust {accuracy[name]:.2f} % against {accuracy[theirs[0]]:.2f} %)"
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_autoattack")
    add_attacked(parser, num_images=256)
    add = parser.add_argument
    add("--versions", nargs="+", choices=list(VERSIONS), default=["standard"], help="of ours")
    add("--reference_version", choices=list(VERSIONS), default="standard", help="of torchattacks")
    add("--at_least", type=float, default=2.0, help="target: times faster at equal or lower robust accuracy")
    return run_script(parser, measure, arguments, "speed_autoattack")


if __name__ == "__main__":
    main()
