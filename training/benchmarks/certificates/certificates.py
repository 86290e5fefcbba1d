"""Certified accuracy of 1-Lipschitz networks, mixtures of them, and dual models with a free standard model.

python training/benchmarks/certificates/certificates.py --dataset_name digits
python training/benchmarks/certificates/certificates.py --dataset_name path/to/cifar10
python training/benchmarks/certificates/certificates.py --dataset_name digits --arms single mixture  # some arms only
python training/benchmarks/certificates/certificates.py --dataset_name digits --render         # keep the results

Arms: `single` (one 1-Lipschitz network), `mixture` (hard-routed mixture of four), `mixture_free` (with so little load
balancing that it may use one expert only), `mixture_trained` (also trained for route margins), `mixture_soft` (dense
mixture of four), `mixture_soft_gate` (also trained for a gate of small Lipschitz constant), `standard` (a free ResNet,
F_S). All robust arms but `single_plain` are trained for logit margins. Every arm takes the same number of steps; a
hard-routed mixture costs one network per image. The dual models join `standard` with each robust arm along alpha.
Certificates are L2 proofs on test images. Which alpha to use is chosen on held-out images: the lowest that keeps 95 %
of F_R's certified accuracy at the first radius there. All is trained by `RobustTrainer`, as `training/run.py` does it,
with method="certified" or "standard". The same command goes on where it was stopped: a training from its last
checkpoint, and no finished training or measurement is made again. Several processes can share the work, each with
other --seeds: the command with all of them then sums up. `results.json` has each run, mean and standard deviation over
seeds, and is brought up to date after each seed.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from hf_dualmoe.certification import certify_dataset
from hf_dualmoe.cli.arguments import ModelArguments
from hf_dualmoe.data import load_splits, to_unit_range
from hf_dualmoe.evaluation.environment import describe_environment
from hf_dualmoe.trainer import RobustTrainer, RobustTrainingArguments, last_good_checkpoint
from hf_dualmoe.trainer.checkpoints import list_checkpoints, remove_checkpoint
from training.benchmarks.certificates.report import gains, keep, render, summarise
from training.benchmarks.shared.recipes import count_parameters
from training.benchmarks.shared.run import create_parser, require_positive
from training.benchmarks.shared.store import begin, read_json, write_json

ALPHAS = (0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "radii": [0.1, 0.25, 0.5],
        "train_radius": 0.5,
        "backbone": "lipschitz_mlp",
        "backbone_kwargs": {"hidden_sizes": [128, 128], "logit_scale": 32.0},
        "standard": {"backbone": "resnet18", "stem": "cifar", "width": [8, 16, 32, 32]},
        "epochs": 40,
        "batch_size": 128,
        "learning_rate": 2e-3,
        "augmentation": {"crop_padding": 0, "horizontal_flip": False},
    },
    "cifar10": {  # narrow, for CPUs
        "radii": [36 / 255, 72 / 255, 108 / 255],
        "alphas": [0.55, 0.9, 0.97, 0.99, 0.995, 0.998, 0.999, 1.0],  # F_R is not confident: the dial acts near 1
        "train_radius": 108 / 255,
        # Few 3x3 convolutions: each takes margin away, as its operator is not orthogonal. The logits' scale is low:
        # where many images are misclassified, cross-entropy keeps margins of logits small, and so the radii.
        "backbone": "lipschitz_cnn",
        "backbone_kwargs": {"channels": [16, 32], "depth": 1, "hidden_size": 128, "logit_scale": 1.0},
        "standard": {"backbone": "resnet18", "stem": "cifar", "width": [8, 16, 32, 64]},
        "epochs": 10,
        "batch_size": 128,
        "learning_rate": 1e-2,
        "standard_learning_rate": 2e-3,
        "max_train_samples": 10_000,
        "num_images": 2_000,
        "arms": ["single", "mixture", "mixture_trained", "standard"],
        "augmentation": {"crop_padding": 2, "horizontal_flip": True},
    },
}
ARMS: dict[str, dict[str, Any]] = {
    "single_plain": {"num_experts": 1, "margin_weight": 0.0},
    "single": {"num_experts": 1},
    "mixture_free": {"num_experts": 4},
    "mixture": {"num_experts": 4, "router_aux_loss_coef": 1.0},
    "mixture_trained": {"num_experts": 4, "router_aux_loss_coef": 1.0, "route_weight": 0.3},
    "mixture_soft": {"num_experts": 4, "router_top_k": 4},
    "mixture_soft_gate": {"num_experts": 4, "router_top_k": 4, "gate_weight": 0.01},
    "standard": {"num_experts": 1},
}


class CertificateStudy:
    """Trains and certifies all arms and seeds in one folder.

    Args:
        preset: Settings, one of `PRESETS`.
        args: Of the command line.
    """

    def __init__(self, preset: dict[str, Any], args: argparse.Namespace):
        self.preset, self.args, self.folder = preset, args, args.output_dir
        self.device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
        settings = self.folder / "settings.json"
        write_json(settings, begin(settings, {"dataset_name": args.dataset_name, **preset}))
        torch.set_num_threads(args.threads or torch.get_num_threads())
        self.data = load_splits(args.dataset_name, max_train_samples=preset.get("max_train_samples"))

    # --- training ----------------------------------------------------------------------------------------------------

    def create_model(self, arm: str) -> MoEForImageClassification:
        """The untrained model of an arm."""
        shared = {key: self.preset[key] for key in ("backbone", "backbone_kwargs")}
        network = self.preset["standard"] if arm == "standard" else shared
        routing = {key: value for key, value in ARMS[arm].items() if not key.endswith("_weight")}
        settings = {"router": "pooled", "router_aux_loss_coef": 0.1, **network, **routing}
        return MoEForImageClassification(ModelArguments(**settings).moe_config(self.data))

    def train(self, arm: str, seed: int) -> tuple[MoEForImageClassification, float | None]:
        """Train an arm, go on with its training, or load it.

        Returns:
            The model in eval mode, and the seconds that the training took; None where it was stopped in between.
        """
        folder = self.folder / f"{arm}-seed{seed}"
        if (folder / "train_seconds.json").is_file():
            return MoEForImageClassification.from_pretrained(folder), read_json(folder / "train_seconds.json")
        set_seed(seed)
        settings = self.training_settings(arm, seed, folder)
        trainer = RobustTrainer(self.create_model(arm), settings, train_dataset=self.data.train)
        checkpoint, started = last_good_checkpoint(folder), time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = None if checkpoint else round(time.perf_counter() - started, 1)
        trainer.accelerator.unwrap_model(trainer.model_wrapped).eval().save_pretrained(folder)
        write_json(folder / "train_seconds.json", seconds)
        for path in list_checkpoints(folder).values():
            remove_checkpoint(path)
        return MoEForImageClassification.from_pretrained(folder), seconds  # what is measured is what was saved

    def training_settings(self, arm: str, seed: int, folder: Path) -> RobustTrainingArguments:
        """The arguments of the trainer of an arm."""
        preset, rate = self.preset, self.preset["learning_rate"]
        if arm == "standard":
            rate = preset.get("standard_learning_rate", rate)
        return RobustTrainingArguments(
            output_dir=str(folder),
            method="standard" if arm == "standard" else "certified",
            certify_radius=preset["train_radius"],
            num_train_epochs=preset["epochs"],
            per_device_train_batch_size=preset["batch_size"],
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            save_strategy="steps",
            save_steps=50,
            save_total_limit=1,
            report_to="none",
            seed=seed,
            use_cpu=self.args.use_cpu,
            **preset["augmentation"],
            **{name: value for name, value in ARMS[arm].items() if name.endswith("_weight")},
        )

    # --- certificates ------------------------------------------------------------------------------------------------

    def measure(self, name: str, model: torch.nn.Module, seed: int) -> dict[str, Any]:
        """Certify a model on the test images and on the held-out ones; for a dual model along alpha."""
        folder, limit = self.folder / f"{name}-seed{seed}", self.preset.get("num_images")
        run: dict[str, Any] = {"arm": name, "seed": seed, "failures": {}}
        for key, images in (("entries", self.data.test), ("held_out", self.data.validation)):
            report = certify_dataset(
                model.to(self.device).eval(),
                images,
                radii=self.preset["radii"],
                alphas=self.preset.get("alphas", ALPHAS),
                num_images=None if limit is None else min(limit, len(images)),
                dataset_name=self.data.name,
                path=folder / f"certificates_{key}.json",
                resume_dir=folder / f"measurements_{key}",
            )
            run[key] = [entry for entry in report.entries if not entry["name"].endswith("alone")]
            run["failures"] |= report.failures
        run["held_out"] = [{k: entry[k] for k in ("alpha", "sa", "certified")} for entry in run["held_out"]]
        return run

    def measure_all(self, models: dict[str, tuple[MoEForImageClassification, float | None]], seed: int) -> list[dict]:
        """Certify the models of a seed, and the dual models that they make with F_S."""
        runs = []
        for arm, (model, seconds) in models.items():
            run = {**self.measure(arm, model, seed), "parameters": count_parameters(model)}
            runs.append(run | {"expert_load": self.expert_load(model), "train_seconds": seconds})
            if arm != "standard" and "standard" in models:
                dual = DualMoEForImageClassification.from_models(models["standard"][0], model, alpha=0.8)
                runs.append(self.measure(f"dual_{arm}", dual, seed))
        return runs

    @torch.no_grad()
    def expert_load(self, model: MoEForImageClassification) -> list[float] | None:
        """Share of the test images, in %, for which each expert is the first choice; None for one network."""
        if model.config.num_experts == 1:
            return None
        batches = self.data.test.images.to(model.device).split(500)
        first = torch.cat([model.route(to_unit_range(images)).argmax(dim=1) for images in batches])
        return (100 * first.bincount(minlength=model.config.num_experts).double() / len(first)).tolist()

    def save(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Bring results.json up to date; its content."""
        preset, data = self.preset, self.data
        count = min(preset.get("num_images") or len(data.test), len(data.test))
        results = {
            "dataset": {"name": data.name, "train_images": len(data.train), "test_images": count},
            "norm": "l2",
            "radii": preset["radii"],
            "settings": preset,
            "arms": {name: ARMS[name] for name in dict.fromkeys(run["arm"] for run in runs) if name in ARMS},
            "seeds": sorted({run["seed"] for run in runs}),
            "summary": summarise(runs),
            "gains": gains(runs),
            "runs": runs,
            "environment": {**describe_environment(self.device), "threads": torch.get_num_threads()},
        }
        write_json(self.folder / "results.json", results)
        return results


# --- command line ----------------------------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--dataset_name", default="digits", help="digits, or CIFAR-10: a Hub id, a folder or a parquet file")
    add("--preset", choices=PRESETS, help="settings; default: digits for digits, cifar10 otherwise")
    add("--arms", nargs="+", choices=ARMS, help="what to train; default: those of the preset, or all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of initialisation, batches and augmentation")
    add("--output_dir", type=Path, help="where everything goes; default: outputs/certificates-<preset>")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--use_cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add("--render", action="store_true", help="run nothing: keep the results there are, and render the page")
    args = parser.parse_args(arguments)
    require_positive(parser, args, "threads")
    args.preset = args.preset or ("digits" if args.dataset_name == "digits" else "cifar10")
    args.output_dir = args.output_dir or Path("outputs") / f"certificates-{args.preset}"
    args.arms = args.arms or PRESETS[args.preset].get("arms", list(ARMS))
    return args


def run_study(args: argparse.Namespace) -> None:
    """Train and certify what is missing."""
    study = CertificateStudy(PRESETS[args.preset], args)
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        runs += study.measure_all({arm: study.train(arm, seed) for arm in args.arms}, seed)
        results = study.save(runs)
    print(f"{render(results)}\n\nSaved to {args.output_dir}: results.json")


def keep_results(args: argparse.Namespace) -> None:
    """Keep results in the repository and render the page."""
    from training.benchmarks.results_page import render_page  # here, since it imports what the whole page needs

    keep(args.preset, args.output_dir)
    render_page()


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    try:
        (keep_results if args.render else run_study)(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"certificates.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
