"""ResNet18 at full width on all of CIFAR-10 in twelve minutes of one GPU: train, evaluate, bring the weights home.

    python training/benchmarks/full_scale/full_scale.py --dataset_name .gpu_data/cifar10 --minutes 12
    python training/benchmarks/full_scale/full_scale.py --join      # the weights that came home -> models that load
    python training/benchmarks/full_scale/full_scale.py --rehearse  # the same lines on a CPU, on digits

Trained are one network; from it F_S (half of eps), RT-ER with four heads, and the dual model by JTDMoE. Each stage
gets a share of the minutes; a measured step says how many steps that is. Then models are judged in order of interest:
AutoAttack of the one network first. Dials are chosen on images held out of train; test images decide nothing.

The script stops when the minutes are over, or is killed; the same command goes on from the last checkpoint and the
last measurement. `results.json` is written as it goes. Weights go into parts that are small enough to be carried
singly. The data are a dataset in parquet files. While only some of the shards of train are there, these are trained
on: end such a session with --stop_after, bring the other shards, and call again.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from hf_dualmoe.cli.arguments import ModelArguments
from hf_dualmoe.evaluation import choose_alpha, evaluate_robustness, sweep_alpha
from hf_dualmoe.evaluation.dial import dial_attack
from hf_dualmoe.evaluation.environment import describe_environment
from hf_dualmoe.trainer import RobustTrainer, RobustTrainingArguments, last_good_checkpoint
from hf_dualmoe.trainer.time_estimate import ACCELERATOR_EFFORT, CPU_EFFORT, measure
from training.benchmarks.full_scale import plan
from training.benchmarks.full_scale.plan import EVALUATIONS, PAIRS, STAGES, Scale, Stage
from training.benchmarks.full_scale.weights import join_parts, save_whole, write_parts
from training.benchmarks.shared.render import markdown_table
from training.benchmarks.shared.run import Clock, OutOfTime, create_parser, require_positive
from training.benchmarks.shared.store import begin, read_json, write_json

START_UP = 5.0  # seconds of a stage that are no steps: measuring, capturing, saving
LAST_CALL = 10.0  # seconds before the end of a session at which a training writes a checkpoint and stops


# --- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """All stages and evaluations, with what is known of them in `results`.

    Args:
        args: Of the command line.
        results: Of an earlier session, or a new one.
        clock: Of this session.
    """

    def __init__(self, args: argparse.Namespace, results: dict[str, Any], clock: Clock):
        self.args, self.results, self.clock = args, results, clock
        self.scale = plan.REHEARSAL if args.rehearse else Scale()
        self.device = "cuda" if torch.cuda.is_available() and not args.rehearse else "cpu"
        self.data = plan.load_data(args.dataset_name)
        there, total = plan.shards_there(args.dataset_name)
        results["data"] = {"name": self.data.name, "train_shards": [there, total]}
        results["data"] |= {role: len(getattr(self.data, role)) for role in ("train", "validation", "test")}
        self.whole = len(self.data.train) * total / there  # images of train once all shards are there
        self.write()

    def write(self) -> None:
        """Bring results.json up to date."""
        write_results(self.args, self.results)

    def all(self) -> None:
        """Whatever is not done yet."""
        for name, stage in STAGES.items():
            if not self.results["stages"].get(name, {}).get("done"):
                self.tell(f"training {name}")
                self.train(name, stage)
            if name in plan.WEIGHTS and not self.is_home(name):
                self.bring_home(name)
        for name, part in EVALUATIONS:
            if part not in self.results["evaluations"].get(name, {}).get("parts", []):
                self.tell(f"evaluating {name}: {part}")
                self.evaluate(name, part)
        found = {name: told["parts"] for name, told in self.results["evaluations"].items()}
        missing = [f"{name}: {part}" for name, part in EVALUATIONS if part not in found[name]]
        self.results["done"] = not missing
        if missing:
            self.tell(f"failed; the same command tries again: {', '.join(missing)}")

    def tell(self, text: str) -> None:
        """A line for the terminal."""
        print(f"[{self.clock.left():4.0f} s left] {text}", flush=True)

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, name: str, stage: Stage) -> None:
        """Train one stage to its end, from its last checkpoint where there is one.

        Raises:
            OutOfTime: The session ends before the stage does.
        """
        folder = self.args.work_dir / name
        told = self.results["stages"].setdefault(name, {"trained_on": [], "seconds": 0.0})
        if "steps" not in told:
            told |= self.plan(name, stage)
        told["trained_on"].append(len(self.data.train))
        self.write()
        started = time.perf_counter()
        trainer = self.trainer(name, stage, told["steps"])
        checkpoint = last_good_checkpoint(folder)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            told["seconds"] = round(told["seconds"] + time.perf_counter() - started, 1)
        if trainer.state.global_step < told["steps"]:
            raise OutOfTime
        save_whole(trainer.model.eval(), folder / "model")
        validation = trainer.state.best_metric
        told |= {"done": True, "best_validation": validation, "log": trainer.state.log_history[-2:]}
        self.write()

    def plan(self, name: str, stage: Stage) -> dict[str, Any]:
        """How many steps fit into the stage's share of the minutes, by a measured step and evaluation."""
        effort = CPU_EFFORT if self.device == "cpu" else ACCELERATOR_EFFORT
        step, evaluation, no_graph = measure(self.trainer(name, stage, steps=1000), effort, "auto")
        seconds = 60 * self.args.minutes * stage.share - START_UP - (self.scale.reviews + 2) * evaluation
        most = math.ceil(stage.max_epochs * self.whole / self.scale.batch)
        steps = min(most, int(seconds / step), self.scale.most_steps or most)
        steps = max(steps, self.scale.reviews)
        epochs = round(steps * self.scale.batch / len(self.data.train), 2)
        told = {"steps": steps, "epochs": epochs, "step_ms": 1e3 * step, "evaluation_s": evaluation}
        return {**told, "no_step_graph": no_graph}

    def trainer(self, name: str, stage: Stage, steps: int) -> RobustTrainer:
        """The trainer of a stage with an untrained or warm model."""
        every, scale = max(1, math.ceil(steps / self.scale.reviews)), self.scale
        settings = {
            **plan.COMMON,
            **stage.settings,
            "learning_rate": scale.peak_rate * stage.rate,
            "ema_decay": scale.ema_decay,
            "bf16": self.device != "cpu",
            "max_steps": steps,
            "eval_steps": every,
            "save_steps": every,
            "logging_steps": every,
            "per_device_train_batch_size": scale.batch,
            "per_device_eval_batch_size": 2 * scale.batch,
            "seed": self.args.seed,
            "output_dir": str(self.args.work_dir / name),
        }
        set_seed(self.args.seed)
        args, data = RobustTrainingArguments(**settings), self.data
        trainer = RobustTrainer(self.create(stage), args, train_dataset=data.train, eval_dataset=data.validation)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StopInTime(self.clock))
        return trainer

    def create(self, stage: Stage) -> MoEForImageClassification | DualMoEForImageClassification:
        """The model of a stage before its training."""
        arguments = {"num_experts": 1, **stage.model, "width": self.scale.width}
        config = ModelArguments(backbone="resnet18", stem="cifar", **arguments).moe_config(self.data)
        pixels = self.results.setdefault("pixels", {"mean": config.image_mean, "std": config.image_std})
        config.image_mean, config.image_std = pixels["mean"], pixels["std"]  # those of the first session

        def create() -> MoEForImageClassification:
            if stage.start is None:
                return MoEForImageClassification(copy.deepcopy(config))
            source = self.args.work_dir / stage.start / "model"
            return MoEForImageClassification.from_backbone(copy.deepcopy(config), init_experts_from=source)

        if stage.settings["method"] != "jtdmoe":
            return create()
        return DualMoEForImageClassification.from_models(create(), create(), stage.settings["train_alpha"])

    # --- evaluation --------------------------------------------------------------------------------------------------

    def trained(self, name: str) -> nn.Module:
        """A trained model, on the device and at its chosen position of the dial; pairs join F_S and the network."""
        if name in PAIRS:
            parts = [self.trained(part) for part in ("standard", "single")]
            model = DualMoEForImageClassification.from_models(*parts, mixing=PAIRS[name])
        else:
            model = AutoModelForImageClassification.from_pretrained(self.args.work_dir / name / "model")
        model = model.to(self.device, memory_format=torch.channels_last).eval()
        if hasattr(model, "set_alpha"):
            model.set_alpha(self.choose(name, model))
        return model

    def choose(self, name: str, model: DualMoEForImageClassification) -> float:
        """The position of the dial, chosen once, on held-out images."""
        if name not in self.results["dials"]:
            count = min(self.scale.dial_images, len(self.data.validation))
            attack, images = dial_attack(self.data.num_labels, eps=plan.EPS), self.data.validation.take(count)
            sweep = sweep_alpha(model, images, attack=attack, alphas=self.scale.alphas, progress=False)
            self.results["dials"][name] = {**asdict(choose_alpha(sweep)), "images": count, "sweep": sweep}
            self.write()
        return self.results["dials"][name]["alpha"]

    def evaluate(self, name: str, part: str) -> None:
        """SA, PGD and one more judge; what was measured in an earlier session is not measured again."""
        model, folder = self.trained(name), self.args.work_dir / "evaluations" / name
        report = evaluate_robustness(
            model,
            self.data.test,
            eps=plan.EPS,
            batch_size=500,
            dataset_name=self.data.name,
            progress=False,
            level=["components", part],
            num_images=min(self.scale.test_images, len(self.data.test)),
            worst_case_steps=self.scale.union_steps,
            autoattack_version=self.scale.autoattack,
            resume_dir=folder,
        )
        empty = {"parts": [], "metrics": {}, "sanity": {}, "attacks": {}, "failures": {}}
        told = self.results["evaluations"].setdefault(name, empty)
        told["metrics"] |= report.metrics
        told["attacks"] |= report.threat["attacks"]
        told["sanity"] |= report.sanity
        told["images"] = report.dataset["num_images"]
        told["failures"].pop(part, None)
        if report.failures:
            told["failures"][part] = report.failures
        if plan.NUMBER_OF[part] in report.metrics:  # with failures, it counts the images that failed as wrong
            told["parts"].append(part)
        self.write()

    # --- weights -----------------------------------------------------------------------------------------------------

    def is_home(self, name: str) -> bool:
        """Whether all parts of the weights are in the output folder, which may be emptied between sessions."""
        files = self.results["weights"].get(name, {}).get("files", [])
        return bool(files) and all((self.args.output_dir / file).is_file() for file in files)

    def bring_home(self, name: str) -> None:
        """Write the weights in half precision, in parts, and note the configuration to load them with."""
        model = AutoModelForImageClassification.from_pretrained(self.args.work_dir / name / "model")
        files = write_parts(model.half(), name, self.args.output_dir)
        config = json.loads(model.config.to_json_string(use_diff=False))
        self.results["weights"][name] = {"files": files, "config": config}
        self.write()


class StopInTime(TrainerCallback):
    """Writes a checkpoint and ends the training shortly before the session ends."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Look at the clock."""
        if self.clock.left() < LAST_CALL and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


# --- command line ----------------------------------------------------------------------------------------------------


def write_results(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write results.json into the work folder, which sessions share, and the output folder, which may be emptied."""
    for folder in {args.work_dir, args.output_dir}:
        write_json(folder / "results.json", results)


def open_results(args: argparse.Namespace) -> dict[str, Any]:
    """The results of the sessions before, or new ones, with an entry for this session.

    Raises:
        ValueError: They were made with other settings, and `--fresh` does not say to start over; or that would delete
            a folder which is no work folder of this script.
    """
    if args.fresh and args.work_dir.exists():
        kept = args.work_dir / "results.json"
        if not (kept.is_file() and "sessions" in read_json(kept)) and any(args.work_dir.iterdir()):
            raise ValueError(f"work_dir={str(args.work_dir)!r} holds other files, which --fresh would delete.")
        shutil.rmtree(args.work_dir)
    results = begin(args.work_dir / "results.json", {"settings": {"seed": args.seed, "rehearse": args.rehearse}})
    empty = {name: {} for name in ("data", "stages", "dials", "evaluations", "weights")}
    results = {"done": False, "sessions": [], **empty, **results}
    environment = describe_environment("cuda" if torch.cuda.is_available() and not args.rehearse else "cpu")
    results["sessions"].append({"minutes": args.minutes, "stop_after": args.stop_after, "environment": environment})
    return results


def render(results: dict[str, Any]) -> str:
    """SA and RA of each model in Markdown, with the time that its training took."""
    columns, rows = ("sa", "ra_pgd20", "ra_adaptive_union", "ra_autoattack"), []
    for name, told in results["evaluations"].items():
        numbers = (told["metrics"].get(key) for key in columns)
        alpha, stage = results["dials"].get(name, {}).get("alpha"), results["stages"].get(name, {})
        cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
        rows.append([name, *cells, "-" if alpha is None else f"{alpha:g}", f"{stage.get('seconds', '-')}"])
    return markdown_table(["model", "SA %", "PGD-20 %", "union %", "AutoAttack %", "alpha", "seconds"], rows)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=12.0, help="for everything; a stage that has begun keeps its number of steps")
    add("--stop_after", type=float, help="minutes after which this session ends; default: MINUTES")
    add("--dataset_name", help="folder or id in the Hub's parquet layout; default: uoft-cs/cifar10")
    add("--output_dir", type=Path, default=Path("outputs/full_scale"), help="results.json and parts of the weights")
    add("--work_dir", type=Path, help="checkpoints, kept between sessions; default: OUTPUT_DIR/work")
    add("--seed", type=int, default=0)
    add("--fresh", action="store_true", help="start over; the work folder is deleted")
    add("--rehearse", action="store_true", help="tiny, on a CPU; the numbers mean nothing")
    add("--join", action="store_true", help="train nothing: make models that load of the parts in OUTPUT_DIR")
    args = parser.parse_args(arguments)
    args.stop_after = args.minutes if args.stop_after is None else args.stop_after
    require_positive(parser, args, "minutes", "stop_after")
    if not (args.rehearse or args.join or torch.cuda.is_available()):
        parser.error("there is no CUDA GPU here; --rehearse runs the same lines, tiny, on a CPU.")
    args.dataset_name = args.dataset_name or ("digits" if args.rehearse else "uoft-cs/cifar10")
    args.work_dir = args.work_dir or args.output_dir / "work"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    if args.join:
        print("\n".join(map(str, join_parts(args.output_dir))))
        return 0
    clock, started = Clock(60 * args.stop_after), time.perf_counter()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # evaluations are in float32
    logging.disable_progress_bar()
    try:
        results = open_results(args)
    except ValueError as error:
        sys.exit(f"full_scale.py: error: {error}")
    try:
        with clock.limit():
            Run(args, results, clock).all()
    except OutOfTime:
        print("The minutes are over; the same command goes on.", flush=True)
    finally:
        results["sessions"][-1]["seconds"] = round(time.perf_counter() - started, 1)
        write_results(args, results)
    print(render(results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
