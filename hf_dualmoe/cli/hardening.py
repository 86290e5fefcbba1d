"""Hardening (`--model_name_or_path`): train a finished classifier of any architecture further, under attack.

In calling order of `training/run.py`: refuse what cannot work, load, agree on the classes, measure before.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from ..data.datasets import DataSplits
from ..evaluation.evaluation import evaluate_robustness, parts_of
from ..hub.model_card import model_name
from ..models.class_names import are_generic, labels_of, match_names
from ..models.loading import load_classifier
from ..models.new_head import rename_classes, with_new_head
from ..trainer.time_estimate import random_numbers_kept
from ..trainer.trainer import RobustTrainer
from .arguments import SIZE, ModelArguments
from .help_text import OF_A_TRAINED_MODEL
from .script_arguments import relabelled, shortened

METHODS = ("standard", "at", "trades")
INSTEAD = {
    "rt_er": "it trains a mixture of experts. Give --method at or trades; or, for a new mixture whose experts start "
    "from a trained one of ours, --init_experts_from instead",
    "jtdmoe": "it trains a dual model. Give --method at or trades, then join the hardened model and its start: "
    "hf-dualmoe join",
    "certified": "it needs 1-Lipschitz backbones. Give --method at or trades; or --recipe digits_certified, without "
    "model_name_or_path",
}
BEFORE = "before hardening"  # the name of those numbers on the card
STRONGER = ("worst_case", "autoattack")  # parts of a report that are numbers of the whole model


def check_start_is_kept(model_args: ModelArguments, output_dir: Path) -> None:
    """Raise a ValueError where a run would write into the folder of the model that it starts from, or delete it."""
    for name in ("model_name_or_path", "init_experts_from"):
        folder = Path(getattr(model_args, name) or "")
        if not getattr(model_args, name) or not folder.exists():  # on the Hub
            continue
        if folder.resolve().is_relative_to(output_dir.resolve()):
            below = folder.resolve().relative_to(output_dir.resolve()).parts
            if not below or below[0] in ("model", "before", "unfinished") or below[0].startswith("checkpoint-"):
                raise ValueError(
                    f"{name}={str(folder)!r} would be overwritten by a run in output_dir={str(output_dir)!r}; choose "
                    "another --output_dir."
                )


def check_hardening(model_args: ModelArguments, method: str) -> None:
    """Refuse what cannot be done with a trained model, before it is loaded.

    Raises:
        ValueError: The method trains another kind of model, an argument describes a new one, or an argument for a
            trained one is given without one.
    """
    start, new = model_args.model_name_or_path, ModelArguments()
    # a parser does not tell what was given: what differs from its default was
    given = {n: value for n in new.__dataclass_fields__ if (value := getattr(model_args, n)) != getattr(new, n)}
    if start is None:
        if lost := [name for name in OF_A_TRAINED_MODEL if name in given]:
            raise ValueError(f"{lost[0]}={given[lost[0]]!r} is for a trained model: give model_name_or_path as well.")
        return
    if method not in METHODS:
        raise ValueError(f"method={method!r} does not harden model_name_or_path={start!r}: {INSTEAD[method]}.")
    shape = [f"{name}={value!r}" for name, value in given.items() if name not in (*OF_A_TRAINED_MODEL, *SIZE)]
    if shape:
        raise ValueError(
            f"model_name_or_path={start!r} has its own architecture, but {', '.join(shape)} "
            "would describe a new network: leave that out, on the command line and in the recipe (--recipe harden has "
            "none of it)."
        )


def load_start(model_args: ModelArguments) -> nn.Module | None:
    """The trained classifier to go on from, as one of [0, 1] images; None where none is named.

    Raises:
        ValueError: As `load_classifier`.
    """
    if model_args.model_name_or_path is None:
        return None
    return load_classifier(
        model_args.model_name_or_path,
        image_mean=model_args.image_mean,
        image_std=model_args.image_std,
        image_size=model_args.image_size,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
    )


def agree_on_classes(
    model: nn.Module, data: DataSplits, ignore_names: bool = False
) -> tuple[nn.Module, DataSplits, str]:
    """The model and the data with the same classes in the same order, and what was done for it, in a line.

    Where the model knows all classes of the data by name it keeps its head, and the data get its labels. Where its
    classes have no names, and there are as many, it keeps its head and takes over the names. Else it gets a new head.

    Args:
        model: What `load_start` gave.
        data: Images and labels.
        ignore_names: Whether label i of the data is class i of the model, whatever their names.

    Raises:
        ValueError: Names are ignored, and the numbers of classes differ.
    """
    names, wanted = labels_of(model.config), data.class_names
    if ignore_names:
        if len(names) != len(wanted):
            raise ValueError(
                f"ignore_class_names=True: the data have {len(wanted)} classes ({shortened(wanted)}) and the model "
                f"{len(names)} ({shortened(names)}); expected as many."
            )
        data = data if names == wanted else relabelled(data, range(len(names)), names)
        return model, data, f"keeps its head: its {len(names)} classes are those of the data, in order"
    if are_generic(names) and len(names) == len(wanted):  # LABEL_0, ...: only the order can tell
        rename_classes(model, wanted)
        return (
            model,
            data,
            f"keeps its head: its {len(names)} classes have no names and take those of the data, in order: "
            + "; ".join(f"{label} = {name!r}" for label, name in enumerate(wanted[:10])),
        )
    found = match_names(wanted, names)
    if None not in found:
        data = data if names == wanted else relabelled(data, found, names)  # the head stays, so its labels count
        return (
            model,
            data,
            f"keeps its head: all {len(wanted)} classes of the data are among its {len(names)}, by name",
        )
    unknown = [name for name, at in zip(wanted, found, strict=True) if at is None]
    return (
        with_new_head(model, wanted),
        data,
        f"gets a new head: {len(unknown)} of the {len(wanted)} classes of the data are not among its {len(names)} "
        f"({shortened(unknown)})",
    )


def measure_before(trainer: RobustTrainer, data: DataSplits, level: str, folder: Path, fresh: bool) -> dict[str, Any]:
    """SA and RA of the model as it is now, on the test images; a later call finds finished measurements in `folder`.

    Args:
        trainer: Its model has not been trained; all processes call.
        data: Its test images are measured, by the attacks that the closing report of this level will use.
        level: Of the report, see `evaluate_robustness`.
        folder: Where to keep measurements and results.json.
        fresh: Start over in it.

    Returns:
        `metrics` of the report.
    """
    args = trainer.args
    with random_numbers_kept(args.device):  # the training draws the same, measured or found
        report = evaluate_robustness(
            trainer.model,
            data.test,
            eps=args.eps,
            norm=args.norm,
            seed=args.seed,
            batch_size=args.per_device_eval_batch_size,
            dataset_name=data.name,
            # the rest is no number for comparison
            level=[part for part in parts_of(level, args.eps) if part in STRONGER],
            path=folder / "results.json",
            resume_dir=folder / "measurements",
            fresh=fresh,
            progress=not args.disable_tqdm,
            accelerator=trainer.accelerator,
        )
    return report.metrics


def start_facts(model_args: ModelArguments) -> dict[str, str]:
    """Facts about the hardened model for a report: its name, and the licence on its card."""
    start = model_args.model_name_or_path
    return {} if start is None else {"started_from": short_name(start), "license": licence_of(start)}


def short_name(start: str) -> str:
    """A model as reports name it: its id on the Hub, or of a folder its own name and not its place."""
    return model_name(Path(start)) if Path(start).is_dir() else start


def licence_of(start: str) -> str:
    """The licence on a model's card; "other" where there is none to be read."""
    folder, licence = Path(start), None
    with suppress(Exception):  # no card, no connection, or metadata that nobody can read
        licence = ModelCard.load(folder / "README.md" if folder.is_dir() else start).data.license
    return licence or "other"


__all__ = [
    "BEFORE",
    "agree_on_classes",
    "check_hardening",
    "licence_of",
    "load_start",
    "measure_before",
    "short_name",
    "start_facts",
]
