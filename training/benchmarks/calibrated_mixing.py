"""What calibrated mixing (MixedNUTS) gains over plain mixing of probabilities: SA and RA along the dial.

    python training/benchmarks/calibrated_mixing.py --model path/to/dual_model --eps 0.15
    python training/benchmarks/calibrated_mixing.py --standard path/to/f_s --robust path/to/f_r --dataset cifar10
    python training/benchmarks/calibrated_mixing.py --render   # the results file as a table, into the README

The logit map and both alphas are chosen on held-out images by `calibrate_robust_logits`; the test images only measure.
RA is that under PGD on the mixture, under the adaptive union of `worst_case`, and, the one to compare, over all images
that the run attacked: a map that only hides gradients is seen through by what was found without it, and vice versa.
"""

import argparse
import json
from pathlib import Path

import torch
from readme_tables import RESULTS, markdown_table, replace_section
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.base import percent
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.data.datasets import ImageTensorDataset, load_splits, to_unit_range
from hf_dualmoe.evaluation.calibration import calibrate_robust_logits
from hf_dualmoe.evaluation.dial import DialedModel
from hf_dualmoe.evaluation.environment import describe_environment, pixel_radius
from hf_dualmoe.evaluation.metrics import wilson_interval


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="saved dual model")
    add("--standard", help="saved F_S, with --robust instead of --model")
    add("--robust", help="saved F_R")
    add("--dataset", default="digits", help="as `load_splits` takes it")
    add("--split_seed", type=int, default=42, help="--seed of the training: keeps held-out images the same")
    add("--num_images", type=int, default=300, help="test images to measure on")
    add("--held_out_images", type=int, help="validation images to calibrate on; default: all")
    add("--eps", type=pixel_radius, default=8 / 255, help="radius in [0, 1] pixel units, such as 8/255")
    add("--norm", choices=["linf", "l2"], default="linf")
    add("--steps", type=int, default=20, help="steps of PGD and of each member of the adaptive union")
    add("--alphas", type=float, nargs="*", default=[0.6, 0.75, 0.9, 0.98], help="measured beside the chosen ones")
    add("--batch_size", type=int, default=256)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads")
    add("--output", type=Path, default=RESULTS / "calibrated_mixing.json", help="results file; other runs in it stay")
    add("--render", action="store_true", help="only put the table of the results file into the README")
    return parser


def load_model(args: argparse.Namespace) -> nn.Module:
    """The dual model, saved as one or joined from two, on its device in eval mode."""
    folders = [args.model] if args.model else [args.standard, args.robust]
    models = [AutoModelForImageClassification.from_pretrained(folder) for folder in folders]
    model = models[0] if args.model else DualMoEForImageClassification.from_models(*models, 0.9)
    return model.to(args.device).eval()


def classify(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """(N,) bool: classified correctly."""
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    with torch.no_grad():
        return torch.cat([model(x).argmax(dim=1) == y for x, y in batches])


def craft(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Attacked images (N, ...) of the model as it stands, by attack."""
    ball = {"eps": args.eps, "norm": args.norm, "steps": args.steps, "seed": args.seed}
    union = worst_case(model, images, labels, **ball, batch_size=args.batch_size, own_accuracy=False)
    ids = torch.arange(len(images)).split(args.batch_size)
    return {
        "ra_pgd": torch.cat([PGD(**ball)(model, images[rows], labels[rows], ids=rows) for rows in ids]),
        "ra_adaptive_union": union.adversarial,
    }


def judge(
    model: nn.Module, images: Tensor, labels: Tensor, own: dict[str, Tensor], others: list[Tensor], batch_size: int
) -> dict:
    """SA and RA in % with 95 % intervals; the worst case counts the images attacked on other mixtures too."""
    dialed = DialedModel(model, model.config.alpha)
    masks = {"sa": classify(dialed, images, labels, batch_size)}
    masks |= {name: masks["sa"] & classify(dialed, found, labels, batch_size) for name, found in own.items()}
    stands = [classify(dialed, found, labels, batch_size) for found in others]
    masks["ra_worst_case"] = torch.stack([*masks.values(), *stands]).all(dim=0)
    intervals = {name: list(wilson_interval(int(mask.sum()), len(mask))) for name, mask in masks.items()}
    return {**{name: percent(mask) for name, mask in masks.items()}, "intervals": intervals}


def set_point(model: nn.Module, logit_map: dict | None, alpha: float) -> None:
    model.config.robust_logit_map = logit_map
    model.set_alpha(alpha)


def measure_points(
    model: nn.Module, calibration: dict, test: ImageTensorDataset, args: argparse.Namespace
) -> list[dict]:
    """Both ways of mixing along the dial: attack each point, then judge each on what was found on any."""
    images, labels = to_unit_range(test.images).to(args.device), test.labels.to(args.device)
    points, crafted = [], []
    for mixing, found in (("plain", calibration["before"]), ("calibrated", calibration["after"])):
        for alpha in sorted({*args.alphas, found["alpha"]}):
            points.append(
                {"mixing": mixing, "chosen": alpha == found["alpha"], "alpha": alpha, "map": found["robust_logit_map"]}
            )
            set_point(model, found["robust_logit_map"], alpha)
            crafted.append(craft(model, images, labels, args))
            print(f"attacked {mixing} mixing at alpha = {alpha:g}", flush=True)
    everything = [attacked for own in crafted for attacked in own.values()]
    for point, own in zip(points, crafted, strict=True):
        set_point(model, point["map"], point["alpha"])
        point |= judge(model, images, labels, own, everything, args.batch_size)
    return points


def measure(args: argparse.Namespace) -> dict:
    """Calibrate on held-out images, measure both ways of mixing on test images."""
    model = load_model(args)
    data = load_splits(args.dataset, max_train_samples=1, seed=args.split_seed)
    held_out, test = data.validation, data.test.take(args.num_images, args.seed)
    if args.held_out_images is not None:
        held_out = held_out.take(args.held_out_images, args.seed)
    attack = PGD(eps=args.eps, norm=args.norm, steps=args.steps, seed=args.seed)
    calibration = calibrate_robust_logits(
        model, held_out, attack=attack, batch_size=args.batch_size, device=args.device, progress=False
    )
    print(json.dumps(calibration), flush=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "render")}
    name = " + ".join(Path(folder).name for folder in (args.model, args.standard, args.robust) if folder)
    run = {"model": name, "settings": settings, "environment": describe_environment(torch.device(args.device))}
    points = measure_points(model, calibration, test, args)
    return run | {"num_images": len(test), "calibration": calibration, "points": points}


# --- reporting -------------------------------------------------------------------------------------------------------

HEADER = ["model, images", "mixing", "alpha", "SA %", "RA % PGD", "RA % adaptive union", "RA % all attacks"]


def cells(run: dict, point: dict) -> list[str]:
    """The cells of one row of the table; an arrow marks the points that were chosen on held-out images."""
    mixing = point["mixing"] + (" ← chosen" if point["chosen"] else "")
    values = [f"{point[key]:.2f}" for key in ("sa", "ra_pgd", "ra_adaptive_union", "ra_worst_case")]
    return [f"{run['model']}, {run['num_images']}", mixing, f"{point['alpha']:g}", *values]


def gains(run: dict) -> dict[str, float]:
    """Calibrated minus plain at the chosen points, in points of SA and RA on the test images."""
    plain, calibrated = (
        next(point for point in run["points"] if point["chosen"] and point["mixing"] == mixing)
        for mixing in ("plain", "calibrated")
    )
    return {key: calibrated[key] - plain[key] for key in ("sa", "ra_pgd", "ra_adaptive_union", "ra_worst_case")}


def gain_line(run: dict) -> str:
    """What calibration gained or lost at the chosen points, in words."""
    change, accepted = gains(run), run["calibration"]["accepted"]
    verdict = "held-out images accept the map" if accepted else "held-out images do not accept the map"
    return (
        f"{run['model']}: calibrated against plain mixing, each at its chosen alpha: SA {change['sa']:+.2f} points, "
        f"RA under PGD-{run['settings']['steps']} {change['ra_pgd']:+.2f}, under the adaptive union "
        f"{change['ra_adaptive_union']:+.2f}, over all attacks of the run {change['ra_worst_case']:+.2f} ({verdict})."
    )


def render_table(results: dict) -> str:
    """The table of a results file in Markdown, and one line per run on the gain."""
    table = markdown_table(HEADER, [cells(run, point) for run in results["runs"] for point in run["points"]])
    return "\n".join([table, "", *(f"- {gain_line(run)}" for run in results["runs"])])


def store(run: dict, path: Path) -> None:
    """Write a run into the results file, in the place of an earlier one of the same settings."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    kept = [other for other in runs if other["settings"] != run["settings"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [*kept, run]}, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = create_parser()
    args = parser.parse_args(arguments)
    if args.render:
        replace_section("calibrated_mixing", render_table(json.loads(args.output.read_text(encoding="utf-8"))))
        return
    if bool(args.model) == bool(args.standard and args.robust):
        parser.error("give --model, or both --standard and --robust.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    run = measure(args)
    store(run, args.output)
    print(render_table({"runs": [run]}))


if __name__ == "__main__":
    main()
