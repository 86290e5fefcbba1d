"""The record in the output folder of a training: its settings and data, so that only the same run resumes there."""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from ..evaluation.environment import write_text
from ..models.loading import check_results_folder
from ..trainer.arguments import RobustTrainingArguments
from ..trainer.checkpoints import last_good_checkpoint, list_checkpoints, remove_checkpoint
from .arguments import DataArguments, ModelArguments

SETTINGS_NAME = "settings.json"
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
# with load_best_model_at_end it also matters when is evaluated, and for what
SELECTION = ("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps")


def settings_of(
    data_args: DataArguments, model_args: ModelArguments, args: RobustTrainingArguments
) -> dict[str, dict[str, Any]]:
    """Settings that make two runs the same, fit for JSON; without where they write and how they report."""
    ours = {name: getattr(args, name) for name in RobustTrainingArguments.__annotations__ if name not in FREE}
    shared = TRAINER_SETTINGS + (SELECTION if args.load_best_model_at_end else ())
    training = ours | {name: getattr(args, name) for name in shared}
    settings = {"data": asdict(data_args), "model": model_args.used(), "training": training}
    # as a file gives it back: lists for tuples, text for the rest
    return json.loads(json.dumps(settings, default=str))


def recorded_settings(output_dir: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """Settings of the run that `output_dir` holds, which may differ in being shorter; {} where there is none.

    Raises:
        ValueError: They differ in more, and `fresh` does not say to start over; the message names in what. Or the
            folder holds other work, checkpoints of another program, or a model of somebody else.
    """
    there = read_record(output_dir, GROUPS, "a training")
    if not there:
        if list_checkpoints(output_dir):  # also with fresh, which would delete them
            raise ValueError(
                f"output_dir={str(output_dir)!r} holds checkpoints but no {SETTINGS_NAME} that says of which run; "
                "choose another --output_dir."
            )
        for folder in (output_dir, output_dir / "model"):
            check_results_folder(folder)
    recorded = {} if fresh else there
    differing = differing_settings(recorded, settings) if recorded else {}
    if not all(is_longer(name, *values) for name, values in differing.items()):
        shown = ", ".join(f"{name}: {before!r} there, {now!r} here" for name, (before, now) in differing.items())
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a run with other settings ({shown}); choose another --output_dir, "
            "or start over in it with --fresh."
        )
    return recorded


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
    return found


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


def record_start(
    output_dir: Path, recorded: dict[str, Any], settings: dict[str, Any], checkpoint: str | None, clear: bool
) -> str:
    """Record the settings in the output folder; returns what to say where a run is gone on with for longer, else "".

    Args:
        recorded: Settings of the run that the folder holds, {} without one.
        settings: Those of this start; it learns here at which lengths the run was started before.
        checkpoint: Where this start goes on from, if anywhere.
        clear: Whether to delete checkpoints, or a later start would go on from them.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder in list_checkpoints(output_dir).values() if clear else ():
        remove_checkpoint(folder)
    settings["shorter_before"], longer = recorded.get("shorter_before", []), ""
    if lengths := differing_settings(recorded, settings) if recorded else {}:
        settings["shorter_before"] += [{name: before for name, (before, _) in lengths.items()}]
        changes = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in lengths.items())
        longer = (
            f"Going on for longer ({changes}) from {checkpoint or 'the start: there is no checkpoint'}. The schedule "
            "of the learning rate, and of eps where it warms up, is computed anew for the whole new length: the rate "
            "jumps to where that schedule is by now. So this is not the run that the new length would have been from "
            "the start; --fresh trains that."
        )
    write_text(output_dir / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")
    return longer


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
        f"The run in {output_dir} has taken all of its {steps} steps: only what follows the training is done again. "
        "--fresh trains anew, another --output_dir beside it."
    )


def shorter_before(output_dir: Path) -> list[dict[str, Any]]:
    """The lengths at which the run in a folder was started before, if at others."""
    return json.loads((output_dir / SETTINGS_NAME).read_text(encoding="utf-8"))["shorter_before"]


__all__ = ["check_same_data", "find_checkpoint", "record_start", "recorded_settings", "settings_of", "shorter_before"]
