"""Make the model of a study's run fit to be shared: weights with the dial where the study set it, results and card.

    python training/benchmarks/study/card.py outputs/study-cifar10/runs/jtdmoe-seed0 model_cards/cifar10_dual
    python training/benchmarks/study/card.py RUN FOLDER --controls single rt_er

Controls are other arms of the study with the same seed; for a dual model F_R alone is added. Nothing is measured anew:
numbers are those of the run. Of a model that was joined from those of two arms, the trainings of both are told.
"""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

import hf_dualmoe  # noqa: F401 - registers the models
from hf_dualmoe.evaluation import RobustnessReport
from hf_dualmoe.hub import write_model_card
from training.benchmarks.shared.run import create_parser
from training.benchmarks.shared.store import read_json

OF_TRAINING = ("beta", "second_term", "second_attack", "train_alpha", "standard_eps", "eps", "training_attack")
OF_TRAINING += ("crop_padding", "horizontal_flip", "learning_rate", "lr_scheduler_type", "optim", "weight_decay")


def read(path: Path) -> dict[str, Any]:
    """A file of a run.

    Raises:
        ValueError: It is missing: the run is not whole.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected the folder of a finished run.")
    return read_json(path)


def describe_training(run: Path) -> dict[str, Any]:
    """What is known of the training of a run; of a joined model, of the trainings of both parts.

    Raises:
        ValueError: A file of one of the runs is missing.
    """
    trained = read(run / "run.json")["training"]
    told = {name: trained[name] for name in ("steps", "passes", "init_from", "passes_from") if name in trained}
    if trained["method"] != "joined":
        settings = read(run / "settings.json")["training"]
        known = {name: settings[name] for name in OF_TRAINING if name in settings}
        return {"method": trained["method"], **told, **known}
    standard, robust = (describe_training(part_of(run, part)) for part in ("standard", "robust"))
    parts = {f"standard_{name}": value for name, value in standard.items() if robust.get(name) != value}
    return {**robust, **parts, "passes": trained["passes"]}


def part_of(run: Path, part: str) -> Path:
    """The run of the arm that a joined model has its `part` from, "standard" or "robust"."""
    arm, _, seed = run.name.rpartition("-")
    return run.parent / f"{read(run.parents[1] / 'study.json')['arms'][arm][part]}-{seed}"


def describe(run: Path, controls: list[str]) -> RobustnessReport:
    """The report of a run with what the study knows of its training, its dial and its controls.

    Args:
        run: Folder of a finished run, "<arm>-seed<number>".
        controls: Arms to compare with; their runs are beside this one.

    Raises:
        ValueError: A file of one of the runs is missing.
    """
    result, report = read(run / "run.json"), RobustnessReport.load(run / "whole.json")
    report.seeds["training"] = result["seed"]
    report.training = {
        **describe_training(run),
        "num_images": result["images"]["train"],
        "selected_on": "nothing: the weights are those of the last step",
    }
    if "sweep" in result:
        point = next(point for point in result["sweep"] if point["alpha"] == result["alpha"])
        held_out = f"{result['images']['validation']} images held out of train"
        report.alpha_choice = {**point, "rule": result["rule"], "chosen_on": held_out}
        robust = run / "robust.json"  # a joined model has these numbers from the run that trained F_R
        path = robust if robust.is_file() else part_of(run, "robust") / "whole.json"
        report.controls["F_R alone"] = read(path)["metrics"]
    for arm in controls:
        other = run.parent / f"{arm}-seed{result['seed']}"
        passes = read(other / "run.json")["training"]["passes"]
        report.controls[arm] = {"passes": passes, **read(other / "whole.json")["metrics"]}
    return report


def share(run: Path, folder: Path, controls: list[str]) -> None:
    """Write weights, configuration, results.json and card of a run's model into a folder."""
    report = describe(run, controls)
    model = AutoModelForImageClassification.from_pretrained(run / "model")
    if report.alpha_choice:
        model.set_alpha(report.alpha_choice["alpha"])
    model.save_pretrained(folder)
    report.save(folder / "results.json")
    write_model_card(folder, report)


def main(arguments: list[str] | None = None) -> None:
    parser = create_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of study.py")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--controls", nargs="*", default=["single"], help="arms to compare with, of the same seed")
    args = parser.parse_args(arguments)
    try:
        share(args.run, args.folder, args.controls)
    except ValueError as error:
        parser.error(str(error))
    print(f"Saved to {args.folder}: {', '.join(sorted(path.name for path in args.folder.iterdir()))}")


if __name__ == "__main__":
    main()
