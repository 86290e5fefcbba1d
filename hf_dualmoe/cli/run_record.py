"""The record in the output folder of a training: its settings and data, so that only the same run resumes there.

It also says whether the run had finished: then the model that it left is not written again.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..evaluation.environment import write_text
from ..evaluation.report import RobustnessReport
from ..models.loading import NormalizedClassifier, check_results_folder
from ..trainer.arguments import RobustTrainingArguments
from ..trainer.checkpoints import (
    MANIFEST_NAME,
    STATE_NAME,
    check_checkpoint,
    last_good_checkpoint,
    list_checkpoints,
    remove_checkpoint,
    unfinished_checkpoints,
)
from .arguments import DataArguments, ModelArguments

SETTINGS_NAME = "settings.json"
REPORT_NAME = "results.json"
WRITTEN = ("model", "before", "report-measurements")  # folders that a run writes into, beside those of its checkpoints
GROUPS = {"data": DataArguments, "model": ModelArguments, "training": RobustTrainingArguments}
# settings that may change when a run is gone on with
FREE = ("on_nan_loss", "max_skipped_steps", "logging_nan_inf_filter", "step_graph", "hub_strategy")
TRAINER_SETTINGS = (  # those of transformers that make two runs differ
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "optim",
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "optim_args",
    "warmup_steps",
    "lr_scheduler_kwargs",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "tf32",
    "data_seed",
    "load_best_model_at_end",
)
# together the images of a step: with another number of processes they may change where their product does not
BATCH = ("per_device_train_batch_size", "processes", "gradient_accumulation_steps")
# with load_best_model_at_end it also matters when is evaluated, and for what
SELECTION = ("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps")


def settings_of(
    data_args: DataArguments, model_args: ModelArguments, args: RobustTrainingArguments
) -> dict[str, dict[str, Any]]:
    """Settings that make two runs the same, fit for JSON; without where they write and how they report."""
    ours = {name: getattr(args, name) for name in RobustTrainingArguments.__annotations__ if name not in FREE}
    shared = TRAINER_SETTINGS + (SELECTION if args.load_best_model_at_end else ())
    training = ours | {name: getattr(args, name) for name in shared} | {"processes": args.world_size}
    if args.auto_find_batch_size:
        training["auto_find_batch_size"] = True
    settings = {"data": asdict(data_args), "model": model_args.used(), "training": training}
    # as a file gives it back: lists for tuples, text for the rest
    return json.loads(json.dumps(settings, default=str))


def recorded_settings(output_dir: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """Settings of the run that `output_dir` holds, which may differ in being shorter; {} where there is none.

    Raises:
        ValueError: They differ in more, and `fresh` does not say to start over; the message names in what. Or the
            folder holds other work, checkpoints of another program, or a model or files of somebody else.
    """
    there = read_record(output_dir, GROUPS, "a training")
    if not there:
        # also with fresh, which would delete them
        if list_checkpoints(output_dir) or unfinished_checkpoints(output_dir):
            raise ValueError(
                f"output_dir={str(output_dir)!r} holds checkpoints but no {SETTINGS_NAME} that says of which run; "
                "choose another --output_dir."
            )
        for folder in (output_dir, output_dir / "model"):
            check_results_folder(folder)
        check_nothing_is_overwritten(output_dir)
    recorded = {} if fresh else there
    differing = differing_settings(recorded, settings) if recorded else {}
    if not all(is_longer(name, *values) for name, values in differing.items()):
        shown = ", ".join(f"{name}: {before!r} there, {now!r} here" for name, (before, now) in differing.items())
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a run with other settings ({shown}); choose another --output_dir, "
            "or start over in it with --fresh."
        )
    return recorded


def check_nothing_is_overwritten(output_dir: Path) -> None:
    """Raise a ValueError where a first start would write into folders that hold somebody's files, or delete some."""
    for name in WRITTEN:
        folder = output_dir / name
        if (folder / "config.json").is_file() or not folder.exists():  # a model of ours, as was checked
            continue
        files = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else [name]
        if files:
            shown = ", ".join(files[:3]) + ", ..." * (len(files) > 3)
            raise ValueError(
                f"output_dir={str(output_dir)!r}: {folder} is there already ({shown}), and nothing says that a "
                "training made it; choose another --output_dir."
            )


def read_record(output_dir: Path, keys: Iterable[str], what: str) -> dict[str, Any]:
    """What a folder says of the work that it holds; {} where it holds none.

    Args:
        output_dir: The folder.
        keys: What every record of such work has.
        what: The work, such as "a training".

    Raises:
        ValueError: The folder is that of other work, or another program wrote the file.
    """
    path = output_dir / SETTINGS_NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not (isinstance(found, dict) and set(keys) <= set(found)):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a {SETTINGS_NAME} that is not of {what}; choose another "
            "--output_dir."
        )
    return found


def differing_settings(recorded: dict[str, Any], settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (there, here) of the arguments that differ.

    A run that was begun before an argument existed had what is its default now.
    """
    found = {}
    for group, arguments in GROUPS.items():
        there, here = recorded.get(group, {}), settings[group]
        defaults = {field.name: field.default for field in fields(arguments) if field.default is not MISSING}
        there = {name: defaults.get(name) for name in here} | there
        names = [name for name in {**there, **here} if name not in FREE]
        found |= {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}
    return with_one_batch(found, recorded.get("training", {}), settings["training"])


def with_one_batch(
    found: dict[str, tuple[Any, Any]], there: dict[str, Any], here: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What differs, with the images of a step in place of what they are made of.

    Args:
        found: Name -> (there, here).
        there, here: Arguments of the training that is recorded, and of this one.
    """
    if "processes" not in there:  # begun before it was noted: the others must be the same
        return {name: values for name, values in found.items() if name not in ("processes", "auto_find_batch_size")}
    if "processes" not in found or here.get("auto_find_batch_size"):  # which takes the size that a checkpoint has
        return found
    batches = [global_batch(side) for side in (there, here)]
    kept = {name: values for name, values in found.items() if name not in BATCH}
    if batches[0] == batches[1]:
        return kept
    there_and_here = [
        f"{batch} = {' x '.join(str(side.get(name)) for name in BATCH)}"
        for batch, side in zip(batches, (there, here), strict=True)
    ]
    return kept | {f"global batch = {' x '.join(BATCH)}": tuple(there_and_here)}


def global_batch(training: dict[str, Any]) -> int | None:
    """Images of a step over all processes; None where a record does not say."""
    numbers = [training.get(name) for name in BATCH]
    return math.prod(numbers) if all(isinstance(number, int) for number in numbers) else None


def is_longer(name: str, before: Any, now: Any) -> bool:
    """Whether an argument lets the same run go on for longer."""
    return name in ("num_train_epochs", "max_steps") and 0 < before < now  # max_steps = -1 is no length


def check_same_data(output_dir: Path, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise a ValueError where the run that the folder holds saw other images, labels or class names."""
    there, here = recorded.get("data_digest"), settings["data_digest"]
    if there not in (None, here):  # older runs noted none
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a run on other data: images, labels or names of classes have "
            f"changed since (digest {there} there, {here} here); choose another --output_dir, or start over in it "
            "with --fresh."
        )


def find_checkpoint(output_dir: Path) -> str | None:
    """The newest whole checkpoint to go on from, where `output_dir` holds a run.

    Raises:
        CheckpointError: It holds checkpoints, none of which can be used.
    """
    found = last_good_checkpoint(output_dir)
    return str(found) if found else None


def check_named_checkpoint(folder: str | None) -> None:
    """Check the checkpoint that the command line names, before anything is done for it.

    Raises:
        ValueError: It is no folder of a checkpoint.
        CheckpointError: It is damaged.
    """
    if folder is None:
        return
    if not Path(folder, STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint={folder!r} must be the folder of a checkpoint; it has no {STATE_NAME}."
        )
    if Path(folder, MANIFEST_NAME).is_file():  # another trainer's has none
        check_checkpoint(folder)


def record_start(
    output_dir: Path,
    recorded: dict[str, Any],
    settings: dict[str, Any],
    checkpoint: str | None,
    *,
    fresh: bool,
    resumed: str | None,
) -> str:
    """Record the settings in the output folder; returns what to say where a run goes on in another way, else "".

    Args:
        output_dir: Folder of the run.
        recorded: Settings of the run that the folder holds, {} without one.
        settings: Those of this start; it learns here at which lengths the run was started before.
        checkpoint: Where this start goes on from of itself, if anywhere.
        fresh: Whether to delete checkpoints, or a later start would go on from them.
        resumed: Checkpoint that the command line names, if any: it stays, as does the best one that it refers to.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        kept = {folder.resolve() for folder in with_its_best(resumed)}
        for folder in list_checkpoints(output_dir).values():
            if folder.resolve() not in kept:
                remove_checkpoint(folder)
    settings["shorter_before"], said = recorded.get("shorter_before", []), []
    lengths = differing_settings(recorded, settings) if recorded else {}
    if lengths:
        settings["shorter_before"] += [{name: before for name, (before, _) in lengths.items()}]
        changes = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in lengths.items())
        said.append(
            f"Going on for longer ({changes}) from {checkpoint or 'the start: there is no checkpoint'}. The schedule "
            "of the learning rate, and of eps where it warms up, is computed anew for the whole new length: the rate "
            "jumps to where that schedule is by now. So this is not the run that the new length would have been from "
            "the start; --fresh trains that."
        )
    there, here = (record.get("training", {}).get("processes") for record in (recorded, settings))
    if checkpoint and there and there != here:
        images = global_batch(settings["training"])
        said.append(
            f"Going on in {here} processes instead of {there}, with the same {images} images in a step: random "
            "numbers start anew, and a BatchNorm sees batches of another size. So this is not to the bit the run that "
            "it would have been."
        )
    if not recorded or lengths or "finished" in recorded:  # older runs did not say
        settings["finished"] = bool(recorded.get("finished")) and not lengths
    write_record(output_dir, settings)
    return "\n".join(said)


def with_its_best(checkpoint: str | None) -> list[Path]:
    """A checkpoint and the best one beside it that it refers to."""
    if checkpoint is None:
        return []
    folder = Path(checkpoint)
    best = json.loads((folder / STATE_NAME).read_text(encoding="utf-8")).get("best_model_checkpoint")
    return [folder, folder.parent / Path(best).name] if best else [folder]  # by its name: the folder may have moved


def write_record(output_dir: Path, settings: dict[str, Any]) -> None:
    """Write the record."""
    write_text(output_dir / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")


def record_end(output_dir: Path, finished: bool = True) -> None:
    """Record whether the run has finished, with all that follows the training."""
    write_record(output_dir, read_record(output_dir, GROUPS, "a training") | {"finished": finished})


def restart_text(output_dir: Path, checkpoint: str | None, steps: int) -> str:
    """What a start that is not the first of its run says; "" for the first.

    Args:
        output_dir: Folder of the run.
        checkpoint: Where this start goes on from, if anywhere.
        steps: Steps of the whole run.
    """
    if checkpoint is None:
        return ""
    done = int(Path(checkpoint).name.split("-")[1])
    if done < steps:
        return f"Going on from step {done} of {steps}, {checkpoint}."
    return (
        f"The run in {output_dir} has taken all of its {steps} steps: of what follows the training, only what is "
        "missing is done. --fresh trains anew, another --output_dir beside it."
    )


def shorter_before(output_dir: Path) -> list[dict[str, Any]]:
    """The lengths at which the run in a folder was started before, if at others."""
    return json.loads((output_dir / SETTINGS_NAME).read_text(encoding="utf-8"))["shorter_before"]


# --- what a run has left ---------------------------------------------------------------------------------------------


def holds_weights(folder: Path, model: nn.Module) -> bool:
    """Whether a folder holds a saved model with the weights of this one, all of them."""
    network = model.network if isinstance(model, NormalizedClassifier) else model
    if not (folder / "config.json").is_file():
        return False
    try:
        saved = type(network).from_pretrained(folder).state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError):  # another model, or half of one
        return False
    weights = network.state_dict()
    return saved.keys() == weights.keys() and all(
        torch.equal(saved[name].cpu(), tensor.cpu()) for name, tensor in weights.items()
    )


def whole_report(output_dir: Path) -> RobustnessReport | None:
    """The report beside the model that a run left; None where there is none, or one that was broken off."""
    try:
        report = RobustnessReport.load(output_dir / "model" / REPORT_NAME)
    except (OSError, ValueError):
        return None
    # a run notes last how it trained; a later evaluation keeps that, or knows of none
    return report if report.training or has_finished(output_dir) else None


def has_finished(output_dir: Path) -> bool | None:
    """Whether the run in a folder did all that follows the training; None where an older one does not say."""
    return read_record(output_dir, GROUPS, "a training").get("finished")


__all__ = [
    "check_named_checkpoint",
    "check_same_data",
    "find_checkpoint",
    "has_finished",
    "holds_weights",
    "record_end",
    "record_start",
    "recorded_settings",
    "restart_text",
    "settings_of",
    "shorter_before",
    "whole_report",
]
