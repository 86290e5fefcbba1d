"""Certified accuracy of 1-Lipschitz networks, mixtures of them, and dual models with a free standard model.

python training/benchmarks/certificates.py --dataset_name digits
python training/benchmarks/certificates.py --dataset_name path/to/cifar10 --seeds 0 1 2     # on a GPU
python training/benchmarks/certificates.py --dataset_name digits --arms single mixture      # some arms only

Arms: `single` (one 1-Lipschitz network), `mixture` (hard-routed mixture of four), `mixture_trained` (the same, also
trained for route margins), `mixture_soft` (dense mixture of four), `standard` (a free ResNet, F_S). All robust arms
are trained for logit margins. Every arm takes the same number of steps; a hard-routed mixture costs one network per
image. The dual models join `standard` with each robust arm along alpha. Certificates are L2 proofs on test images. A
trained model and a finished measurement are not made again. `results.json` has each run, mean and standard deviation
over seeds, and whether a dual model keeps 95 % of its F_R's certified accuracy at the first radius while it gains SA;
`curves.png` has the whole curves.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import set_seed

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.certification_report import CertificationReport, certify_dataset
from hf_dualmoe.certified_training import certified_loss
from hf_dualmoe.data import DataSplits, load_splits
from hf_dualmoe.environment import describe_environment, write_text
from hf_dualmoe.plots import new_axes
from hf_dualmoe.trainer import RobustTrainer
from hf_dualmoe.training_args import RobustTrainingArguments

ALPHAS = (0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
KEPT = 0.95  # of F_R's certified accuracy at the first radius: the goal
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "radii": [0.1, 0.25, 0.5],
        "backbone": "lipschitz_mlp",
        "backbone_kwargs": {"hidden_sizes": [256, 256], "logit_scale": 8.0},
        "standard": {"backbone": "resnet18", "stem": "cifar", "width": [16, 32, 64, 64]},
        "epochs": 60,
        "batch_size": 128,
        "learning_rate": 2e-3,
        "augmentation": {"crop_padding": 0, "horizontal_flip": False},
    },
    "cifar10": {
        "radii": [36 / 255, 72 / 255, 108 / 255],
        "backbone": "lipschitz_cnn",
        "backbone_kwargs": {"channels": [32, 128, 256], "depth": 2, "hidden_size": 1024, "logit_scale": 8.0},
        "standard": {"backbone": "resnet18", "stem": "cifar"},
        "epochs": 60,
        "batch_size": 256,
        "learning_rate": 2e-3,
        "augmentation": {"crop_padding": 4, "horizontal_flip": True},
    },
}
ARMS: dict[str, dict[str, Any]] = {
    "single": {"num_experts": 1, "margin_weight": 1.0},
    "mixture": {"num_experts": 4, "margin_weight": 1.0},
    "mixture_trained": {"num_experts": 4, "margin_weight": 1.0, "route_weight": 0.3},
    "mixture_soft": {"num_experts": 4, "router_top_k": 4, "margin_weight": 1.0, "gate_weight": 0.01},
    "standard": {"num_experts": 1},
}


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dataset_name", default="digits", help="digits, or CIFAR-10: a Hub id, a folder or a parquet file.")
    add("--preset", choices=PRESETS, help="Settings; default: digits for digits, cifar10 otherwise.")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="What to train.")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of initialisation, batches and augmentation.")
    add("--epochs", type=float, help="Instead of the preset's.")
    add("--logit_scale", type=float, help="Instead of the preset's.")
    add("--train_radius", type=float, help="Radius asked for in training, in pixel units; default: twice the first.")
    add("--max_train_samples", type=int, help="Use fewer training images.")
    add("--num_images", type=int, help="Certify fewer test images.")
    add("--output_dir", type=Path, default=Path("outputs/certificates"), help="Where everything goes.")
    add("--use_cpu", action="store_true", help="Train on the CPU even where there is a GPU.")
    return parser


def main() -> None:
    args = create_parser().parse_args()
    preset = dict(PRESETS[args.preset or ("digits" if args.dataset_name == "digits" else "cifar10")])
    preset["epochs"] = args.epochs or preset["epochs"]
    if args.logit_scale is not None:
        preset["backbone_kwargs"] = {**preset["backbone_kwargs"], "logit_scale": args.logit_scale}
    preset["train_radius"] = args.train_radius or 2 * preset["radii"][0]
    limit = {} if args.dataset_name == "digits" else {"max_train_samples": args.max_train_samples}
    data = load_splits(args.dataset_name, **limit)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_same_settings(args.output_dir / "settings.json", {"dataset_name": args.dataset_name, **preset})
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        models = {arm: train(arm, seed, preset, data, args) for arm in args.arms}
        for arm, (model, seconds) in models.items():
            runs.append(measure(arm, model, seed, preset, data, args) | {"train_seconds": seconds})
            if arm != "standard" and "standard" in models:
                dual = DualMoEForImageClassification.from_models(models["standard"][0], model, alpha=0.8)
                runs.append(measure(f"dual_{arm}", dual.eval(), seed, preset, data, args))
            save(args.output_dir, runs, preset, data, args)
    print(table(summarise(runs), preset["radii"]))
    plot(runs, args.output_dir / "curves.png", data.name, preset["radii"])
    print(f"\nSaved to {args.output_dir}: results.json, curves.png")


def check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix runs of different settings in one folder."""
    text = json.dumps(settings, indent=2) + "\n"
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"{path.parent} holds runs with other settings; choose another --output_dir.")
    path.write_text(text)


def moe_config(arm: str, preset: dict[str, Any], data: DataSplits) -> MoEConfig:
    """The arm's configuration; a 1-Lipschitz network sees plain pixels, shifted only: std = 1/2 for all channels."""
    mean = data.train.images[:10_000].float().div(255).mean(dim=(0, 2, 3)).tolist()
    names = {"id2label": dict(enumerate(data.class_names))}
    names["label2id"] = {name: i for i, name in names["id2label"].items()}
    network = preset["standard"] if arm == "standard" else {k: preset[k] for k in ("backbone", "backbone_kwargs")}
    routing = {k: v for k, v in ARMS[arm].items() if k in ("num_experts", "router_top_k")}
    return MoEConfig(
        **names,
        **network,
        **routing,
        image_size=data.image_size,
        num_channels=data.num_channels,
        image_mean=[round(value, 4) for value in mean],
        image_std=0.5,
        router="pooled",
        router_aux_loss_coef=0.1,
    )


def train(
    arm: str, seed: int, preset: dict[str, Any], data: DataSplits, args: argparse.Namespace
) -> tuple[MoEForImageClassification, float]:
    """Train an arm, or load it; the model in eval mode, and the seconds that the training took."""
    folder = args.output_dir / f"{arm}-seed{seed}"
    if (folder / "train_seconds.json").is_file():
        model = MoEForImageClassification.from_pretrained(folder)
        return model, json.loads((folder / "train_seconds.json").read_text())
    set_seed(seed)
    model = MoEForImageClassification(moe_config(arm, preset, data))
    settings = RobustTrainingArguments(
        output_dir=str(folder),
        method="standard",
        num_train_epochs=preset["epochs"],
        per_device_train_batch_size=preset["batch_size"],
        learning_rate=preset["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=50,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=args.use_cpu,
        **preset["augmentation"],
    )
    trainer = RobustTrainer(model, settings, train_dataset=data.train, eval_dataset=data.validation)
    if arm != "standard":
        weights = {name: value for name, value in ARMS[arm].items() if name.endswith("_weight")}
        trainer.objective = partial(certified_loss, radius=preset["train_radius"], **weights)
    started = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - started, 1)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped).eval()
    model.save_pretrained(folder)
    (folder / "train_seconds.json").write_text(json.dumps(seconds))
    return model, seconds


def measure(
    name: str, model: torch.nn.Module, seed: int, preset: dict[str, Any], data: DataSplits, args: argparse.Namespace
) -> dict[str, Any]:
    """Certify a model on the test images; for a dual model along alpha."""
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    folder = args.output_dir / f"{name}-seed{seed}"
    report: CertificationReport = certify_dataset(
        model.to(device).eval(),
        data.test,
        radii=preset["radii"],
        alphas=ALPHAS,
        num_images=args.num_images,
        dataset_name=data.name,
        path=folder / "certificates.json",
        resume_dir=folder / "certificates",
    )
    entries = [entry for entry in report.entries if name == "standard" or not entry["name"].endswith("alone")]
    return {"arm": name, "seed": seed, "entries": entries, "failures": report.failures}


# --- what comes out --------------------------------------------------------------------------------------------------


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of SA and certified accuracy, per arm and alpha, with the goal."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for run in runs:
        for entry in run["entries"]:
            groups.setdefault((run["arm"], entry["alpha"]), []).append(entry)

    def spread(values: list[float]) -> dict[str, float | None]:
        return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}

    rows = []
    for (arm, alpha), entries in groups.items():
        certified = [entry["certified"] for entry in entries]
        known = all(values is not None for values in certified)
        rows.append(
            {
                "arm": arm,
                "alpha": alpha,
                "seeds": len(entries),
                "sa": spread([entry["sa"] for entry in entries]),
                "certified": [spread(list(values)) for values in zip(*certified, strict=True)] if known else None,
            }
        )
    alone = {row["arm"]: row for row in rows if row["alpha"] is None}
    for row in rows:
        base = alone.get(row["arm"].removeprefix("dual_"))
        if row["alpha"] is None or base is None or not row["certified"] or not base["certified"]:
            continue
        if base["certified"][0]["mean"] > 0:
            row["kept"] = row["certified"][0]["mean"] / base["certified"][0]["mean"]
            row["sa_gain"] = row["sa"]["mean"] - base["sa"]["mean"]
            row["goal_reached"] = row["kept"] >= KEPT and row["sa_gain"] > 0
    return rows


def save(
    folder: Path, runs: list[dict[str, Any]], preset: dict[str, Any], data: DataSplits, args: argparse.Namespace
) -> None:
    """Bring results.json up to date."""
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    results = {
        "dataset": {
            "name": data.name,
            "train_images": len(data.train),
            "test_images": args.num_images or len(data.test),
        },
        "norm": "l2",
        "radii": preset["radii"],
        "settings": preset,
        "arms": {name: ARMS[name] for name in args.arms},
        "seeds": args.seeds,
        "summary": summarise(runs),
        "runs": runs,
        "environment": describe_environment(device),
    }
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def table(rows: list[dict[str, Any]], radii: list[float]) -> str:
    """The summary as text."""
    lines = [f"{'arm':<24}{'alpha':>7}{'SA %':>15}" + "".join(f"{f'L2 {r:.3f}':>15}" for r in radii) + f"{'kept':>8}"]
    for row in rows:
        values = [row["sa"], *(row["certified"] or [None] * len(radii))]
        cells = ["-" if value is None else spread_text(value) for value in values]
        kept = f"{100 * row['kept']:.1f} %" if "kept" in row else ""
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
        lines.append(f"{row['arm']:<24}{alpha:>7}" + "".join(f"{cell:>15}" for cell in cells) + f"{kept:>8}")
    return "\n".join(lines)


def spread_text(value: dict[str, float | None]) -> str:
    """A mean, with its standard deviation where there are several seeds."""
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")


def plot(runs: list[dict[str, Any]], path: Path, name: str, radii: list[float]) -> None:
    """Certified accuracy against the radius: each arm without a dial, one line per seed."""
    figure, axes = new_axes(7.2, 4.4)
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in runs) if not arm.startswith("dual_")]
    colours = dict(zip(arms, ("#3b6fb6", "#d1495b", "#2e8b57", "#e08e0b", "#555555"), strict=False))
    for run in runs:
        for entry in run["entries"] if run["arm"] in colours else ():
            if entry["curve"]:
                x, y = entry["curve"]["radius"], entry["curve"]["accuracy"]
                label = run["arm"] if run["seed"] == runs[0]["seed"] else None
                axes.plot([*x, x[-1]], [*y, 0], color=colours[run["arm"]], linewidth=1.2, alpha=0.8, label=label)
    for radius in radii:
        axes.axvline(radius, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_xlabel("L2 radius, pixel units in [0, 1]")
    axes.set_ylabel("certified accuracy, %")
    axes.set_title(f"Certified accuracy on {name}, one line per seed")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main()
