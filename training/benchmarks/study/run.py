"""One run of a study: train an arm with a seed on its budget, then judge it by the adaptive union.

`study.py` starts this in a process of its own for each run: python run.py STUDY.json ARM SEED FOLDER
"""

import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.attacks import PGD
from hf_dualmoe.data import to_unit_range
from hf_dualmoe.evaluation import (
    RobustnessReport,
    calibrate_robust_logits,
    choose_alpha,
    evaluate_robustness,
    sweep_alpha,
)
from hf_dualmoe.evaluation.dial import dial_attack
from hf_dualmoe.trainer import RobustTrainer, RobustTrainingArguments
from training import run as training
from training.benchmarks.shared.recipes import FlopCounter, count_parameters, forward_flops, parse_recipe
from training.benchmarks.shared.store import TRAINING, read_json, write_json
from training.benchmarks.study.definition import settings_of

# what `numbers` takes from a report
NUMBERS = ("sa", "ra", "ra_pgd", "expert_load", "route_flip_rate", "num_images", "environment", "union")
UNION = ("worst_case",)  # beside SA and PGD of the whole model, which every evaluation measures


class StudyRun:
    """One arm with one seed, in a folder of its own."""

    def __init__(self, study: dict[str, Any], arm: str, seed: int, folder: Path):
        self.study, self.arm, self.seed, self.folder = study, arm, seed, folder
        self.entry = study["arms"][arm]
        self.costs: dict[str, float] = {}  # see step_passes
        folder.mkdir(parents=True, exist_ok=True)
        data_args, model_args, _, _ = self.parse(study["settings"])
        self.data = training.load_data(data_args, model_args.image_size, model_args.num_channels, seed)

    # --- what an arm is ------------------------------------------------------------------------------------------

    def parse(self, settings: dict[str, Any]) -> tuple:
        """The argument objects of `training/run.py` for these settings."""
        with TemporaryDirectory() as folder:
            recipe = self.write_recipe(settings, Path(folder))
            return parse_recipe(str(recipe), seed=self.seed, output_dir=self.folder)

    @cached_property
    def args(self) -> RobustTrainingArguments:
        """The training arguments of the settings that all arms share: device, eps and norm are those of each."""
        return self.parse(self.study["settings"])[2]

    def write_recipe(self, settings: dict[str, Any], folder: Path) -> Path:
        """A recipe of `training/run.py` with these settings."""
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**settings, "dataset_name": self.study["dataset_name"]}), encoding="utf-8")
        return path

    def build(self, settings: dict[str, Any]) -> nn.Module:
        """The untrained model for these settings."""
        _, model_args, args, _ = self.parse(settings)
        return training.create_model(model_args, args, self.data)

    # --- budget --------------------------------------------------------------------------------------------------

    def step_flops(self, settings: dict[str, Any]) -> float:
        """Floating-point operations per image of one training step: attack, loss and backward."""
        _, _, args, _ = self.parse({**settings, "bf16": False})
        trainer = RobustTrainer(self.build(settings), args, train_dataset=self.data.train)
        trainer.state.global_step = 1  # the first step of a training also logs, which costs a forward
        rows = torch.arange(min(args.per_device_train_batch_size, len(self.data.train)))
        batch = {
            "pixel_values": to_unit_range(self.data.train.images[rows]).to(args.device),
            "labels": self.data.train.labels[rows].to(args.device),
        }
        trainer.model.to(args.device).train()
        with FlopCounter() as counter:
            trainer.compute_loss(trainer.model, batch).backward()
        return counter.total / len(rows)

    @cached_property
    def pass_flops(self) -> float:
        """The unit of the budget: operations per image of forward and backward through one plain backbone."""
        return self.step_flops({**self.study["settings"], "method": "standard", "num_experts": 1, "shared_stages": 0})

    def passes_before(self, arm: str) -> float:
        """Passes per training image of the model that an arm starts from, and of those before it; 0 from scratch."""
        source = self.study["arms"][arm].get("init_from")
        return self.steps(source)[1] if source else 0.0

    def steps(self, arm: str | None = None) -> tuple[int, float]:
        """Training steps that the budget of an arm allows, and the passes per training image that it costs in all."""
        arm = arm or self.arm
        before, cost = self.passes_before(arm), self.step_passes(arm)
        count = max(1, round((self.study["arms"][arm].get("passes", self.study["passes"]) - before) / cost))
        return count, before + cost * count

    def step_passes(self, arm: str) -> float:
        """What one step of an arm costs, in passes over all training images."""
        if arm not in self.costs:
            share = self.study["settings"]["per_device_train_batch_size"] / len(self.data.train)
            self.costs[arm] = self.step_flops(settings_of(self.study, arm)) / self.pass_flops * share
        return self.costs[arm]

    # --- work ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train with `training/run.py`, or join the models of two other arms; returns what to report about it."""
        if "standard" in self.entry:
            return self.join()
        settings = settings_of(self.study, self.arm)
        count, passes = self.steps()
        known = {name: settings[name] for name in ("method", "width", "num_experts") if name in settings}
        if self.study.get("bf16"):
            settings["bf16"] = known["bf16"] = True
        if "init_from" in self.entry:
            known["init_from"] = self.entry["init_from"]
            known["passes_from"] = round(self.passes_before(self.arm), 2)
            settings["init_experts_from"] = str(self.model_of(self.entry["init_from"]))
        recipe = self.write_recipe({**settings, "max_steps": count}, self.folder)
        command = [sys.executable, str(TRAINING / "run.py"), "--recipe", str(recipe)]
        command += ["--seed", str(self.seed), "--output_dir", str(self.folder), "--report", "none"]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        return {**known, "steps": count, "passes": round(passes, 2), "seconds": time.perf_counter() - started}

    def model_of(self, arm: str) -> Path:
        """Where the trained model of another arm with the same seed is."""
        return self.folder.parent / f"{arm}-seed{self.seed}" / "model"

    def join(self) -> dict[str, Any]:
        """A dual model of the trained models of two arms."""
        parts = {
            name: AutoModelForImageClassification.from_pretrained(self.model_of(self.entry[name]))
            for name in ("standard", "robust")
        }
        mixing = self.entry.get("mixing", "probs")
        model = DualMoEForImageClassification.from_models(**parts, alpha=0.75, mixing=mixing)
        known = {"method": "joined", "mixing": mixing, "steps": 0, "passes": self.joined_passes()}
        if self.entry.get("calibrate"):
            known["calibration"] = self.calibrate(model)
            model.config.robust_logit_map = known["calibration"]["robust_logit_map"]
        model.save_pretrained(self.folder / "model")
        return known

    def calibrate(self, model: nn.Module) -> dict[str, Any]:
        """The logit map of F_R that held-out images choose; alpha is chosen later, as for every dual model."""
        steps = self.study["evaluation"].get("steps", 20)
        attack = PGD(eps=float(self.args.eps), norm=self.args.norm, steps=steps, seed=0)
        model.to(self.args.device)
        return calibrate_robust_logits(model, self.data.validation, attack=attack, progress=False)

    def joined_passes(self) -> float:
        """Passes of the two models that this arm joins; those of a model that both started from count once."""
        arms = {arm for name in ("standard", "robust") for arm in self.lineage(self.entry[name])}
        return round(sum(self.own_passes(arm) for arm in arms), 2)

    def lineage(self, arm: str) -> list[str]:
        """An arm, the one that it starts from, and so on."""
        source = self.study["arms"][arm].get("init_from")
        return [arm, *(self.lineage(source) if source else [])]

    def own_passes(self, arm: str) -> float:
        """Passes of a finished run of another arm, without those of the model that it started from."""
        told = self.finished(arm)["training"]
        return told["passes"] - told.get("passes_from", 0)

    def finished(self, arm: str) -> dict[str, Any]:
        """What the run of another arm with the same seed has written."""
        return read_json(self.model_of(arm).parent / "run.json")

    def evaluate(self) -> dict[str, Any]:
        """Clean accuracy, PGD and the adaptive union on the test images; the dial is chosen on held-out images."""
        model = self.trained_model()
        result: dict[str, Any] = {
            "parameters": count_parameters(model),
            "flops": forward_flops(model, to_unit_range(self.data.test.images[:1]).to(self.args.device)),
            "images": {name: len(getattr(self.data, name)) for name in ("train", "validation", "test")},
        }
        settings = self.attack_settings()
        if hasattr(model, "set_alpha"):
            sweep, members = self.sweep(model)
            choice = choose_alpha(sweep)
            model.set_alpha(choice.alpha)
            result |= {"alpha": choice.alpha, "rule": choice.rule, "sweep": sweep, "swept_with": members}
            result["robust"] = self.robust_numbers(model.robust, settings)
        return result | numbers(self.report(model, "whole", settings))

    def sweep(self, model: nn.Module) -> tuple[list[dict[str, float]], list[str]]:
        """The dial on held-out images, and what it was attacked with; kept beside the run, since it takes long."""
        attack = dial_attack(self.data.num_labels, eps=float(self.args.eps), norm=self.args.norm)
        alphas = {**self.study["evaluation"], **self.entry.get("evaluation", {})}["alphas"]
        asked = {"alphas": alphas, "swept_with": list(attack.members)}
        path = self.folder / "sweep.json"
        kept = read_json(path) if path.is_file() else {}
        if asked.items() <= kept.items():
            return kept["sweep"], kept["swept_with"]
        sweep = sweep_alpha(model, self.data.validation, attack=attack, alphas=asked["alphas"], progress=False)
        write_json(path, {**asked, "sweep": sweep})
        return sweep, asked["swept_with"]

    def robust_numbers(self, model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of F_R alone; an arm that joins the models of others takes them from the run that trained F_R."""
        if "robust" not in self.entry:
            return numbers(self.report(model, "robust", settings))
        trained = self.finished(self.entry["robust"])
        return {name: trained[name] for name in NUMBERS if name in trained}

    def trained_model(self) -> nn.Module:
        model = AutoModelForImageClassification.from_pretrained(self.folder / "model")
        return model.to(self.args.device, memory_format=torch.channels_last)

    def attack_settings(self) -> dict[str, Any]:
        """What `evaluate_robustness` is to attack with."""
        asked = {**self.study["evaluation"], **self.entry.get("evaluation", {})}
        chosen = {name: value for name, value in asked.items() if name != "alphas"}
        return {"eps": float(self.args.eps), "norm": self.args.norm, "seed": 0, **chosen}

    def report(self, model: nn.Module, name: str, settings: dict[str, Any]) -> RobustnessReport:
        """Evaluate on the test images, and keep the whole report beside the run."""
        return evaluate_robustness(
            model,
            self.data.test,
            level=UNION,
            progress=False,
            dataset_name=self.data.name,
            check_names=False,
            path=self.folder / f"{name}.json",
            resume_dir=self.folder / f"measurements-{name}",
            **settings,
        )


def numbers(report: RobustnessReport) -> dict[str, Any]:
    """What the study's table shows of a report.

    Raises:
        RuntimeError: A measurement is missing, or counts images as wrong because something broke.
    """
    if report.failures:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in report.failures.items()))
    metrics = report.metrics
    ra_pgd = next(value for name, value in metrics.items() if name.startswith("ra_pgd"))
    return {
        "sa": metrics["sa"],
        "ra": metrics["ra_worst_case"],
        "ra_pgd": ra_pgd,
        "expert_load": metrics.get("expert_load", {}).get("clean"),
        "route_flip_rate": metrics.get("route_flip_rate"),
        "num_images": report.dataset["num_images"],
        "environment": report.environment,
        "union": report.threat["attacks"]["worst_case"],
    }


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit("usage: run.py STUDY.json ARM SEED FOLDER")
    study, arm, seed, folder = sys.argv[1:]
    run = StudyRun(read_json(Path(study)), arm, int(seed), Path(folder))
    result = {"arm": arm, "seed": int(seed), "training": run.train()}
    write_json(Path(folder) / "run.json", result | run.evaluate())


if __name__ == "__main__":
    main()
