"""Join a standard and a robust classifier of any kind into a dual model: set its dial, measure it, save it.

python training/join.py --standard user/vit --robust outputs/hard/model --dataset_name path/to/images --min_sa 80
python training/join.py --standard path/a --robust path/b --alpha 0.7 --level quick    # the dial where you want it
python training/join.py --standard path/a --robust path/b --mixing weights             # one network, half the cost
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.cli.cost import cost_text, evaluation_work
from hf_dualmoe.cli.eps_check import check_eps_is_in_pixels
from hf_dualmoe.cli.evaluating import RESULTS, add_evaluation_arguments, check_measurements, evaluate, settle_eps
from hf_dualmoe.cli.hardening import licence_of, short_name
from hf_dualmoe.cli.run_record import SETTINGS_NAME, read_record
from hf_dualmoe.cli.script_arguments import (
    ScriptParser,
    add_data_arguments,
    add_normalisation_arguments,
    add_run_arguments,
    check_own_files,
    choose_cut,
    create_accelerator,
    load_images,
    output_folder,
    recorded_cut,
    report_beside,
)
from hf_dualmoe.data.datasets import DataSplits
from hf_dualmoe.evaluation.environment import digest_of_weights, print_in_any_encoding, write_text
from hf_dualmoe.evaluation.evaluation import LEVELS, RobustnessReport
from hf_dualmoe.evaluation.outcomes import OUTCOMES_NAME
from hf_dualmoe.evaluation.plots import attack_examples, save_plots
from hf_dualmoe.evaluation.processes import Processes
from hf_dualmoe.hub.model_card import (
    CONFIG_NAME,
    DIAL,
    PLOTS,
    RESULTS_NAME,
    load_report,
    read_json,
    reason_to_keep,
    refresh_model_card,
)
from hf_dualmoe.models.joining import join_models
from hf_dualmoe.models.loading import check_results_folder, load_classifier

PARTS = ("standard", "robust")
START_ALPHA = 0.75  # of the dial until it is chosen
RESULTS_FOLDER = "evaluation"  # in the output folder: a report in the model's own stays until all is measured


def create_parser() -> ArgumentParser:
    parser = ScriptParser(__doc__.splitlines()[0])
    add = parser.add_argument
    for name, what in zip(PARTS, ("accurate", "robust"), strict=True):
        add(f"--{name}", required=True, help=f"Saved folder or Hub id of the {what} classifier, of any kind.")
        add(f"--{name}_revision", default="main", help="Branch, tag or commit of it on the Hub.")
        add_normalisation_arguments(parser, f"{name}_")
    add("--trust_remote_code", action="store_true", help="Run model code that comes with a part.")
    add("--alpha", type=float, help="Weight of the robust model in [0, 1]; default: chosen on held-out images.")
    add("--mixing", choices=("probs", "logits", "weights"), default="probs", help="What alpha mixes.")
    add("--image_size", type=int, help="Side of the images that the dual model takes; default: as the robust part.")
    add_data_arguments(parser)
    add_evaluation_arguments(parser)
    texts = {"batch": "Images per forward.", "seed": "Seed of attacks and choices of images."}
    add_run_arguments(parser, "join", "a joined model", **texts)
    return parser


def main() -> None:
    print_in_any_encoding()
    parser = create_parser()
    args = parser.parse_args()
    accelerator = create_accelerator()
    args.output_dir = Path(args.output_dir or output_folder("join", f"{args.standard}+{args.robust}"))
    folder = args.output_dir / "model"
    try:
        settings = check_request(args)
        settle_eps(args, *source_of(args, "robust"))
        parts = load_parts(args)
        model = join_models(
            *parts.values(),
            START_ALPHA if args.alpha is None else args.alpha,
            mixing=args.mixing,
            image_size=args.image_size,
            check_names=not args.ignore_class_names,
        ).to(accelerator.device)
        # looked at by one process alone: it also writes there
        dial, is_finished = Processes(accelerator).from_main(lambda: earlier_start(args, model))
        if is_finished:
            accelerator.print(finished_text(folder, dial["alpha"]))
            return accelerator.end_training()
        set_dial(args, model, dial)
        data = load_images(args, model, dict(source_of(args, name) for name in PARTS))
        for part in parts.values():
            check_eps_is_in_pixels(part, data.test, args.eps, args.norm)
        work = evaluation_work(args, model, data, check_measurements(args, model, data))
        accelerator.print(cost_text(accelerator, model, data.test, work, args.batch_size), flush=True)
        if accelerator.is_main_process:
            if not dial:
                remove_results(folder)
            save(model, folder, settings)
        if args.alpha is None:
            choose_alpha(args, model, data, accelerator)  # before the report, which is at the chosen alpha
        report = evaluate(args, model, data, accelerator, folder=args.output_dir / RESULTS_FOLDER)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n" if accelerator.is_main_process else None)
    if accelerator.is_main_process:
        save(model, folder, settings)
        finish(args, model, data, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.exit(1 if report.failures else 0)  # a script that calls this one must notice what is missing


def check_request(args: Namespace) -> dict[str, Any]:
    """What makes two joined models the same, fit for JSON.

    Raises:
        ValueError: alpha is out of range or given twice over, a part, a model or results of somebody else would be
            overwritten, or the output folder holds other work, or another joined model and --fresh does not say to
            start over.
    """
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        raise ValueError(f"alpha={args.alpha!r} must be in [0, 1].")
    floors = [name for name in ("min_sa", "min_ra") if getattr(args, name) is not None]
    if args.alpha is not None and floors:
        raise ValueError(f"alpha={args.alpha:g} sets the dial, and {floors[0]} chooses it; give one.")
    if args.alpha is None and args.level not in LEVELS and "dial" not in args.level.split(","):
        args.level += ",dial"  # which chooses it
    folder = args.output_dir / "model"
    for name in PARTS:
        if Path(getattr(args, name)).resolve() == folder.resolve():
            raise ValueError(f"{name}={getattr(args, name)!r} would be overwritten; choose another --output_dir.")
    names = [f"{part}{end}" for part in PARTS for end in ("", "_revision", "_image_mean", "_image_std")]
    settings = {name: getattr(args, name) for name in (*names, "mixing", "image_size", "alpha")}
    there = read_record(args.output_dir, PARTS, "a joined model")
    if not there:
        for place in (args.output_dir, folder):
            check_results_folder(place)
    for place in (args.output_dir / RESULTS_FOLDER, folder):
        check_own_files(place, RESULTS)
    before = settings if args.fresh or not there else there
    if differing := [name for name in settings if before.get(name) != settings[name]]:
        raise ValueError(
            f"output_dir={str(args.output_dir)!r} holds another joined model ({differing[0]}: "
            f"{before.get(differing[0])!r} there, {settings[differing[0]]!r} here); choose another --output_dir, or "
            "start over in it with --fresh."
        )
    return settings


def earlier_start(args: Namespace, model: DualMoEForImageClassification) -> tuple[dict[str, Any], bool]:
    """The dial of the model that an earlier start saved, {} where there was none, and whether it got to the end.

    It did where the model has its report, nothing failed, and `--fresh` does not say to start over.

    Args:
        args: The request.
        model: The parts joined as they are now.

    Raises:
        ValueError: The parts have changed since.
    """
    folder = args.output_dir / "model"
    if args.fresh or not read_record(args.output_dir, PARTS, "a joined model") or not (folder / CONFIG_NAME).is_file():
        return {}, False
    config, report = read_json(folder / CONFIG_NAME), load_report(folder)
    dial = {name: config[name] for name in DIAL if name in config}
    if report is None:
        return dial, False
    if report.model.get("weights", now := digest_of_weights(model)) != now:
        raise ValueError(
            f"output_dir={str(args.output_dir)!r} holds a model that was joined from other weights: a part has "
            "changed since. Choose another --output_dir, or start over in it with --fresh."
        )
    return dial, set(PARTS) <= set(report.training) and not report.failures


def finished_text(folder: Path, alpha: float) -> str:
    """What a repeated start says of a joined model that is finished."""
    return (
        f"{folder} is finished, with its dial at alpha = {alpha:g}: nothing was joined or measured. To measure more, "
        f"or turn the dial: evaluate.py --model {folder} (--min_sa 80 --write_alpha, say). To start over: --fresh."
    )


def set_dial(args: Namespace, model: DualMoEForImageClassification, dial: dict[str, Any]) -> None:
    """Give the model what an earlier start, or an evaluation since, left in its folder; a given alpha counts more."""
    for name in ("standard_logit_map", "robust_logit_map"):
        setattr(model.config, name, dial.get(name))
    if args.alpha is None and dial:
        model.set_alpha(dial["alpha"])


def remove_results(folder: Path) -> None:
    """Remove results on the model that is about to be replaced, and their plots: the new one has others."""
    for name in (RESULTS_NAME, OUTCOMES_NAME, *PLOTS):
        (folder / name).unlink(missing_ok=True)


def source_of(args: Namespace, part: str) -> tuple[str, str]:
    """A part as it was named, and its revision on the Hub."""
    return getattr(args, part), getattr(args, f"{part}_revision")


def load_parts(args: Namespace) -> dict[str, torch.nn.Module]:
    """Both classifiers, in float32."""
    return {
        name: load_classifier(
            getattr(args, name),
            image_mean=getattr(args, f"{name}_image_mean"),
            image_std=getattr(args, f"{name}_image_std"),
            revision=getattr(args, f"{name}_revision"),
            trust_remote_code=args.trust_remote_code,
        )
        for name in PARTS
    }


def save(model: DualMoEForImageClassification, folder: Path, settings: dict[str, Any]) -> None:
    """Write the model, and beside its folder what it was joined from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder.parent / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")
    model.save_pretrained(folder)


def choose_alpha(
    args: Namespace, model: DualMoEForImageClassification, data: DataSplits, accelerator: Accelerator
) -> None:
    """Set the dial to the best position, or leave it and say why; the report finds these measurements finished."""
    choice = evaluate(args, model, data, accelerator, level=["dial"], folder=args.output_dir / RESULTS_FOLDER)
    args.fresh = False  # what was just measured is not to be deleted
    if choice.alpha_choice:
        model.set_alpha(choice.alpha_choice["alpha"])
        return
    reason = choice.failures.get("recommended alpha", "the dial could not be measured")
    accelerator.print(f"The dial stays at alpha = {model.config.alpha:g}: {reason}")


def finish(args: Namespace, model: DualMoEForImageClassification, data: DataSplits, report: RobustnessReport) -> None:
    """Print the report, and put it, its plots and a card into the model's folder, unless better numbers are there."""
    folder, results = args.output_dir / "model", args.output_dir / RESULTS_FOLDER
    licences = {licence_of(getattr(args, name)) for name in PARTS}
    report.training = {name: short_name(getattr(args, name)) for name in PARTS}
    # two licences: nobody here can tell
    report.training["license"] = licences.pop() if len(licences) == 1 else "other"
    standard = report_beside(*source_of(args, "standard"))
    if standard is not None and standard.training.get("method", "standard") not in ("standard", "certified"):
        report.training["standard_eps"] = standard.threat["eps"]  # the card calls it helpless under attack else
    cuts = {name: recorded_cut(*source_of(args, name)) for name in PARTS}
    if data.held_out:  # by this cut: a later evaluation is to have the same images
        report.seeds["training"] = choose_cut(args.split_seed, "split_seed", cuts)
        fraction = choose_cut(args.validation_fraction, "validation_fraction", cuts)
        report.training["validation_fraction"] = fraction
    elif len(seeds := {cut["split_seed"] for cut in cuts.values() if "split_seed" in cut}) == 1:
        report.seeds["training"] = seeds.pop()
    print(f"\n{report.table()}\n\n" + "\n".join(report.notes()))
    report.save(results / RESULTS_NAME)
    attack = PGD(eps=args.eps, norm=args.norm, steps=args.steps, seed=args.seed)
    save_plots(report, results, attack_examples(model, data.test, attack=attack))
    kept = reason_to_keep(load_report(folder), report, read_json(folder / CONFIG_NAME))
    refresh_model_card(report, results, folder)
    if kept:
        print(f"{folder} keeps its results.json and card: this evaluation {kept}. Its own are in {results}.")
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"\nSaved to {folder}, alpha = {model.config.alpha:g}: {files}")


if __name__ == "__main__":
    main()
