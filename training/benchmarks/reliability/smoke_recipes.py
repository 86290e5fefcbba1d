"""Smoke test of the full-scale recipes, killed once and resumed, and a count of what they compute.

python training/benchmarks/reliability/smoke_recipes.py --cifar10 path/to/cifar10 --tinyimagenet path/to/tiny-imagenet
python training/benchmarks/reliability/smoke_recipes.py --recipes paper --steps 50

Each recipe trains at its full architecture for 200 optimizer steps on tiny batches with one attack step. Halfway the
process is killed; the same command must go on from the last checkpoint, end at the last step with finite losses and
leave a model that loads. The learning rate goes down with the batch size, as a batch of two cannot take that of 128.

The arithmetic is that of the recipe as it stands (its own attack, epochs and evaluations), counted on one image. Hours
cannot be told from it: small networks keep a GPU waiting. How long a run takes is measured before it by
`run.py --estimate_time`.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageClassification, set_seed

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.attacks import PGD
from hf_dualmoe.data import DataSplits, to_unit_range
from hf_dualmoe.evaluation.environment import describe_environment
from hf_dualmoe.models.inputs_dualmoe import trusted_values
from hf_dualmoe.trainer import RobustTrainer
from hf_dualmoe.trainer.checkpoints import list_checkpoints
from training.benchmarks.shared.recipes import FlopCounter, as_options, count_parameters, forward_flops, parse_recipe
from training.benchmarks.shared.render import markdown_table
from training.benchmarks.shared.run import create_parser, require_positive
from training.benchmarks.shared.store import RESULTS, TRAINING, read_json, write_json
from training.run import RECIPES, create_model, load_data

RUN = TRAINING / "run.py"
FULL_SCALE = (
    "paper",
    "cifar10_resnet18",
    "cifar10_resnet18_warm",
    "cifar10_resnet18_single",
    "tinyimagenet_vit_small",
    "tinyimagenet_vit_small_64px",
)
TRAIN_IMAGES = {"uoft-cs/cifar10": 50_000, "zh-plus/tiny-imagenet": 100_000}  # before validation images are held out
FEW = {"max_train_samples": 1000, "max_validation_samples": 8, "max_test_samples": 8}
FROM_SCRATCH = {"pretrained": False, "init_experts_from": ""}  # whatever the recipe starts from


class SmokeError(RuntimeError):
    """A recipe did not do what it should."""


# --- cost ------------------------------------------------------------------------------------------------------------


def count_flops(recipe: str, data: DataSplits, **overrides: Any) -> dict[str, float]:
    """Floating-point operations per image of a training step, an evaluation and an answer, with the recipe's attacks.

    Args:
        recipe: Name or file of a recipe.
        data: Any images of its dataset; one is used.
        overrides: Settings to change.
    """
    # float32 and attention in its plain form: torch's formulas know neither CPU kernel of autocast attention
    _, model_args, args, _ = parse_recipe(recipe, **{**FROM_SCRATCH, "bf16": False, **overrides})
    set_seed(args.seed)
    model = create_model(model_args, args, data)
    trainer = RobustTrainer(model, args, train_dataset=data.train, eval_dataset=data.validation)
    trainer.state.global_step = 1  # the first step of a training also logs, which costs a forward
    model.to(args.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    image = to_unit_range(data.train.images[:1]).to(args.device)
    batch = {"pixel_values": image, "labels": data.train.labels[:1].to(args.device)}
    # trusted: an attack compares folded with plain weights on a few images, which is nothing in a whole batch
    with sdpa_kernel(SDPBackend.MATH), trusted_values():
        for classifier in (model, getattr(model, "robust", model)):  # trials on a model's first attack are made once
            PGD(steps=2)(classifier, image, batch["labels"])
        model.train()
        with FlopCounter() as training:
            trainer.compute_loss(model, batch).backward()
        model.eval()
        with FlopCounter() as evaluation:
            trainer.prediction_step(model, batch, prediction_loss_only=False)
        counts = {"train": training.total, "evaluation": evaluation.total, "answer": forward_flops(model, image)}
    return counts | {"parameters": count_parameters(model)}


def cost_of(recipe: str, data: DataSplits) -> dict[str, Any]:
    """What the whole training by a recipe computes."""
    data_args, _, args, _ = parse_recipe(recipe)
    counts = count_flops(recipe, data)
    held_out = round(TRAIN_IMAGES[data_args.dataset_name] * data_args.validation_fraction)
    images = TRAIN_IMAGES[data_args.dataset_name] - held_out
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = math.ceil(math.ceil(images / batch) * args.num_train_epochs)
    total = counts["train"] * images * args.num_train_epochs
    total += counts["evaluation"] * held_out * (steps // int(args.eval_steps))
    return {
        "parameters": counts["parameters"],
        **{f"{name}_gflops": counts[name] / 1e9 for name in ("answer", "train", "evaluation")},
        "epochs": args.num_train_epochs,
        "train_images": images,
        "steps": steps,
        "total_pflops": total / 1e15,
    }


# --- smoke test ------------------------------------------------------------------------------------------------------


def smoke_settings(recipe: str, steps: int, batch_size: int) -> dict[str, Any]:
    """What a smoke test changes: size of the work and the first weights, nothing of the model or the objective."""
    _, model_args, args, _ = parse_recipe(recipe)
    every = max(1, steps // 5)
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": args.learning_rate * batch_size / args.per_device_train_batch_size,
        "attack_steps": 1,
        "eval_attack_steps": min(1, args.eval_attack_steps),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "logging_steps": max(1, steps // 20),
        "report": "none",
        "disable_tqdm": True,
        **FEW,
        **{name: value for name, value in FROM_SCRATCH.items() if getattr(model_args, name)},
    }


def run_until(command: list[str], log: Path, lines_wanted: int | None) -> tuple[int, int | None]:
    """Run a training, and kill it without warning once it has logged so many times.

    Returns:
        How often it logged, and its exit status; None where it was killed.
    """
    lines = 0
    pipes = {"stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}, "encoding": "utf-8"}
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stderr=file, **pipes)
        try:
            for line in process.stdout:
                file.write(line)
                lines += "'loss'" in line
                if lines_wanted is not None and lines >= lines_wanted:
                    return lines, None
            return lines, process.wait()
        finally:
            process.kill()
            process.wait()


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of most steps; a SmokeError where there is none."""
    if not (found := list_checkpoints(folder)):
        raise SmokeError(f"no checkpoint in {folder}; see log.txt there")
    return found[max(found)]


def smoke(recipe: str, folder: Path, settings: dict[str, Any], test_images: torch.Tensor) -> dict[str, Any]:
    """Train, kill halfway, go on, check.

    Args:
        recipe: Name or file of a recipe.
        folder: Where to train; the log is left there, weights and checkpoints are deleted at the end.
        settings: From `smoke_settings`, with `dataset_name`.
        test_images: (N, C, H, W) uint8; the saved model must classify them.

    Raises:
        SmokeError: The training failed, did not resume, or its losses or logits are not finite.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps, every = settings["max_steps"], settings["logging_steps"]
    command = [sys.executable, str(RUN), "--recipe", recipe, "--output_dir", str(folder), *as_options(settings)]
    started = time.perf_counter()
    try:
        lines, status = run_until(command, folder / "log.txt", lines_wanted=math.ceil(steps / 2 / every))
        if status is not None:
            raise SmokeError(f"stopped by itself with status {status} after {lines * every} steps")
        resumed_from = int(last_checkpoint(folder).name.split("-")[1])
        resumed_lines, status = run_until(command, folder / "log.txt", lines_wanted=None)
        seconds = time.perf_counter() - started
        if status != 0:
            raise SmokeError(f"exit status {status} after the interruption")
        if resumed_lines != steps // every - resumed_from // every:
            raise SmokeError(f"logged {resumed_lines} times after step {resumed_from}: it did not go on from there")
        losses = checked_losses(folder, steps, steps // every)
        check_model(folder / "model", test_images)
    finally:
        for path in (*folder.glob("checkpoint-*"), folder / "unfinished", folder / "model"):
            shutil.rmtree(path, ignore_errors=True)
    told = {"steps": steps, "killed_after_step": lines * every, "resumed_from_step": resumed_from}
    return {**told, "seconds": round(seconds, 1), "loss_first": losses[0], "loss_last": losses[-1]}


def checked_losses(folder: Path, steps: int, count: int) -> list[float]:
    """The logged losses of a finished training; a SmokeError where it ended early, or one is missing or not finite."""
    state = read_json(last_checkpoint(folder) / "trainer_state.json")
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    if state["global_step"] != steps or len(losses) != count:
        raise SmokeError(f"ended at step {state['global_step']} of {steps} with {len(losses)} logged losses")
    if not all(math.isfinite(loss) for loss in losses):
        raise SmokeError(f"losses {losses}")
    return losses


def check_model(folder: Path, images: torch.Tensor) -> None:
    """Raise a SmokeError unless the saved model classifies these images (N, C, H, W), uint8."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        if not torch.isfinite(model(to_unit_range(images)).logits).all():
            raise SmokeError("the saved model gives logits that are not finite")


# --- results ---------------------------------------------------------------------------------------------------------


def measure(recipe: str, args: argparse.Namespace) -> dict[str, Any]:
    """Cost and smoke test of one recipe."""
    hub_name = parse_recipe(recipe)[0].dataset_name
    local = {"uoft-cs/cifar10": args.cifar10, "zh-plus/tiny-imagenet": args.tinyimagenet}[hub_name]
    small, model_args, run_args, _ = parse_recipe(recipe, dataset_name=local or hub_name, **FEW)
    data = load_data(small, model_args.image_size, model_args.num_channels, run_args.seed)
    cost, settings = cost_of(recipe, data), smoke_settings(recipe, args.steps, args.batch_size)
    found = smoke(recipe, args.output_dir / recipe, settings | {"dataset_name": small.dataset_name}, data.test.images)
    print(f"{recipe}: {cost['total_pflops']:,.0f} PFLOP; passed, {found}", flush=True)
    own = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    result = {"recipe": recipe, "recipe_settings": own, "cost": cost, "environment": describe_environment()}
    return result | {"settings": settings, "smoke": found}


def save(result: dict[str, Any], path: Path) -> None:
    """Put a result into the file, in the place of that recipe's."""
    recipes = read_json(path)["recipes"] if path.is_file() else {}
    recipes[result["recipe"]] = result
    write_json(path, {"recipes": {name: recipes[name] for name in FULL_SCALE if name in recipes}})


COSTS = ["recipe", "parameters", "GFLOP per answer", "GFLOP per training image", "epochs", "PFLOP"]
SMOKE = ["recipe", "steps", "killed after", "went on from", "seconds", "first loss", "last loss"]


def render(results: dict[str, Any]) -> str:
    """The table of costs and that of the smoke tests, in Markdown."""
    rows, smokes = [], []
    for name, result in results["recipes"].items():
        cost = result["cost"]
        numbers = (f"{cost['parameters'] / 1e6:.1f} M", f"{cost['answer_gflops']:.2f}", f"{cost['train_gflops']:.0f}")
        rows.append([name, *numbers, f"{cost['epochs']:g}", f"{cost['total_pflops']:,.0f}"])
        if test := result.get("smoke"):
            done = [str(test[key]) for key in ("steps", "killed_after_step", "resumed_from_step", "seconds")]
            smokes.append([name, *done, f"{test['loss_first']:.3f}", f"{test['loss_last']:.3f}"])
    return "\n\n".join([markdown_table(COSTS, rows)] + [markdown_table(SMOKE, smokes)] * bool(smokes))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", default=FULL_SCALE, choices=FULL_SCALE, help="default: all full-scale recipes")
    add("--cifar10", help="local copy of CIFAR-10 (see --dataset_name of run.py); default: the Hub")
    add("--tinyimagenet", help="local copy of TinyImageNet; default: the Hub")
    add("--steps", type=int, default=200, help="optimizer steps, at least 10")
    add("--batch_size", type=int, default=2, help="images per step")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--output_dir", type=Path, default=Path("outputs/smoke_recipes"), help="for logs and, meanwhile, checkpoints")
    add("--output", type=Path, default=RESULTS / "smoke_recipes.json", help="results file; other recipes in it stay")
    args = parser.parse_args(arguments)
    require_positive(parser, args, "batch_size", "threads")
    if args.steps < 10:
        parser.error(f"steps={args.steps!r} must be at least 10.")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    failed = False
    for recipe in args.recipes:
        try:
            save(measure(recipe, args), args.output)
        except SmokeError as error:
            failed = True
            print(f"{recipe}: FAILED, {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
