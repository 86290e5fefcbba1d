"""Join the models of two runs of training/run.py into a dual model, with the dial in the weights or in the outputs.

python training/benchmarks/study/join_runs.py outputs/standard outputs/robust FOLDER --num_images 49000
python training/benchmarks/study/join_runs.py outputs/standard outputs/robust FOLDER --num_images 49000 --mixing probs

A dial in the weights needs two models of one shape that started from one model. What the runs' settings.json tell of
the trainings goes into FOLDER/results.json: `training/evaluate.py --model FOLDER` takes it over, measures and writes
the card. Nothing is measured here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.evaluation.report import RobustnessReport

SHARED = ("method", "training_attack", "lr_scheduler_type", "optim", "weight_decay", "per_device_train_batch_size")
OWN = ("num_train_epochs", "learning_rate")


def settings_of(run: Path) -> dict[str, dict[str, Any]]:
    """The settings that a run has written.

    Raises:
        ValueError: The folder is none of a finished run.
    """
    if not (run / "settings.json").is_file() or not (run / "model").is_dir():
        raise ValueError(f"{run} has no settings.json and model/; expected the output_dir of a finished run.")
    return json.loads((run / "settings.json").read_text(encoding="utf-8"))


def describe(standard: Path, robust: Path, num_images: int) -> dict[str, Any]:
    """What is known of the trainings of F_S and F_R, and of the model that both started from.

    Raises:
        ValueError: One of the runs is not whole, or they started from different models.
    """
    runs = {"standard": settings_of(standard), "robust": settings_of(robust)}
    starts = {settings["model"]["init_experts_from"] for settings in runs.values()}
    if len(starts) != 1:
        raise ValueError(f"the runs started from different models: {', '.join(sorted(map(str, starts)))}.")
    start = starts.pop()
    if start is not None:
        runs = {"start": settings_of(Path(start).parent), **runs}
    trainings = {name: settings["training"] for name, settings in runs.items()}
    told = {name: trainings["robust"][name] for name in SHARED}
    told |= {"eps": trainings["robust"]["eps"], "standard_eps": trainings["standard"]["eps"]}
    told |= {f"{part}_{name}": training[name] for part, training in trainings.items() for name in OWN}
    return {**told, "num_images": num_images, "selected_on": "nothing: the weights are those of the last step"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("standard", type=Path, help="output_dir of the run that trained F_S.")
    parser.add_argument("robust", type=Path, help="output_dir of the run that trained F_R.")
    parser.add_argument("folder", type=Path, help="Where to write the dual model.")
    parser.add_argument("--num_images", type=int, required=True, help="Training images of both, for the card.")
    parser.add_argument("--mixing", choices=("weights", "probs"), default="weights", help="What the dial mixes.")
    parser.add_argument("--alpha", type=float, default=0.5, help="Dial until evaluate.py --write_alpha sets it.")
    args = parser.parse_args(arguments)
    try:
        training = describe(args.standard, args.robust, args.num_images)
        parts = [
            AutoModelForImageClassification.from_pretrained(run / "model") for run in (args.standard, args.robust)
        ]
        model = DualMoEForImageClassification.from_models(*parts, alpha=args.alpha, mixing=args.mixing)
    except ValueError as error:
        sys.exit(f"join_runs.py: error: {error}")
    model.save_pretrained(args.folder)
    seeds = {"training": settings_of(args.robust)["training"]["seed"]}
    RobustnessReport(model={}, dataset={}, threat={}, training=training, seeds=seeds).save(
        args.folder / "results.json"
    )
    print(f"Saved to {args.folder}: measure it with training/evaluate.py --model {args.folder}")


if __name__ == "__main__":
    main()
