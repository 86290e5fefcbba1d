"""Shared by the scripts that look at saved models: arguments, the images, and where results go."""

import hashlib
import logging
import math
import os
import re
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from huggingface_hub import hf_hub_download
from torch import nn

from ..data.datasets import DataSplits, ImageTensorDataset, load_splits
from ..evaluation.report import RobustnessReport
from ..models.class_names import are_generic, labels_of, match_names
from ..models.loading import check_results_folder, is_foreign, load_classifier

DATA_HELP = {  # of arguments that scripts and the training share
    "dataset_config_name": "Configuration of a Hub dataset.",
    "image_column": "Column of images; default: detected.",
    "label_column": "Column of labels; default: detected.",
    "train_split": "Name of the training split; default: detected.",
    "validation_split": "Split for model selection; default: detected.",
    "test_split": "Split for the final report; default: detected.",
}
SPLITS = ("train_split", "validation_split", "test_split")
# where nothing is given or recorded; 42 is transformers' default --seed, which the training cuts its splits with
USUAL_CUT = {"split_seed": 42, "validation_fraction": 0.1}
LONGEST_NAME = 80  # characters of the model's name in that of a folder
LONGEST_WAIT = timedelta(days=30)  # of a process for the slowest; the default gives up after minutes

logger = logging.getLogger(__name__)


class ScriptParser(ArgumentParser):
    """A parser that shows defaults where they say something; its errors are one line: a long usage would hide them.

    Args:
        description: What the script does, in one line.
    """

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=ArgumentDefaultsHelpFormatter)

    def format_help(self) -> str:
        """Help without the defaults None, False and an empty list."""
        # not 0, which equals False
        actions = [a for a in self._actions if a.default is None or a.default is False or a.default == []]
        kept = [action.default for action in actions]
        try:
            for action in actions:
                action.default = SUPPRESS
            return super().format_help()
        finally:
            for action, default in zip(actions, kept, strict=True):
                action.default = default

    def error(self, message: str) -> NoReturn:
        """Leave with status 2 and the message alone."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def create_accelerator() -> Accelerator:
    """The accelerator of a script that measures: its processes wait for each other as long as it takes.

    Apple GPUs are not used, and the main process says so: they have no double precision.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_apple = device is not None and device.type == "mps"
    # launched on CPUs alone, accelerate would start unconnected processes unless told
    on_cpu = device is None or is_apple
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    if is_apple:
        text = "Apple GPUs have no double precision, which the evaluation needs: it runs on the CPU."
        accelerator.print(text, flush=True)
    return accelerator


def model_parser(description: str) -> ScriptParser:
    """A parser that reads which saved model is looked at, and on which images.

    Args:
        description: What the script does, in one line.
    """
    parser = ScriptParser(description)
    add = parser.add_argument
    add("--model", required=True, help="Saved folder or Hub id of an image classifier, of any kind.")
    add("--revision", default="main", help="Branch, tag or commit of a model on the Hub.")
    add("--trust_remote_code", action="store_true", help="Run model code that comes with the model.")
    add_normalisation_arguments(parser)
    add("--image_size", type=int, help="Size of the images, where neither config nor image processor says it.")
    add_data_arguments(parser)
    return parser


def add_normalisation_arguments(parser: ArgumentParser, part: str = "") -> None:
    """Add the normalisation of a model, or of one part, whose name goes before theirs: "standard_"."""
    for name, text in {"mean": "Mean", "std": "Standard deviation"}.items():
        help_text = f"{text} that the model's images are normalised by; default: as its image processor does."
        parser.add_argument(f"--{part}image_{name}", type=float, nargs="+", help=help_text)


def add_data_arguments(parser: ArgumentParser) -> None:
    """Add which images are looked at, and how splits that the dataset lacks were cut from train."""
    add = parser.add_argument
    add("--dataset_name", default="digits", help="digits, a dataset id on the Hub, a folder, a .parquet file.")
    for name in ("dataset_config_name", "image_column", "label_column", *SPLITS):
        add(f"--{name}", help=DATA_HELP[name])
    texts = {
        "split_seed": "--seed of the training: keeps held-out images the same",
        "validation_fraction": "As in the training, where splits were cut from train",
    }
    for name, usual in USUAL_CUT.items():  # None = not given
        known = f"default: as the model's results.json records it, else {usual}"
        add(f"--{name}", type=type(usual), help=f"{texts[name]}; {known}.")
    add("--max_test_samples", type=int, help="Test images to use, with the class shares of the whole; default: all.")
    add("--on_bad_image", choices=("raise", "skip"), default="raise", help="What to do with undecodable images.")
    add("--ignore_class_names", action="store_true", help="Compare the number of classes only, not their names.")


def add_run_arguments(parser: ArgumentParser, work: str, results: str, *, batch: str, seed: str) -> None:
    """Add how the work is done and where its results go.

    Args:
        parser: Where to add them.
        work: The script's name, with which the default output folder begins.
        results: What the folder holds afterwards.
        batch, seed: Help of these two.
    """
    add = parser.add_argument
    add("--batch_size", type=int, default=256, help=batch)
    add("--seed", type=int, default=0, help=seed)
    add("--output_dir", help=f"Where to write; default: outputs/{work}-<end and digest of the model's path>.")
    add("--fresh", action="store_true", help=f"Start over in an output_dir that holds {results}.")
    add("--disable_tqdm", action="store_true", help="Show no progress bars.")


def output_folder(work: str, model: str, revision: str = "main") -> Path:
    """The default folder for results on a model: another one for each model, the same whenever it is asked for.

    Its name ends with a digest: of the model's whole path seen from the current folder, or of its Hub id and revision.

    Args:
        work: First word of the name.
        model: Folder or Hub id.
        revision: Of a model on the Hub.
    """
    if Path(model).is_dir():
        folder, here = Path(model).resolve(), Path.cwd()
        # a project that moves keeps its folders
        path = folder.relative_to(here) if folder.is_relative_to(here) else folder
        identity, parts = path.as_posix(), path.relative_to(path.anchor).parts or (folder.name,)
    else:
        identity, parts = f"Hub: {model}@{revision}", model.split("/")
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]  # a/b-c and a-b/c have one name
    return Path("outputs", f"{work}-{'-'.join(parts[-2:])[-LONGEST_NAME:]}-{digest}")


def check_apart_from_data(output_dir: str | os.PathLike, dataset_name: str) -> None:
    """Raise a ValueError where results would be written among the images: the next start would read them as such."""
    images = Path(dataset_name).expanduser()
    inside = images.is_dir() and Path(output_dir).resolve().is_relative_to(images.resolve())
    if inside and dataset_name != "digits":
        raise ValueError(
            f"output_dir={os.fspath(output_dir)!r} lies in the folder of dataset_name={dataset_name!r}, and what is "
            "written there would be read as data; choose another --output_dir."
        )


def check_own_files(folder: str | os.PathLike, readers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Refuse to replace files of another program, before anything is measured.

    Args:
        folder: Where results will be written.
        readers: Name of a file -> what reads one of ours, and raises an error where it is none.

    Raises:
        ValueError: There is a file of such a name that is not ours; the message says which.
    """
    for name, read in readers.items():
        path = Path(folder, name)
        try:
            if path.exists():
                read(path)
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} would be replaced, and hf_dualmoe did not write it ({' '.join(str(error).split())}); move it "
                "away, or choose another --output_dir."
            ) from error


def load_model(args: Namespace, *, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    """The model as a classifier of [0, 1] images.

    Args:
        args: What a `model_parser` read, and `output_dir`.
        dtype: Of its weights.

    Raises:
        ValueError: As `load_classifier`, or results would be written into the folder of somebody else's model.
    """
    check_results_folder(args.output_dir)
    names = ("image_mean", "image_std", "image_size", "revision", "trust_remote_code")
    return load_classifier(args.model, **{name: getattr(args, name) for name in names}, dtype=dtype)


def load_images(
    args: Namespace, model: nn.Module, trained: Mapping[str, str] | None = None, *, dial: bool = True
) -> DataSplits:
    """The images, at the size and with the channels that the model takes; of train none are needed.

    Labels are those of the model: classes are matched by name, and the match is said where names or order differ.
    Splits that the dataset lacks are cut from train as the training did, by what the reports of `trained` record.

    Args:
        args: What a parser with `add_data_arguments` read.
        model: Model whose config has `image_size`.
        trained: The model as it was named, or each of its parts, and its revision on the Hub.
        dial: Whether validation images are used too, such as for the choice of the dial.

    Raises:
        ValueError: There are fewer test images than asked for, all have one label that the model does not know,
            `output_dir` lies among the images, or what `load_splits` and `match_classes` refuse.
    """
    import datasets  # takes a second

    check_apart_from_data(args.output_dir, args.dataset_name)
    options = {name: getattr(args, name) for name in ("image_column", "label_column", *SPLITS, "on_bad_image")}
    recorded = {name: recorded_cut(name, revision) for name, revision in (trained or {}).items()}
    cut = {name: choose_cut(getattr(args, name), name, recorded) for name in USUAL_CUT}
    options |= {"seed": cut["split_seed"], "validation_fraction": cut["validation_fraction"]}
    options |= {"image_size": model.config.image_size, "num_channels": getattr(model.config, "num_channels", None)}
    options |= {"config_name": args.dataset_config_name, "needs_train": False}
    if args.disable_tqdm:
        datasets.disable_progress_bars()
    data = load_splits(args.dataset_name, max_train_samples=1, **options)  # of train only the class names are needed
    tell_cut(args, data, cut, recorded, ("test", "validation") if dial else ("test",))
    if (asked := args.max_test_samples) is not None and not 1 <= asked <= len(data.test):
        raise ValueError(
            f"max_test_samples={asked!r}, but the dataset has {len(data.test)} test images; allowed is 1 to "
            f"{len(data.test)}."
        )
    names = labels_of(model.config)
    if len(data.class_names) == 1 and (args.ignore_class_names or None in match_names(data.class_names, names)):
        raise ValueError(
            f"all {len(data.test)} test images have one label, {data.class_names[0]!r}; that is enough only where the "
            f"model has a class of that name and names are compared. It has {len(names)}: {', '.join(names[:10])}."
        )
    if args.ignore_class_names or not names or are_generic(names):  # nothing to match by
        if data.class_names != list(names):
            pairs = "; ".join(f"{label} = {name!r}" for label, name in enumerate(data.class_names[:10]))
            logger.warning("Names of classes are not compared; labels of the model are read as %s", pairs)
        return data
    return match_classes(data, names)


def read_earlier(folder: str | os.PathLike) -> RobustnessReport | None:
    """The report beside a saved model, which tells how it was trained; None where there is none of ours.

    Raises:
        ValueError: The model is ours, and its results.json is no report.
    """
    path = Path(folder, "results.json")
    return RobustnessReport.load(path) if path.is_file() and not is_foreign(folder) else None


def report_beside(model: str, revision: str = "main") -> RobustnessReport | None:
    """The report beside a model, a folder or one on the Hub, as a hint; None where there is none that can be read."""
    with suppress(Exception):  # no report, no connection, or a report of a later version
        if Path(model).is_dir():
            return read_earlier(model)
        return RobustnessReport.load(hf_hub_download(model, "results.json", revision=revision))
    return None


def recorded_cut(model: str, revision: str = "main") -> dict[str, Any]:
    """What the report beside a model, a folder or one on the Hub, records of how its training cut splits from train.

    The seed and, where it is known, the fraction, as in `USUAL_CUT`; and the number of `held_out` validation images.
    """
    if (report := report_beside(model, revision)) is None:
        return {}
    found = {"split_seed": report.seeds.get("training"), **report.training}
    number = re.match(r"(\d+) images held out of train$", str(report.training.get("selected_on")))
    found["held_out"] = int(number[1]) if number else None
    return {name: found[name] for name in (*USUAL_CUT, "held_out") if found.get(name) is not None}


def choose_cut(given: Any, name: str, recorded: Mapping[str, Mapping[str, Any]]) -> Any:
    """How splits are cut from train: as given, else as the first of the reports that records it, else as usual."""
    known = [cut[name] for cut in recorded.values() if name in cut]
    return given if given is not None else next(iter(known), USUAL_CUT[name])


def tell_cut(
    args: Namespace,
    data: DataSplits,
    cut: Mapping[str, Any],
    recorded: Mapping[str, Mapping[str, Any]],
    used: Sequence[str],
) -> None:
    """Say where what is recorded of a training decided which images are used, and warn where it was not followed.

    Args:
        args: The arguments as given.
        data: The images.
        cut: How those that the dataset has no split for were cut from train.
        recorded: Folder of a model -> what its report says of that.
        used: Roles that matter.
    """
    if not (roles := [role for role in used if role in data.held_out]):
        return  # the dataset has splits for all: no seed chose them
    what = f"{' and '.join(roles)} images, which are cut from train"
    for folder, there in recorded.items():
        for name, value in cut.items():
            if name in there and there[name] != value:
                logger.warning(
                    "%s=%r, but the training of %s had %r: some of the %s, may be images that this model was trained "
                    "on, and its numbers too good.%s",
                    name,
                    value,
                    folder,
                    there[name],
                    what,
                    "" if getattr(args, name) is None else f" Leave --{name} out to have the same images.",
                )
            elif name in there and getattr(args, name) is None:
                logger.warning("%s=%r, as in the training of %s: it chooses the %s.", name, value, folder, what)
        images = data.validation if "validation" in roles else None
        if images is not None and "validation_fraction" not in there and len(images) > there.get("held_out", math.inf):
            logger.warning(
                "%d validation images are cut from train, but the training of %s held out %d: some may be images that "
                "it was trained on. Give the --validation_fraction of the training.",
                len(images),
                folder,
                there["held_out"],
            )


def match_classes(data: DataSplits, names: Sequence[str]) -> DataSplits:
    """The data with the labels of a model, by the names of the classes; see `match_names`.

    Args:
        data: Any data. As many classes as the model has, some of which it does not know, come back as they are: the
            evaluation will say where they differ.
        names: Name of each class of the model, in label order.

    Raises:
        ValueError: Some classes of the data are not among those of the model; the message names the first.
    """
    if data.class_names == list(names):
        return data
    found = match_names(data.class_names, names)
    unknown = [name for name, at in zip(data.class_names, found, strict=True) if at is None]
    if unknown and len(names) == len(data.class_names):  # perhaps the same classes in other words
        return data
    if unknown:
        raise ValueError(
            f"dataset has {len(found)} classes ({shortened(data.class_names)}) but the model has {len(names)} "
            f"({shortened(names)}), and {len(unknown)} of the dataset's are not among them: {shortened(unknown)}."
        )
    return relabelled(data, found, names)


def relabelled(data: DataSplits, found: Sequence[int], names: Sequence[str]) -> DataSplits:
    """The data with the label `found[i]` for class i, in a model whose classes have these names; says the match."""
    label_of, sets = torch.tensor(found), data.sets.items()
    sets = {role: ImageTensorDataset(part.images, label_of[part.labels], names, part.rows) for role, part in sets}
    count = f"{len(found)} of {len(names)} classes"
    pairs = [
        name if name == names[at] else f"{name} = {names[at]!r}"
        for name, at in zip(data.class_names, found, strict=True)
    ]
    logger.warning("%s has %s of the model, matched by name: %s", data.name, count, "; ".join(pairs[:10]))
    return replace(data, **sets, name=data.name if len(found) == len(names) else f"{data.name} ({count})")


def shortened(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(map(str, names[:4])) + ", ..." * (len(names) > 4)


__all__ = [
    "SPLITS",
    "ScriptParser",
    "add_data_arguments",
    "add_normalisation_arguments",
    "add_run_arguments",
    "check_own_files",
    "choose_cut",
    "create_accelerator",
    "load_images",
    "load_model",
    "match_classes",
    "model_parser",
    "output_folder",
    "read_earlier",
    "recorded_cut",
    "relabelled",
    "report_beside",
]
