"""Measure how robust a saved image classifier is, and report it: a table, results.json and plots.

python training/evaluate.py --model outputs/digits-jtdmoe/model --eps 0.15 --level quick  # SA and PGD in a minute
accelerate launch training/evaluate.py --model user/model --dataset_name cifar10 --level full --eps 8/255
python training/evaluate.py --model path/to/model --min_sa 90 --write_alpha               # choose the dial and keep it
python training/evaluate.py --model path/to/model --write_calibration                     # calibrate the dial, keep it
python training/evaluate.py --model path/to/model --controls "one network=outputs/evaluate-other"   # both on the card
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.cli.cost import cost_text, evaluation_work
from hf_dualmoe.cli.evaluating import RESULTS, add_evaluation_arguments, check_measurements, evaluate, settle_eps
from hf_dualmoe.cli.script_arguments import (
    add_run_arguments,
    check_own_files,
    create_accelerator,
    load_images,
    load_model,
    model_parser,
    output_folder,
    read_earlier,
)
from hf_dualmoe.data.datasets import DataSplits
from hf_dualmoe.evaluation.calibration import calibrate_robust_logits
from hf_dualmoe.evaluation.environment import data_digest, print_in_any_encoding, write_text
from hf_dualmoe.evaluation.plots import attack_examples, save_plots
from hf_dualmoe.evaluation.processes import Processes
from hf_dualmoe.evaluation.report import RobustnessReport, same_images
from hf_dualmoe.hub.model_card import (
    CONFIG_NAME,
    load_report,
    read_json,
    reason_to_keep,
    refresh_model_card,
    write_model_card,
)
from hf_dualmoe.models.loading import NormalizedClassifier, is_foreign


def create_parser() -> ArgumentParser:
    parser = model_parser(__doc__.splitlines()[0])
    add_evaluation_arguments(parser)
    add = parser.add_argument
    add("--write_alpha", action="store_true", help="Write the recommended alpha into the folder's config.json.")
    add(
        "--calibrate",
        action="store_true",
        help="Choose F_R's logit map and alpha on held-out images (MixedNUTS) first.",
    )
    add("--write_calibration", action="store_true", help="Calibrate, and write both into the folder's config.json.")
    add(
        "--controls",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="Other models to compare with on the card, by the results.json of their evaluation on the same images.",
    )
    texts = {"batch": "Images per forward.", "seed": "Seed of attacks and choices of images."}
    add_run_arguments(parser, "evaluate", "an evaluation", **texts)
    return parser


def main() -> None:
    print_in_any_encoding()
    parser = create_parser()
    args = parser.parse_args()
    accelerator = create_accelerator()
    args.output_dir = Path(args.output_dir or output_folder("evaluate", args.model, args.revision))
    try:
        args.calibrate |= args.write_calibration
        settle_eps(args, args.model, args.revision)
        check_request(args)  # what needs no model is refused before it is loaded
        controls = read_controls(args)
        results = check_folders(args)
        # whatever it was saved in: half precision rounds small attack steps away
        model = load_model(args, dtype=torch.float32).to(accelerator.device)
        check_request(args, model)
        earlier = read_earlier(args.model)
        data = load_images(args, model, {args.model: args.revision})
        parts = check_measurements(args, model, data)
        if args.write_alpha and "dial" not in parts:
            raise ValueError(f"write_alpha needs the dial to be measured; level={args.level!r} leaves it out.")
        if args.calibrate and data.validation is None:
            raise ValueError(f"calibrate needs held-out images; {data.name} has test images only.")
        check_controls(args, controls, data)
        work = evaluation_work(args, model, data, parts)
        accelerator.print(cost_text(accelerator, model, data.test, work, args.batch_size), flush=True)
        calibration = calibrate(args, model, data, accelerator) if args.calibrate else {}
        report = evaluate(args, model, data, accelerator, folder=results)
        report.controls = {name: control.metrics for name, control in controls.items()}
        report.model |= {"calibration": calibration} if calibration else {}
        if earlier is not None:
            report.training, report.seeds = earlier.training, {**earlier.seeds, **report.seeds}
            # those given now come last, and count
            report.controls = {**comparable(earlier, report), **report.controls}
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n" if accelerator.is_main_process else None)
    if accelerator.is_main_process:
        finish(args, model, data, report, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.exit(1 if report.failures else 0)  # a script that calls this one must notice what is missing


def finish(args: Namespace, model: nn.Module, data: DataSplits, report: RobustnessReport, results: Path) -> None:
    """Print the report, save it with its plots, and bring the model's folder up to date: config, report and card."""
    print(f"\n{report.table()}\n\n" + "\n".join(report.notes()))
    attack = PGD(eps=args.eps, norm=args.norm, steps=args.steps, seed=args.seed)
    report.save(results / "results.json")
    plots = save_plots(report, results, attack_examples(model, data.test, attack=attack))
    print(f"\nSaved to {results}: results.json, {', '.join([report.outcomes, *plots])}")
    if args.write_calibration:  # before the card: what was measured is what is saved from here on
        write_config(args.model, {name: report.model["calibration"][name] for name in ("robust_logit_map", "alpha")})
    if isinstance(model, NormalizedClassifier) and (is_foreign(args.model) or not Path(args.model).is_dir()):
        print("No model card: it would speak for a model that hf_dualmoe did not make.")
    else:
        write_card(args, report, results)
    if args.write_alpha and report.alpha_choice:  # after the card: this is not the model that was measured
        write_config(args.model, {"alpha": report.alpha_choice["alpha"]})
    if args.write_calibration or args.write_alpha:
        render_again(args.model)


def check_request(args: Namespace, model: nn.Module | None = None) -> None:
    """Raise a ValueError where the dial or the calibration asked for cannot be written, or the model has none."""
    asked = [name for name in ("write_alpha", "write_calibration", "calibrate") if getattr(args, name)]
    if args.write_alpha and args.calibrate:
        raise ValueError("write_alpha and calibrate both choose alpha; give one.")
    if asked and asked[0] != "calibrate" and not Path(args.model, "config.json").is_file():
        raise ValueError(f"{asked[0]} needs a local folder; model={args.model!r} has no config.json.")
    if asked and model is not None and not hasattr(model, "set_alpha"):
        raise ValueError(f"{asked[0]} needs a dual model; {args.model!r} is a {type(model).__name__}.")


def read_controls(args: Namespace) -> dict[str, RobustnessReport]:
    """The reports that --controls names, by name.

    Raises:
        ValueError: One is not NAME=FOLDER, has no report, or was attacked with another eps or norm.
    """
    reports = {}
    for control in args.controls:
        name, is_pair, folder = control.partition("=")
        path = Path(folder, "results.json")
        if not (name and is_pair and path.is_file()):
            raise ValueError(f"controls={control!r} must be NAME=FOLDER, the folder having a results.json.")
        reports[name] = RobustnessReport.load(path)
        threat = {key: reports[name].threat.get(key) for key in ("eps", "norm")}
        if threat != {"eps": args.eps, "norm": args.norm}:
            raise ValueError(f"controls={name!r} was attacked with {threat}, not eps={args.eps:g}, norm={args.norm}.")
    return reports


def check_controls(args: Namespace, controls: dict[str, RobustnessReport], data: DataSplits) -> None:
    """Raise a ValueError where a control was measured on other images than those of this evaluation."""
    if not controls:
        return
    test, number = data.test, args.max_test_samples
    images = test if number is None else test.take(number, seed=args.seed)  # as the evaluation does
    here = {"name": data.name, "num_images": len(images), "digest": data_digest(images)}
    for name, control in controls.items():
        if not same_images(control.dataset, here):
            there = f"{control.dataset['num_images']} of {control.dataset['name']}"
            raise ValueError(
                f"controls={name!r} was measured on other images ({there}) than {len(images)} of {data.name} here; "
                "evaluate both with the same --dataset_name, --test_split, --max_test_samples and --seed."
            )


def comparable(earlier: RobustnessReport, report: RobustnessReport) -> dict[str, Any]:
    """The controls of an earlier report, such as the model before hardening, where it was made as this one was."""
    same = [(r.threat["norm"], r.threat["eps"]) for r in (earlier, report)]
    return earlier.controls if same[0] == same[1] and same_images(earlier.dataset, report.dataset) else {}


def calibrate(args: Namespace, model: nn.Module, data: DataSplits, accelerator: Accelerator) -> dict[str, Any]:
    """Set F_R's logit map and alpha as `calibrate_robust_logits` chooses them on held-out images; its result."""
    attack = PGD(eps=args.eps, norm=args.norm, steps=args.steps, seed=args.seed)
    options = {"attack": attack, "batch_size": args.batch_size, "progress": not args.disable_tqdm}
    # on the main process alone: all must end with one map and one alpha
    found = Processes(accelerator).from_main(lambda: calibrate_robust_logits(model, data.validation, **options))
    model.config.robust_logit_map = found["robust_logit_map"]
    model.set_alpha(found["alpha"])
    if accelerator.is_main_process:
        verdict = "accepted" if found["accepted"] else "not accepted: only alpha is chosen, the logit map stays"
        gains = (
            f"SA {found['gain_sa']:+.2f}, RA {found['gain_ra']:+.2f} points on {found['num_images']} held-out images"
        )
        print(f"Calibration {verdict} ({gains}); alpha = {found['alpha']:g}, map {found['robust_logit_map']}")
    return found


def check_folders(args: Namespace) -> Path:
    """Where results go; a ValueError where another program's would be replaced there, or in the model's folder."""
    results = results_folder(args.output_dir, args.model)
    check_own_files(results, RESULTS)
    if Path(args.model).is_dir() and not is_foreign(args.model):  # nothing is written into a foreign one
        check_own_files(args.model, RESULTS)
    return results


def results_folder(output_dir: Path, model: str) -> Path:
    """Where results go: `output_dir`, or a folder in it where that is the model's own.

    The report of the model is then replaced in one step, once all is measured, and only if nothing is lost by it.
    """
    is_own = output_dir.is_dir() and Path(model).is_dir() and output_dir.samefile(model)
    return output_dir / "evaluation" if is_own else output_dir


def write_card(args: Namespace, report: RobustnessReport, results: Path) -> None:
    """Bring the model's card up to date, or write one beside the results."""
    try:
        config = Path(args.model, CONFIG_NAME)
        saved = read_json(config) if config.is_file() else {}
        kept = reason_to_keep(load_report(args.model), report, saved)
        card = refresh_model_card(report, results, args.model)
        print(f"Wrote {card}" if card else "README.md was edited by somebody and is left alone.")
        if kept:
            told = "keeps its results.json and card" if load_report(args.model) else "gets no results.json and card"
            print(f"{args.model} {told}: this evaluation {kept}. Its own are in {results}.")
    except Exception as error:  # the numbers are saved; a card can be rendered again
        print(f"WARNING: writing the model card failed: {type(error).__name__}: {error}", file=sys.stderr)


def render_again(model: str) -> None:
    """Render the card of a model whose config was written: it shows the dial, and says where numbers do not fit it."""
    try:
        write_model_card(model)
    except Exception as error:
        print(f"WARNING: writing the model card failed: {type(error).__name__}: {error}", file=sys.stderr)


def write_config(folder: str, changes: dict[str, Any]) -> None:
    """Change fields of the folder's config.json."""
    config = Path(folder, "config.json")
    write_text(config, json.dumps(json.loads(config.read_text(encoding="utf-8")) | changes, indent=2) + "\n")
    print(f"Wrote {', '.join(f'{name} = {value}' for name, value in changes.items())} to {config}")


if __name__ == "__main__":
    main()
