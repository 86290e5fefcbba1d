"""Smoke test of the full-scale recipes, killed once and resumed, and a count of what they compute.

python training/benchmarks/reliability/smoke_recipes.py --cifar10 path/to/cifar10 --tinyimagenet path/to/tiny-imagenet
python training/benchmarks/reliability/smoke_recipes.py --recipes paper --steps 50
python training/benchmarks/reliability/smoke_recipes.py --recipes cifar10_resnet18 --estimate   # trains nothing
python training/benchmarks/reliability/smoke_recipes.py --render   # results into the tables and the recipes' comments

Each recipe trains at its full architecture for 200 optimizer steps on tiny batches with one attack step. Halfway the
process is killed; the same command must go on from the last checkpoint, end at the last step with finite losses and
leave a model that loads. The learning rate goes down with the batch size, as a batch of two cannot take that of 128.

The arithmetic is that of the recipe as it stands (its own attack, epochs and evaluations), counted on one image. Hours
cannot be told from it: small networks keep a GPU waiting. The comments of the recipes have the time of a step where
speed_gpu.py has measured it; how long a run takes is measured before it by `run.py --estimate_time`.
"""

import argparse
import json
import math
import os
import re
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

from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.data.datasets import DataSplits, to_unit_range
from hf_dualmoe.evaluation.environment import describe_environment, write_text
from hf_dualmoe.trainer.trainer import RobustTrainer
from training.benchmarks.shared.tables import RESULTS, markdown_table, replace_section
from training.benchmarks.speed.gpu_sizes import CASES
from training.benchmarks.study.run import FlopCounter, count_parameters, forward_flops, training

RUN = Path(__file__).parents[2] / "run.py"
RECIPES = Path(__file__).parents[2] / "recipes"
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
TIME_LINE = "# Time: "


class SmokeError(RuntimeError):
    """A recipe did not do what it should."""


# --- cost ------------------------------------------------------------------------------------------------------------


def parse_recipe(recipe: str, dataset_name: str | None = None, **overrides: Any) -> tuple:
    """The argument objects of `training/run.py` for a recipe with overrides."""
    parser = training.RecipeParser(RECIPES, description="")
    if dataset_name is not None:
        overrides["dataset_name"] = dataset_name
    return parser.parse(["--recipe", recipe, *as_options(overrides)])


def as_options(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


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
    model = training.create_model(model_args, args, data)
    trainer = RobustTrainer(model, args, train_dataset=data.train, eval_dataset=data.validation)
    trainer.state.global_step = 1  # the first step of a training also logs, which costs a forward
    model.to(args.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    image = to_unit_range(data.train.images[:1]).to(args.device)
    batch = {"pixel_values": image, "labels": data.train.labels[:1].to(args.device)}
    counts = {}
    with sdpa_kernel(SDPBackend.MATH):
        for classifier in (model, getattr(model, "robust", model)):  # trials on a model's first attack are made once
            PGD(steps=2)(classifier, image, batch["labels"])
        model.train()
        with FlopCounter() as counter:
            trainer.compute_loss(model, batch).backward()
        counts["train"] = counter.total
        model.eval()
        with FlopCounter() as counter:
            trainer.prediction_step(model, batch, prediction_loss_only=False)
        counts["evaluation"] = counter.total
        counts["answer"] = forward_flops(model, image)
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
        "answer_gflops": counts["answer"] / 1e9,
        "train_gflops": counts["train"] / 1e9,
        "evaluation_gflops": counts["evaluation"] / 1e9,
        "epochs": args.num_train_epochs,
        "train_images": images,
        "steps": steps,
        "total_pflops": total / 1e15,
    }


def step_time(recipe: str) -> str:
    """What is known of a recipe's time: a step as speed_gpu.py has measured it, with the step graph where it has."""
    advice = "run with --estimate_time"
    _, _, args, _ = parse_recipe(recipe)
    batch = args.per_device_train_batch_size
    same = [n for n, case in CASES.items() if (case.recipe, case.batch, case.settings) == (recipe, batch, {})]
    for file, kind, how in (("speed_gpu", "graph", "with"), ("speed_gpu_before", "eager", "without")):
        path = RESULTS / f"{file}.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"units": {}}
        if same and (found := results["units"].get(f"{kind} {same[0]}")):
            hardware = results["environment"]["hardware"]
            step = f"{found['ms']:.0f} ms per step of {batch} images {how} the step graph"
            return f"{step}, measured on one {hardware}; for the whole run and your hardware: {advice}."
    return f"not measured; {advice}."


# --- smoke test ------------------------------------------------------------------------------------------------------


def smoke_settings(recipe: str, steps: int, batch_size: int, pretrained: bool) -> dict[str, Any]:
    """What a smoke test changes: size of the work, nothing of the model or the objective."""
    _, model_args, args, _ = parse_recipe(recipe)
    every = max(1, steps // 5)
    settings = {
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
    }
    if model_args.pretrained and not pretrained:
        settings["pretrained"] = False
    if model_args.init_experts_from:
        settings["init_experts_from"] = FROM_SCRATCH["init_experts_from"]
    return settings


def run_until(command: list[str], log: Path, lines_wanted: int | None) -> tuple[int, int | None]:
    """Run a training; kill it, without warning, once it has logged so many times.

    Returns:
        How often it logged, and its exit status; None where it was killed.
    """
    lines = 0
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment, encoding="utf-8"
        )
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
    """The checkpoint of most steps.

    Raises:
        SmokeError: There is none.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not found:
        raise SmokeError(f"no checkpoint in {folder}; see log.txt there")
    return found[-1]


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
        state = json.loads((last_checkpoint(folder) / "trainer_state.json").read_text(encoding="utf-8"))
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        if state["global_step"] != steps or len(losses) != steps // every:
            raise SmokeError(f"ended at step {state['global_step']} of {steps} with {len(losses)} logged losses")
        if resumed_lines != steps // every - resumed_from // every:
            raise SmokeError(f"logged {resumed_lines} times after step {resumed_from}: it did not go on from there")
        if not all(math.isfinite(loss) for loss in losses):
            raise SmokeError(f"losses {losses}")
        model = AutoModelForImageClassification.from_pretrained(folder / "model")
        with torch.no_grad():
            if not torch.isfinite(model(to_unit_range(test_images)).logits).all():
                raise SmokeError("the saved model gives logits that are not finite")
    finally:
        remove_weights(folder)
    return {
        "steps": steps,
        "killed_after_step": lines * every,
        "resumed_from_step": resumed_from,
        "seconds": round(seconds, 1),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def remove_weights(folder: Path) -> None:
    """Delete checkpoints and model, which are large; the log stays."""
    for path in (*folder.glob("checkpoint-*"), folder / "unfinished", folder / "model"):
        shutil.rmtree(path, ignore_errors=True)


# --- results ---------------------------------------------------------------------------------------------------------


def measure(recipe: str, args: argparse.Namespace) -> dict[str, Any]:
    """Cost and, unless only that is asked for, smoke test of one recipe."""
    data_args, model_args, _, _ = parse_recipe(recipe)
    dataset = {"uoft-cs/cifar10": args.cifar10, "zh-plus/tiny-imagenet": args.tinyimagenet}[data_args.dataset_name]
    small, model_args, run_args, _ = parse_recipe(recipe, dataset or data_args.dataset_name, **FEW)
    data = training.load_data(small, model_args, run_args.seed)
    result = {
        "recipe": recipe,
        "recipe_settings": yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")),
    }
    known = read_results(args.output)["recipes"].get(recipe, {})
    if args.estimate or known.get("recipe_settings") != result["recipe_settings"]:
        result["cost"] = cost_of(recipe, data)
    else:
        result["cost"] = known["cost"]  # of the same recipe
    print(f"{recipe}: {result['cost']['total_pflops']:,.0f} PFLOP", flush=True)
    if args.estimate:
        return result
    result["environment"] = describe_environment()
    settings = smoke_settings(recipe, args.steps, args.batch_size, args.pretrained)
    settings["dataset_name"] = small.dataset_name
    result["settings"] = {name: value for name, value in settings.items() if name != "dataset_name"}
    result["smoke"] = smoke(recipe, args.output_dir / Path(recipe).stem, settings, data.test.images)
    result["smoke"]["recipe_settings"] = result["recipe_settings"]  # a later estimate may be of a changed recipe
    print(f"{recipe}: passed, {json.dumps(result['smoke'])}", flush=True)
    return result


def read_results(path: Path) -> dict[str, Any]:
    """The results file; without recipes where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"recipes": {}}


def save(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Put a result into the file, in the place of that recipe's; an estimate leaves the smoke test that is there."""
    results = read_results(args.output)
    kept = results["recipes"].get(result["recipe"], {}) if args.estimate else {}
    recipes = results["recipes"] | {result["recipe"]: {**kept, **result}}
    recipes = {name: recipes[name] for name in FULL_SCALE if name in recipes}
    write_text(args.output, json.dumps({"recipes": recipes}, indent=1) + "\n")


HEADER = ["recipe", "parameters", "GFLOP per answer", "GFLOP per training image", "epochs", "PFLOP"]


def render_table(results: dict[str, Any]) -> str:
    """The table of costs and that of the smoke tests, in Markdown."""
    rows, smokes = [], []
    for result in results["recipes"].values():
        cost = result["cost"]
        rows.append([result["recipe"], f"{cost['parameters'] / 1e6:.1f} M", f"{cost['answer_gflops']:.2f}"])
        rows[-1] += [f"{cost['train_gflops']:.0f}", f"{cost['epochs']:g}", f"{cost['total_pflops']:,.0f}"]
        if test := result.get("smoke"):
            done = [str(test[name]) for name in ("steps", "killed_after_step", "resumed_from_step", "seconds")]
            smokes.append([result["recipe"], *done, f"{test['loss_first']:.3f}", f"{test['loss_last']:.3f}"])
    header = ["recipe", "steps", "killed after", "went on from", "seconds", "first loss", "last loss"]
    return "\n\n".join([markdown_table(HEADER, rows)] + [markdown_table(header, smokes)] * bool(smokes))


def render(results: dict[str, Any]) -> None:
    """Put the tables into the README of the recipes, and what is known of its time into the comments of each."""
    for recipe in results["recipes"]:
        path = RECIPES / f"{recipe}.yaml"
        text = with_time(path.read_text(encoding="utf-8"), step_time(recipe))
        path.write_text(text, encoding="utf-8")
    replace_section("smoke_recipes", render_table(results), RECIPES / "README.md")


def with_time(recipe: str, text: str) -> str:
    """A recipe whose last comment before the settings is the time that it takes."""
    line = f"{TIME_LINE}{text}\n"
    if re.search(f"^{TIME_LINE}.*\n", recipe, flags=re.MULTILINE):
        return re.sub(f"^{TIME_LINE}.*\n", lambda _: line, recipe, flags=re.MULTILINE)
    head = re.match(r"(#.*\n)*", recipe).group()
    return head + line + recipe[len(head) :]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipes", nargs="+", default=FULL_SCALE, choices=FULL_SCALE, help="default: all full-scale recipes")
    add("--cifar10", help="local copy of CIFAR-10 (see --dataset_name of run.py); default: the Hub")
    add("--tinyimagenet", help="local copy of TinyImageNet; default: the Hub")
    add("--steps", type=int, default=200, help="optimizer steps, at least 10")
    add("--batch_size", type=int, default=2, help="images per step")
    add("--pretrained", action="store_true", help="start from pretrained weights where the recipe does; downloads")
    add("--estimate", action="store_true", help="only count the operations; no smoke test")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--output_dir", type=Path, default=Path("outputs/smoke_recipes"), help="for logs and, meanwhile, checkpoints")
    add("--output", type=Path, default=RESULTS / "smoke_recipes.json", help="results file; other recipes in it stay")
    add("--render", action="store_true", help="only put the results file into README and recipes")
    args = parser.parse_args(arguments)
    for name, low in (("steps", 10), ("batch_size", 1)):
        if getattr(args, name) < low:
            parser.error(f"{name}={getattr(args, name)!r} must be at least {low}.")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    if args.render:
        render(read_results(args.output))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    failed = []
    for recipe in args.recipes:
        try:
            result = measure(recipe, args)
        except SmokeError as error:
            failed.append(recipe)
            print(f"{recipe}: FAILED, {error}", flush=True)
            continue
        save(result, args)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
