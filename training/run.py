"""Train a robust image classifier, report how robust it is, and save it for `AutoModel`.

accelerate launch training/run.py                                           # digits dual model, minutes on 2 CPU cores
accelerate launch training/run.py --recipe cifar10_resnet18 --method rt_er  # a recipe with overrides
accelerate launch training/run.py --dataset_name path/to/images             # your own images, one folder per class
python training/run.py --help
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from transformers import set_seed

from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from hf_dualmoe.cli.arguments import DataArguments, ModelArguments, RecipeParser
from hf_dualmoe.data.datasets import DataSplits, load_splits
from hf_dualmoe.evaluation.dial import choose_alpha, dial_attack, sweep_alpha
from hf_dualmoe.evaluation.environment import print_in_any_encoding, write_text
from hf_dualmoe.evaluation.evaluation import RobustnessReport, check_evaluation, evaluate_robustness
from hf_dualmoe.evaluation.plots import save_plots
from hf_dualmoe.evaluation.processes import Processes
from hf_dualmoe.hub.model_card import PLOTS, write_model_card
from hf_dualmoe.hub.publish import hide_tokens, publish_folder
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.checkpoints import (
    CheckpointError,
    explain_failed_write,
    last_good_checkpoint,
    list_checkpoints,
    remove_checkpoint,
)
from hf_dualmoe.trainer.time_estimate import estimate_time
from hf_dualmoe.trainer.trainer import RobustTrainer

RECIPES = Path(__file__).parent / "recipes"
ATTACK = ("eps", "norm", "training_attack", "attack_steps")
SETTINGS = {  # what each method uses
    "standard": (),
    "at": (*ATTACK, "clean_weight"),
    "trades": (*ATTACK, "trades_lambda"),
    "rt_er": (*ATTACK, "beta", "second_term", "second_attack"),
    "jtdmoe": (*ATTACK, "beta", "second_term", "second_attack", "train_alpha", "standard_eps"),
    "certified": ("certify_radius", "margin_weight", "route_weight", "gate_weight"),
}
# settings that may change when a run is gone on with
FREE = ("on_nan_loss", "max_skipped_steps", "logging_nan_inf_filter", "step_graph", "hub_strategy")


def main() -> None:
    print_in_any_encoding()
    parser = RecipeParser(RECIPES, description=__doc__.splitlines()[0])
    try:
        data_args, model_args, args, run = parser.parse(sys.argv[1:])
        output_dir, settings = Path(args.output_dir), settings_of(data_args, model_args, args)
        recorded = recorded_settings(output_dir, settings, run.fresh)
        checkpoint = None if run.fresh else find_checkpoint(output_dir, recorded)
        set_seed(args.seed)
        data = load_data(data_args, model_args, args.seed)
        settings["data_digest"] = data.digest()
        check_same_data(output_dir, recorded, settings)
        check_dial_request(args.method, run)
        check_mixing(args.method, model_args)
        model = create_model(model_args, args, data)
        if run.report != "none":
            datasets = (data.test, data.validation)
            check_evaluation(model.eval(), datasets, eps=args.eps, norm=args.norm, level=run.report)
        trainer = RobustTrainer(model, args, train_dataset=data.train, eval_dataset=data.validation)
        if run.estimate_time:
            tell_time(trainer)
        if run.estimate_time != "only" and trainer.is_world_process_zero():
            begin(output_dir, recorded, settings, checkpoint, run.fresh and not args.resume_from_checkpoint)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        parser.error(" ".join(hide_tokens(str(error)).split()))
    if run.estimate_time == "only":
        return trainer.accelerator.end_training()
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        save_and_report(trainer, data, data_args, model_args, args, run)
    except (CheckpointError, FloatingPointError) as error:
        sys.exit(f"run.py: error: {hide_tokens(str(error), args.hub_token)}")
    Processes(trainer.accelerator).await_main()  # who alone measures the report
    trainer.accelerator.wait_for_everyone()  # or the main process could be gone before the others know
    trainer.accelerator.end_training()


def tell_time(trainer: RobustTrainer) -> None:
    """Print how long the run will take."""
    estimate = estimate_time(trainer)
    if trainer.is_world_process_zero():
        print(estimate.text(), flush=True)


def begin(
    output_dir: Path, recorded: dict[str, Any], settings: dict[str, Any], checkpoint: str | None, clear: bool
) -> None:
    """Record the settings in the output folder, and say so where a run is gone on with for longer.

    Args:
        recorded: Settings of the run that the folder holds, {} without one.
        settings: Those of this start; it learns here at which lengths the run was started before.
        checkpoint: Where this start goes on from, if anywhere.
        clear: Whether to delete checkpoints, or a later start would go on from them.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder in list_checkpoints(output_dir).values() if clear else ():
        remove_checkpoint(folder)
    settings["shorter_before"] = recorded.get("shorter_before", [])
    if lengths := differing_settings(recorded, settings) if recorded else {}:
        settings["shorter_before"] += [{name: before for name, (before, _) in lengths.items()}]
        changes = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in lengths.items())
        print(
            f"Going on for longer ({changes}) from {checkpoint or 'the start: there is no checkpoint'}. The schedule "
            "of the learning rate, and of eps where it warms up, is computed anew for the whole new length: the rate "
            "jumps to where that schedule is by now. So this is not the run that the new length would have been from "
            "the start; --fresh trains that."
        )
    write_text(output_dir / "settings.json", json.dumps(settings, indent=2) + "\n")


def save_and_report(
    trainer: RobustTrainer,
    data: DataSplits,
    data_args: DataArguments,
    model_args: ModelArguments,
    args: RobustTrainingArguments,
    run: argparse.Namespace,
) -> None:
    """Write the trained model, its report, plots and card into `model/` of the output folder; publish on request."""
    output_dir = Path(args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
    if trainer.is_world_process_zero():
        folder = output_dir / "model"
        for name in ("results.json", *PLOTS):  # of earlier weights
            (folder / name).unlink(missing_ok=True)
        if model_args.mixing == "weights":
            model.set_mixing("weights")
        with explain_failed_write("The trained model", output_dir):
            model.eval().save_pretrained(folder)  # before the report: nothing trained is lost
        choice = turn_dial(model, data, args, run) if run.choose_alpha else {}
        model.save_pretrained(folder)
        if run.report != "none":
            report = write_report(
                model, data, args, folder, trainer, choice, origins(data_args, model_args), level=run.report
            )
            print(f"\n{report.table()}\n\n" + "\n".join(report.notes()))
            attempt("drawing the plots", lambda: save_plots(report, folder))
        attempt("writing the model card", lambda: write_model_card(folder))
        print(f"\nSaved to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        if args.push_to_hub:
            attempt("publishing", lambda: publish(folder, args, trainer.hub_model_id))


def check_dial_request(method: str, run: argparse.Namespace) -> None:
    """Refuse a choice of the dial that cannot be made, before anything is trained.

    Raises:
        ValueError: There is no dial, a floor is no percentage, or both floors or a floor alone are given.
    """
    floors = {name: getattr(run, name) for name in ("min_sa", "min_ra") if getattr(run, name) is not None}
    if run.choose_alpha and method != "jtdmoe":
        raise ValueError(f"choose_alpha needs the dual model of method='jtdmoe', not method={method!r}.")
    if floors and (not run.choose_alpha or len(floors) > 1):
        raise ValueError(f"{' and '.join(floors)} given: give one floor, together with --choose_alpha.")
    for name, floor in floors.items():
        if not 0 <= floor <= 100:
            raise ValueError(f"{name}={floor!r} must be an accuracy in %, in [0, 100].")


def check_mixing(method: str, model_args: ModelArguments) -> None:
    """Refuse a dial in the weights that could not work, before anything is trained.

    Raises:
        ValueError: There is no dual model, or its parts would have no common start.
    """
    if model_args.mixing != "weights":
        return
    if method != "jtdmoe":
        raise ValueError(f"mixing='weights' needs the dual model of method='jtdmoe', not method={method!r}.")
    if not (model_args.pretrained or model_args.init_experts_from):
        raise ValueError(
            "mixing='weights' needs a trained network from which both parts start: give init_experts_from or "
            "pretrained. From scratch there is no usable network between the two."
        )


def settings_of(
    data_args: DataArguments, model_args: ModelArguments, args: RobustTrainingArguments
) -> dict[str, dict[str, Any]]:
    """What makes two runs the same, fit for JSON; where they write and how they report is left out."""
    ours = {name: getattr(args, name) for name in RobustTrainingArguments.__annotations__ if name not in FREE}
    shared = ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "optim", "seed")
    shared += ("per_device_train_batch_size", "gradient_accumulation_steps", "label_smoothing_factor", "optim_args")
    shared += ("warmup_steps", "lr_scheduler_kwargs", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")
    shared += ("bf16", "fp16", "tf32", "data_seed", "load_best_model_at_end")
    if args.load_best_model_at_end:  # then it also matters when is evaluated, and for what
        shared += ("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps")
    training = ours | {name: getattr(args, name) for name in shared}
    settings = {"data": asdict(data_args), "model": asdict(model_args), "training": training}
    return json.loads(json.dumps(settings, default=str))


def recorded_settings(output_dir: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """Settings of the run that `output_dir` holds, which may differ in being shorter; {} where there is none.

    Raises:
        ValueError: They differ in more, and `fresh` does not say to start over; the message names in what.
    """
    path = output_dir / "settings.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not fresh else {}
    differing = differing_settings(recorded, settings) if recorded else {}
    if not all(is_longer(name, *values) for name, values in differing.items()):
        shown = ", ".join(f"{name}: {before!r} there, {now!r} here" for name, (before, now) in differing.items())
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a run with other settings ({shown}); choose another --output_dir, "
            "or start over in it with --fresh."
        )
    return recorded


def differing_settings(recorded: dict[str, Any], settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (there, here) of the arguments that differ."""
    found = {}
    for group in ("data", "model", "training"):
        there, here = recorded.get(group, {}), settings[group]
        names = [name for name in {**there, **here} if name not in FREE]
        found |= {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}
    return found


def is_longer(name: str, before: Any, now: Any) -> bool:
    """Whether an argument lets the same run go on for longer."""
    return name in ("num_train_epochs", "max_steps") and 0 < before < now


def check_same_data(output_dir: Path, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise a ValueError where the run that the folder holds saw other images, labels or class names."""
    if recorded.get("data_digest", settings["data_digest"]) != settings["data_digest"]:  # older runs noted none
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a run on other data: images, labels or names of classes have "
            f"changed since (digest {recorded.get('data_digest')} there, {settings['data_digest']} here); choose "
            "another --output_dir, or start over in it with --fresh."
        )


def find_checkpoint(output_dir: Path, recorded: dict[str, Any]) -> str | None:
    """The newest whole checkpoint to go on from, where `output_dir` holds a run.

    Raises:
        ValueError: The folder holds checkpoints of an unknown run.
        CheckpointError: It holds checkpoints, none of which can be used.
    """
    if not recorded and list_checkpoints(output_dir):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds checkpoints but no settings.json that says of which run; "
            "choose another --output_dir, or start over in it with --fresh."
        )
    found = last_good_checkpoint(output_dir)
    return str(found) if found else None


def load_data(data_args: DataArguments, model_args: ModelArguments, seed: int) -> DataSplits:
    """Load and decode the images, at the size and with the channels that the model arguments ask for.

    Raises:
        ValueError: They are not there, cannot be reached or cannot be used; the message begins with `dataset_name`.
    """
    from datasets.exceptions import DatasetsError  # takes a second to import

    options = asdict(data_args)
    name, config_name = options.pop("dataset_name"), options.pop("dataset_config_name")
    shape = {"image_size": model_args.image_size, "num_channels": model_args.num_channels}
    try:
        return load_splits(name, config_name=config_name, **shape, **options, seed=seed)
    except (DatasetsError, OSError) as error:
        raise ValueError(f"dataset_name={name!r} cannot be loaded: {error}") from error


def create_model(
    model_args: ModelArguments, args: RobustTrainingArguments, data: DataSplits
) -> DualMoEForImageClassification | MoEForImageClassification:
    """A dual model for JTDMoE, a single mixture for the other methods, from scratch or from given weights.

    Raises:
        ValueError: The weights to start from are not there, cannot be reached, or do not fit.
    """

    def create_moe() -> MoEForImageClassification:
        config, sources = model_args.moe_config(data), {"pretrained": True} if model_args.pretrained else {}
        if model_args.init_experts_from:
            sources["init_experts_from"] = model_args.init_experts_from
        if not sources:
            return MoEForImageClassification(config)
        try:
            return MoEForImageClassification.from_backbone(config, **sources)
        except OSError as error:
            given = ", ".join(f"{name}={value!r}" for name, value in sources.items())
            raise ValueError(f"{given}: expected a folder with a model, or one on the Hub. {error}") from error

    if args.method != "jtdmoe":
        return create_moe()
    config, standard = model_args.dual_config(data, args.train_alpha), create_moe()
    # a dial in the weights needs one start for all weights, new routers and heads included
    robust = copy.deepcopy(standard) if model_args.mixing == "weights" else create_moe()
    return DualMoEForImageClassification.from_models(standard, robust, config.alpha, mixing=config.mixing)


def turn_dial(
    model: DualMoEForImageClassification, data: DataSplits, args: RobustTrainingArguments, run: argparse.Namespace
) -> dict[str, Any]:
    """Set the dial to the best alpha on the validation images; leave it where none reaches the floor, and say so."""
    attack = dial_attack(data.num_labels, eps=args.eps, norm=args.norm, seed=args.seed)
    try:
        choice = choose_alpha(sweep_alpha(model, data.validation, attack=attack), min_sa=run.min_sa, min_ra=run.min_ra)
    except ValueError as error:
        print(f"The dial stays at alpha = {model.config.alpha:g}: {error}")
        return {}
    model.set_alpha(choice.alpha)
    return {**asdict(choice), "chosen_on": f"{len(data.validation)} images held out of train"}


def write_report(
    model: DualMoEForImageClassification | MoEForImageClassification,
    data: DataSplits,
    args: RobustTrainingArguments,
    folder: Path,
    trainer: RobustTrainer,
    alpha_choice: dict[str, Any],
    sources: dict[str, str],
    level: str,
) -> RobustnessReport:
    """Measure on the test images and write results.json as the numbers come."""
    path = folder / "results.json"
    report = evaluate_robustness(
        model,
        data.test,
        eps=args.eps,
        norm=args.norm,
        seed=args.seed,
        held_out=None if alpha_choice else data.validation,  # to choose on, not yet done
        dataset_name=data.name,
        path=path,
        level=level,
    )
    report.seeds["training"] = args.seed
    report.alpha_choice = alpha_choice or report.alpha_choice
    used = [n for n in SETTINGS[args.method] if n != "attack_steps" or args.training_attack == "pgd"]
    report.training = {
        "method": args.method,
        "num_images": len(data.train),
        "selected_on": f"{len(data.validation)} images held out of train",
        "best_validation": trainer.state.best_metric,
        "steps": trainer.state.global_step,
        "skipped_images": data.skipped,
        **{name: getattr(args, name) for name in used},
        **{
            name: getattr(args, name)
            for name in ("num_train_epochs", "learning_rate", "weight_decay", "ema_decay", "awp_gamma")
        },
        **sources,
        **kept_weights(trainer),
        "train_runtime_s": round(trainer.train_seconds, 4),
    }
    report.save(path)
    return report


def kept_weights(trainer: RobustTrainer) -> dict[str, Any]:
    """Which weights were saved, where there are two; and at which lengths the run was started before, if at others."""
    found = {}
    if trainer.ema is not None:
        found["saved_weights"] = "moving average" if trainer.keeps_average else "trained (the average was worse)"
    before = json.loads(Path(trainer.args.output_dir, "settings.json").read_text(encoding="utf-8"))["shorter_before"]
    return found | ({"lengthened_from": before} if before else {})


def origins(data_args: DataArguments, model_args: ModelArguments) -> dict[str, str]:
    """Hub ids of the training data and of the weights that training started from, where they are on the Hub."""
    data, source = data_args.dataset_name, model_args.init_experts_from
    if model_args.pretrained:
        source = timm.get_pretrained_cfg(model_args.backbone).hf_hub_id
    names = {"dataset_id": None if data == "digits" else data, "base_model": source}
    return {name: source for name, source in names.items() if source and not Path(source).expanduser().exists()}


def publish(folder: Path, args: RobustTrainingArguments, repo_id: str) -> None:
    """Send the finished model to the Hub."""
    options = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": args.hub_token}
    print(f"Published: {publish_folder(folder, repo_id, **options).commit.commit_url}")


def attempt(what: str, work: Callable[[], Any]) -> None:
    """Do what comes after training; a failure is told and loses nothing."""
    try:
        work()
    except Exception as error:
        print(f"WARNING: {what} failed: {hide_tokens(f'{type(error).__name__}: {error}')}", file=sys.stderr)


if __name__ == "__main__":
    main()
