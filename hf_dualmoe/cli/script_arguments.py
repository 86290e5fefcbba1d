"""What `training/evaluate.py` and `training/certify.py` share: arguments, the images, and where results go."""

import hashlib
import logging
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ..data.datasets import DataSplits, ImageTensorDataset, load_splits
from ..models.loading import check_results_folder, load_classifier

LONGEST_NAME = 80  # characters of the model's name in that of a folder

logger = logging.getLogger(__name__)


class ScriptParser(ArgumentParser):
    """A parser whose errors are one line: the usage of 40 arguments would hide them."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2 and the message alone."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def model_parser(description: str, splits: Sequence[str]) -> ScriptParser:
    """A parser that reads which saved model is looked at, and on which images.

    Args:
        description: What the script does, in one line.
        splits: Arguments that name a split of the dataset, such as "test_split".
    """
    parser = ScriptParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Saved folder or Hub id of an image classifier, of any kind.")
    add("--revision", default="main", help="Branch, tag or commit of a model on the Hub.")
    add("--trust_remote_code", action="store_true", help="Run model code that comes with the model.")
    texts = {"mean": "Mean", "std": "Standard deviation"}
    for name, text in texts.items():
        help_text = f"{text} that the model's images are normalised by; default: as its image processor does."
        add(f"--image_{name}", type=float, nargs="+", help=help_text)
    add("--image_size", type=int, help="Size of the images, where neither config nor image processor says it.")
    add("--dataset_name", default="digits", help="digits, a dataset id on the Hub, a folder, a .parquet file.")
    for name in ("dataset_config_name", "image_column", "label_column", *splits):
        add(f"--{name}", help="As in training/run.py.")
    add("--max_test_samples", type=int, help="Test images to use, with the class shares of the whole; default: all.")
    add("--on_bad_image", choices=("raise", "skip"), default="raise", help="What to do with undecodable images.")
    add("--ignore_class_names", action="store_true", help="Compare the number of classes only, not their names.")
    return parser


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
        path = folder.relative_to(here) if folder.is_relative_to(here) else folder
        identity, parts = path.as_posix(), path.relative_to(path.anchor).parts or (folder.name,)
    else:
        identity, parts = f"Hub: {model}@{revision}", model.split("/")
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return Path("outputs", f"{work}-{'-'.join(parts[-2:])[-LONGEST_NAME:]}-{digest}")


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


def load_images(args: Namespace, model: nn.Module, **options: Any) -> DataSplits:
    """The images, at the size and with the channels that the model takes; of train none are needed.

    Labels are those of the model: where it knows all class names of the data, they are matched by name.

    Args:
        args: What a `model_parser` with "test_split" read.
        model: Model whose config has `image_size`.
        **options: Further arguments of `load_splits`.

    Raises:
        ValueError: There are fewer test images than asked for, all have one label that the model does not know, or
            what `load_splits` refuses.
    """
    names = ("image_column", "label_column", "test_split", "on_bad_image")
    options |= {name: getattr(args, name) for name in names}
    options |= {"image_size": model.config.image_size, "num_channels": getattr(model.config, "num_channels", None)}
    options |= {"config_name": args.dataset_config_name, "needs_train": False}
    data = load_splits(args.dataset_name, max_train_samples=1, **options)
    if (asked := args.max_test_samples) is not None and not 1 <= asked <= len(data.test):
        raise ValueError(
            f"max_test_samples={asked!r}, but the dataset has {len(data.test)} test images; allowed is 1 to "
            f"{len(data.test)}."
        )
    names = getattr(model.config, "id2label", None) or {}
    names = [str(names[i]) for i in sorted(names)]
    if len(data.class_names) == 1 and (args.ignore_class_names or data.class_names[0] not in names):
        raise ValueError(
            f"all {len(data.test)} test images have one label, {data.class_names[0]!r}; that is enough only where the "
            f"model has a class of that name and names are compared. It has {len(names)}: {', '.join(names[:10])}."
        )
    return data if args.ignore_class_names else match_classes(data, names)


def match_classes(data: DataSplits, names: Sequence[str]) -> DataSplits:
    """The data with the labels of a model, by the names of the classes.

    Args:
        data: Any data; where a class has no name among `names`, or a name stands twice, they come back as they are.
        names: Name of each class of the model, in label order.
    """
    if data.class_names == list(names) or not set(data.class_names) <= set(names) or len(set(names)) < len(names):
        return data
    label_of = torch.tensor([list(names).index(name) for name in data.class_names])
    sets = data.sets.items()
    sets = {role: ImageTensorDataset(part.images, label_of[part.labels], names, part.rows) for role, part in sets}
    count = f"{len(label_of)} of {len(names)} classes"
    logger.warning("%s has %s of the model, matched by name: %s", data.name, count, ", ".join(data.class_names[:10]))
    return replace(data, **sets, name=data.name if len(label_of) == len(names) else f"{data.name} ({count})")


__all__ = [
    "ScriptParser",
    "add_run_arguments",
    "load_images",
    "load_model",
    "match_classes",
    "model_parser",
    "output_folder",
]
