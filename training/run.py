"""Train a robust image classifier, or harden a trained one, report how robust it is, and save it for `AutoModel`.

accelerate launch training/run.py                                           # digits dual model, minutes on 2 CPU cores
accelerate launch training/run.py --recipe cifar10_resnet18 --method rt_er  # a recipe with overrides
accelerate launch training/run.py --dataset_name path/to/images             # your own images, one folder per class
accelerate launch training/run.py --model_name_or_path microsoft/resnet-50 --dataset_name path/to/images  # harden it
python training/run.py --help
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from torch import nn
from transformers import set_seed

from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from hf_dualmoe.cli.arguments import DataArguments, ModelArguments, RecipeParser
from hf_dualmoe.cli.eps_check import check_eps_is_in_pixels
from hf_dualmoe.cli.hardening import (
    BEFORE,
    agree_on_classes,
    check_hardening,
    check_start_is_kept,
    load_start,
    measure_before,
    start_facts,
)
from hf_dualmoe.cli.run_record import (
    check_named_checkpoint,
    check_same_data,
    find_checkpoint,
    has_finished,
    holds_weights,
    record_end,
    record_start,
    recorded_settings,
    restart_text,
    settings_of,
    shorter_before,
    whole_report,
)
from hf_dualmoe.cli.script_arguments import check_apart_from_data
from hf_dualmoe.data.datasets import DataSplits, load_splits
from hf_dualmoe.evaluation.dial import choose_alpha, dial_attack, sweep_alpha
from hf_dualmoe.evaluation.environment import model_digest, print_in_any_encoding
from hf_dualmoe.evaluation.evaluation import RobustnessReport, check_evaluation, evaluate_robustness
from hf_dualmoe.evaluation.outcomes import OUTCOMES_NAME
from hf_dualmoe.evaluation.plots import save_plots
from hf_dualmoe.evaluation.processes import Processes
from hf_dualmoe.hub.model_card import PLOTS, write_model_card
from hf_dualmoe.hub.publish import publish_folder
from hf_dualmoe.hub.upload_plan import hide_tokens
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.checkpoints import CheckpointError, explain_failed_write
from hf_dualmoe.trainer.time_estimate import count_steps, estimate_time
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


def main() -> None:
    print_in_any_encoding()
    parser = RecipeParser(RECIPES, description=__doc__.splitlines()[0])
    try:
        data_args, model_args, args, run = parser.parse(sys.argv[1:])
        output_dir, settings = Path(args.output_dir), settings_of(data_args, model_args, args)
        recorded = recorded_settings(output_dir, settings, run.fresh)
        checkpoint = None if run.fresh else find_checkpoint(output_dir)
        check_requests(data_args, model_args, args, run)  # what can be refused before anything is loaded
        set_seed(args.seed)  # new weights follow from it
        model, data, keeps_head = prepare(data_args, model_args, args)
        settings["data_digest"] = data.digest()  # a name says nothing of what the dataset holds today
        check_same_data(output_dir, recorded, settings)
        check_eps_is_in_pixels(model, data.test, args.eps, args.norm)
        if run.report != "none":
            datasets = (data.test, data.validation)
            # what the closing report would refuse after hours; eval(), since it warns of train mode
            check_evaluation(model.eval(), datasets, eps=args.eps, norm=args.norm, level=run.report)
        trainer = RobustTrainer(model, args, train_dataset=data.train, eval_dataset=data.validation)
        if run.estimate_time:
            tell_time(trainer)  # before the run is recorded: an estimate alone leaves no trace
        if run.estimate_time == "only":
            return trainer.accelerator.end_training()
        if trainer.is_world_process_zero():
            named = args.resume_from_checkpoint
            tell(args, record_start(output_dir, recorded, settings, checkpoint, fresh=run.fresh, resumed=named))
            goes_on_from = None if named else checkpoint
            tell(args, restart_text(output_dir, goes_on_from, count_steps(trainer)))
        before = {}
        if keeps_head and run.report != "none":
            # a new head is random
            before = {BEFORE: measure_before(trainer, data, run.report, output_dir / "before", run.fresh)}
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        parser.error(" ".join(hide_tokens(str(error)).split()))  # one line
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
        save_and_report(trainer, data, data_args, model_args, args, run, before)
    except (CheckpointError, FloatingPointError) as error:
        sys.exit(f"run.py: error: {hide_tokens(str(error), args.hub_token)}")
    Processes(trainer.accelerator).await_main()  # who alone measures the report
    trainer.accelerator.wait_for_everyone()  # or the main process could be gone before the others know
    trainer.accelerator.end_training()


def prepare(
    data_args: DataArguments, model_args: ModelArguments, args: RobustTrainingArguments
) -> tuple[nn.Module, DataSplits, bool]:
    """Load the images and make the model, a new one or a trained one to harden.

    Returns:
        The model, the images, and whether the model is a trained one that keeps its head.
    """
    import datasets  # takes a second

    if args.disable_tqdm:
        datasets.disable_progress_bars()
    start = load_start(model_args)
    if start is None:
        data = load_data(data_args, model_args.image_size, model_args.num_channels, args.seed)
        return create_model(model_args, args, data), data, False
    # as the model takes them
    data = load_data(data_args, start.config.image_size, start.config.num_channels, args.seed)
    model, data, done = agree_on_classes(start, data, model_args.ignore_class_names)
    tell(args, f"{model_args.model_name_or_path} {done}.")
    return model, data, model is start  # with a new head it is another object


def tell(args: RobustTrainingArguments, text: str) -> None:
    """Print on the main process, where there is something to say."""
    if text and args.process_index == 0:
        print(text, flush=True)


def tell_time(trainer: RobustTrainer) -> None:
    """Print how long the run will take."""
    estimate = estimate_time(trainer)
    if trainer.is_world_process_zero():
        print(estimate.text(), flush=True)


def save_and_report(
    trainer: RobustTrainer,
    data: DataSplits,
    data_args: DataArguments,
    model_args: ModelArguments,
    args: RobustTrainingArguments,
    run: argparse.Namespace,
    controls: dict[str, Any],
) -> None:
    """Write the trained model, its report, plots and card into `model/` of the output folder; publish on request.

    A finished run that is started again leaves that folder as it is: what was measured and chosen there since counts.
    """
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(args.output_dir)
    folder = output_dir / "model"
    # keep_fp32_wrapper: accelerate's autocast around `forward` would measure in half precision
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
    if model_args.mixing == "weights":  # trained with outputs mixed: see `dual_config`
        model.set_mixing("weights")
    model.eval()
    is_there = not run.fresh and holds_weights(folder, model)
    report = whole_report(output_dir) if is_there else None
    if is_there and (report or run.report == "none") and has_finished(output_dir) is not False:
        print(
            f"\nThe run had finished, and {folder} has its weights: the folder is left as it is, with all that was "
            "measured and chosen since. hf-dualmoe evaluate measures more and turns the dial; --fresh trains anew."
        )
    else:
        record_end(output_dir, False)  # until all of what follows is there
        save_model(model, folder, output_dir, is_there)
        choice = turn_dial(model, data, args, run) if run.choose_alpha and report is None else {}
        if choice:
            model.save_pretrained(folder)
        facts = start_facts(model_args)
        sources = {**origins(data_args, model_args), **facts}
        if data.held_out:  # so that evaluations cut the same images from train
            sources["validation_fraction"] = data_args.validation_fraction
        if report is not None:  # of these weights, by a run that was shorter
            report.training |= training_facts(trainer, data, args, sources)
            report.save(folder / "results.json")
        elif run.report != "none":
            report = write_report(model, data, args, folder, trainer, choice, sources, run, controls)
            print(f"\n{report.table()}\n\n" + "\n".join(report.notes()))
            attempt("drawing the plots", lambda: save_plots(report, folder))
        attempt("writing the model card", lambda: write_model_card(folder, license=facts.get("license")))
        record_end(output_dir)
        print(f"\nSaved to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if args.push_to_hub:
        attempt("publishing", lambda: publish(folder, args, trainer.hub_model_id))


def save_model(model: nn.Module, folder: Path, output_dir: Path, is_there: bool) -> None:
    """Save the trained model; where the folder has its weights, take over instead how its dial was set there."""
    if is_there:
        if hasattr(model, "set_alpha"):
            config = type(model.config).from_pretrained(folder)
            model.set_alpha(config.alpha)
            for name in ("standard_logit_map", "robust_logit_map"):
                setattr(model.config, name, getattr(config, name))
        return
    for name in ("results.json", OUTCOMES_NAME, *PLOTS):  # of earlier weights
        (folder / name).unlink(missing_ok=True)
    with explain_failed_write("The trained model", output_dir):
        model.save_pretrained(folder)  # before the report: nothing trained is lost


def check_requests(
    data_args: DataArguments, model_args: ModelArguments, args: RobustTrainingArguments, run: argparse.Namespace
) -> None:
    """Raise a ValueError for what cannot be done, before anything is loaded."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise ValueError(
            "fsdp: this script saves and measures whole models, and FSDP spreads their weights over the processes. "
            "Start with a configuration that keeps them whole, such as multi_gpu.yaml."
        )
    check_named_checkpoint(args.resume_from_checkpoint)
    check_apart_from_data(args.output_dir, data_args.dataset_name)
    check_dial_request(args.method, run)
    check_mixing(args.method, model_args)
    check_hardening(model_args, args.method)
    check_start_is_kept(model_args, Path(args.output_dir))


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


def load_data(data_args: DataArguments, image_size: int | None, num_channels: int | None, seed: int) -> DataSplits:
    """Load and decode the images, at this size and with these channels; None = those of the data.

    Raises:
        ValueError: They are not there, cannot be reached or cannot be used; the message begins with `dataset_name`.
    """
    from datasets.exceptions import DatasetsError  # takes a second to import

    options = asdict(data_args)
    name, config_name = options.pop("dataset_name"), options.pop("dataset_config_name")
    options |= {"image_size": image_size, "num_channels": num_channels, "seed": seed}
    try:
        return load_splits(name, config_name=config_name, **options)
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
    options = {"attack": attack, "batch_size": args.per_device_eval_batch_size, "progress": not args.disable_tqdm}
    try:
        choice = choose_alpha(sweep_alpha(model, data.validation, **options), min_sa=run.min_sa, min_ra=run.min_ra)
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
    run: argparse.Namespace,
    controls: dict[str, Any],
) -> RobustnessReport:
    """Measure on the test images and write results.json as the numbers come; a restart finds finished measurements."""
    path, measurements = folder / "results.json", folder.parent / "report-measurements"
    report = evaluate_robustness(
        model,
        data.test,
        eps=args.eps,
        norm=args.norm,
        seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
        held_out=None if alpha_choice else data.validation,  # to choose on, not yet done
        dataset_name=data.name,
        path=path,
        level=run.report,
        resume_dir=measurements,
        fresh=run.fresh or are_of_another_model(measurements, model),
        progress=not args.disable_tqdm,
    )
    report.seeds["training"], report.controls = args.seed, controls
    report.alpha_choice = alpha_choice or report.alpha_choice
    report.training = training_facts(trainer, data, args, sources)
    report.save(path)
    return report


def are_of_another_model(measurements: Path, model: nn.Module) -> bool:
    """Whether a folder of measurements tells of other weights or settings of the model, as a shorter run had."""
    try:
        record = json.loads((measurements / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none; or none of ours, which is refused later
        return False
    return isinstance(record, dict) and record.get("model") != model_digest(model)


def training_facts(
    trainer: RobustTrainer, data: DataSplits, args: RobustTrainingArguments, sources: dict[str, str]
) -> dict[str, Any]:
    """How the model was trained, for its report."""
    used = [n for n in SETTINGS[args.method] if n != "attack_steps" or args.training_attack == "pgd"]  # N-FGSM has one
    return {
        "method": args.method,
        "num_images": len(data.train),
        "selected_on": f"{len(data.validation)} images held out of train",
        "best_validation": trainer.state.best_metric,
        "steps": trainer.state.global_step,
        "skipped_images": data.skipped,
        **{name: getattr(args, name) for name in used},
        **{
            name: getattr(args, name)
            for name in ("num_train_epochs", "learning_rate", "weight_decay", "ema_decay", "awp_gamma", "cutmix_prob")
        },
        **sources,
        **kept_weights(trainer),
        "train_runtime_s": round(trainer.train_seconds, 4),
    }


def kept_weights(trainer: RobustTrainer) -> dict[str, Any]:
    """Which weights were saved, where there are two; and at which lengths the run was started before, if at others."""
    found = {}
    if trainer.ema is not None:
        found["saved_weights"] = "moving average" if trainer.keeps_average else "trained (the average was worse)"
    before = shorter_before(Path(trainer.args.output_dir))
    return found | ({"lengthened_from": before} if before else {})


def origins(data_args: DataArguments, model_args: ModelArguments) -> dict[str, str]:
    """Hub ids of the training data and of the weights that training started from, where they are on the Hub."""
    data, source = data_args.dataset_name, model_args.model_name_or_path or model_args.init_experts_from
    if model_args.pretrained:
        source = timm.get_pretrained_cfg(model_args.backbone).hf_hub_id
    names = {"dataset_id": None if data == "digits" else data, "base_model": source}
    # a folder of this machine is nobody else's business
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
