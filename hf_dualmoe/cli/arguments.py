"""Command line of the training script: data and model arguments, recipes, and a `--help` that a person can read."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import timm
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from ..data.datasets import DataSplits
from ..losses.certified import LIPSCHITZ
from ..models.configuration_dualmoe import DualMoEConfig, MoEConfig
from ..trainer.arguments import PixelValue, RobustTrainingArguments
from .help_text import OF_A_TRAINED_MODEL, grouped_help
from .script_arguments import DATA_HELP, output_folder

SIZE = ("image_size",)  # of any model
TRAINER_OUTPUT = "trainer_output"  # what transformers fills in where no output_dir is given

logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    """What to train on; see `load_splits` for the rules."""

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "digits (embedded), a dataset id on the Hub, a folder of images (CLASS/IMAGE, or "
            "train/CLASS/IMAGE and test/CLASS/IMAGE) or parquet, a .parquet file."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": DATA_HELP["dataset_config_name"]})
    image_column: str | None = field(default=None, metadata={"help": DATA_HELP["image_column"]})
    label_column: str | None = field(default=None, metadata={"help": DATA_HELP["label_column"]})
    train_split: str | None = field(default=None, metadata={"help": DATA_HELP["train_split"]})
    validation_split: str | None = field(default=None, metadata={"help": DATA_HELP["validation_split"]})
    test_split: str | None = field(default=None, metadata={"help": DATA_HELP["test_split"]})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of train for each set that must be held out of it, in (0, 1)."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_validation_samples: int | None = field(default=None, metadata={"help": "Select on so many images only."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Report on so many images only."})
    on_bad_image: str = field(
        default="raise",
        metadata={"help": "Undecodable images: raise (after listing all) or skip.", "choices": ("raise", "skip")},
    )


@dataclass
class ModelArguments:
    """What to train: a network of ours (see `MoEConfig`, `DualMoEConfig`) or a trained one (see `load_classifier`)."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Harden this image classifier instead of training a new one: a saved folder or Hub id of any "
            "architecture that transformers loads; method standard, at or trades."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the model."})
    image_mean: list[float] | None = field(
        default=None,
        metadata={"help": "Mean that the model's images are normalised by; default: as its image processor does."},
    )
    image_std: list[float] | None = field(
        default=None,
        metadata={"help": "Standard deviation of that normalisation; default: as its image processor does."},
    )
    ignore_class_names: bool = field(
        default=False,
        metadata={"help": "Label i of the data is class i of the model to harden, whatever they are called."},
    )
    backbone: str = field(default="resnet18", metadata={"help": "timm name of the experts' architecture."})
    backbone_kwargs: str | None = field(
        default=None, metadata={"help": "Further timm.create_model arguments as JSON, such as '{\"patch_size\": 4}'."}
    )
    stem: str = field(
        default="default",
        metadata={
            "help": "cifar (3x3 stride 1, no max-pool; images up to 64 px) or default.",
            "choices": ("cifar", "default"),
        },
    )
    width: str | None = field(
        default=None,
        metadata={"help": "Multiplier of a ResNet's channels (0.25), or its 4 stage channels (16,32,64,128)."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images in pixels; default: that of the data, or of a trained model."},
    )
    backbone_image_size: int | None = field(
        default=None, metadata={"help": "Side to which the model up-samples; eps stays in the image's own pixels."}
    )
    num_channels: int | None = field(default=None, metadata={"help": "1 or 3; default: that of the data."})
    num_experts: int = field(default=4, metadata={"help": "Experts of each mixture, >= 1 (paper: 4)."})
    router_top_k: int = field(default=1, metadata={"help": "Experts per image, 1 to num_experts (1 = hard routing)."})
    router: str = field(
        default="linear",
        metadata={
            "help": "What the router reads: linear (raw pixels, paper), pooled, conv, features (needs shared_stages).",
            "choices": ("linear", "pooled", "conv", "features"),
        },
    )
    shared_stages: int = field(default=0, metadata={"help": "Stages (ResNet) or blocks (ViT) shared by all experts."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss, >= 0."})
    pretrained: bool = field(default=False, metadata={"help": "Start every expert from timm's pretrained weights."})
    init_experts_from: str | None = field(
        default=None,
        metadata={
            "help": "Start every expert from a one-expert model ('upcycling'), or each mixture from a trained one of "
            "the same shape: folder or Hub id."
        },
    )
    mixing: str = field(
        default="probs",
        metadata={
            "help": "What the saved dial mixes: probs or logits of the two models, or their weights into one network "
            "(trained with probs mixed; needs pretrained or init_experts_from as a common start).",
            "choices": ("probs", "logits", "weights"),
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Dial of the saved dual model, in [0, 1]; default: train_alpha."}
    )

    def used(self) -> dict[str, Any]:
        """The arguments that say what is trained: those of a trained model, or those of a new one."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        of_trained = self.model_name_or_path is not None
        return {n: value for n, value in given.items() if n in SIZE or (n in OF_A_TRAINED_MODEL) == of_trained}

    def moe_config(self, data: DataSplits) -> MoEConfig:
        """The mixture's configuration for these data.

        Pixel mean and std are those of the training images. A 1-Lipschitz backbone gets the std 1/2 for all channels:
        its Lipschitz constant counts the smallest std, and so would lose margin in all other channels.
        """
        mean, std = data.train.channel_statistics
        return MoEConfig(
            backbone=self.backbone,
            backbone_kwargs=parse_json("backbone_kwargs", self.backbone_kwargs),
            stem=self.stem,
            width=parse_width(self.width),
            image_size=data.image_size,
            backbone_image_size=self.backbone_image_size,
            num_channels=data.num_channels,
            image_mean=[round(v, 4) for v in mean],
            # 0.01: a channel that is the same everywhere has std 0
            image_std=0.5 if self.backbone.startswith(LIPSCHITZ) else [max(round(v, 4), 0.01) for v in std],
            num_experts=self.num_experts,
            router_top_k=self.router_top_k,
            router=self.router,
            shared_stages=self.shared_stages,
            router_aux_loss_coef=self.router_aux_loss_coef,
            id2label=dict(enumerate(data.class_names)),
            label2id={name: i for i, name in enumerate(data.class_names)},
        )

    def dual_config(self, data: DataSplits, train_alpha: float) -> DualMoEConfig:
        """The dual model's configuration in training: two mixtures of the same shape, whose outputs are mixed."""
        alpha = train_alpha if self.alpha is None else self.alpha
        # no gradient reaches F_S and F_R through a merged network
        mixing = "probs" if self.mixing == "weights" else self.mixing
        return DualMoEConfig(standard=self.moe_config(data), robust=self.moe_config(data), alpha=alpha, mixing=mixing)


def parse_json(name: str, text: "str | dict | None") -> dict[str, Any] | None:
    """Read a JSON object given on the command line.

    Raises:
        ValueError: It is no JSON object; the message names the argument.
    """
    if text is None or isinstance(text, dict):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}={text!r} must be a JSON object, such as '{{\"patch_size\": 4}}'.")
    return value


def parse_width(text: "str | float | list | None") -> float | list[int] | None:
    """Read a width: None, a multiplier, or four stage channels "16,32,64,128".

    Raises:
        ValueError: It is neither.
    """
    if text is None or not isinstance(text, str):
        return text
    try:
        return [int(part) for part in text.split(",")] if "," in text else float(text)
    except ValueError as error:
        raise ValueError(
            f"width={text!r} must be a multiplier like 0.25 or four channels like 16,32,64,128."
        ) from error


# timm's modules of ResNets and ViTs, which `cut_backbone` can cut
WITH_STAGES = ("resnet", "resnest", "sknet", "vision_transformer", "vision_transformer_hybrid", "deit")
REPORTS = ("none", "quick", "standard", "full")


def default_recipe(dataset: str | None, start: str | None) -> str:
    """The recipe where none is named, for a dataset and a model to start from; None = not given."""
    if start is not None:
        return "harden"
    return "digits" if dataset in (None, "digits") else "own_images"


def same_share(value: Any, *, of: Any, at: str) -> Any:
    """The radius that is to `at` what `value` is to `of`; `value` where one of them is no radius, or `of` is 0."""
    try:
        part, whole, new = PixelValue(value), PixelValue(of), PixelValue(at)
    except ValueError:  # the parser will say what is wrong, and where
        return value
    return PixelValue(new * min(1.0, part / whole)) if whole > 0 else value


def fitting_shape(settings: dict[str, Any], backbone: str) -> dict[str, Any]:
    """A recipe's settings without those of its own backbone that another one does not take."""
    if settings.get("backbone") == backbone:
        return settings
    unfit = ["backbone_kwargs"]
    if not timm.models.is_model_in_modules(backbone, ["resnet"]):
        unfit.append("width")
    if not timm.models.is_model_in_modules(backbone, WITH_STAGES):
        unfit.append("shared_stages")
    dropped = [f"{name}={settings[name]!r}" for name in unfit if settings.get(name)]
    if dropped:
        logger.warning(
            f"backbone={backbone!r}: {', '.join(dropped)} of the recipe, for another backbone, is left out."
        )
    return {name: value for name, value in settings.items() if name not in unfit}


def or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The conversion of an argument, which also takes the word none: it unsets what a recipe gives."""

    @wraps(convert)  # argparse names it in errors
    def converted(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    return converted


class RecipeParser(HfArgumentParser):
    """Data, model and training arguments; a recipe (YAML) gives defaults that the command line overrides.

    The word none unsets an argument that may be left out, such as `--width none`.

    Args:
        recipes: Folder of the recipes that can be called by name.
        description: First lines of `--help`.
    """

    def __init__(self, recipes: Path, description: str):
        self.recipes = recipes
        self.named = sorted(path.stem for path in recipes.glob("*.yaml"))
        super().__init__(
            [DataArguments, ModelArguments, RobustTrainingArguments],
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        for action in self._actions:
            if action.default is None and action.nargs is None and action.type is not None:
                action.type = or_none(action.type)
        self.add_argument(
            "--recipe", help=f"Recipe to start from: a .yaml file, or one of {', '.join(self.named)}.", default=None
        )
        self.add_argument(
            "--fresh",
            action="store_true",
            help="Start over in an output_dir that holds a run; its checkpoints are deleted.",
        )
        self.add_argument(
            "--choose_alpha",
            action="store_true",
            help="Set the saved dial to the best alpha on the validation images.",
        )
        self.add_argument("--min_sa", type=float, help="With --choose_alpha: at least this SA, in percent.")
        self.add_argument("--min_ra", type=float, help="With --choose_alpha: at least this RA, in percent.")
        self.add_argument(
            "--report", choices=REPORTS, default="quick", help="What the final report measures, or none (no report)."
        )
        self.add_argument(
            "--estimate_time",
            nargs="?",
            const="only",
            choices=("only", "first"),
            help="Measure how long the run will take and print it; then stop, or train (first).",
        )
        self.add_argument("--help_all", action="help", help="Show all arguments, those of transformers' Trainer too.")

    def parse(
        self, args: list[str]
    ) -> tuple[DataArguments, ModelArguments, RobustTrainingArguments, argparse.Namespace]:
        """Parse a command line.

        A recipe's `standard_eps` keeps its share of eps when the command line changes eps alone. Its `router_top_k` is
        lowered to the number of experts that the command line asks for. What it says of the shape of its backbone is
        left out when the command line names one that does not take it.

        Raises:
            ValueError: The recipe does not exist or has an unknown key, or an argument is out of range.
        """
        # it cannot know what else an abbreviation may mean
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--recipe")
        first.add_argument("--dataset_name", "--dataset-name")
        first.add_argument("--eps")
        first.add_argument("--backbone")
        first.add_argument("--num_experts", "--num-experts")
        first.add_argument("--model_name_or_path", "--model-name-or-path")
        known, _ = first.parse_known_args(args)
        recipe = known.recipe or default_recipe(known.dataset_name, known.model_name_or_path)
        settings = self.read_recipe(recipe)
        if known.eps is not None and {"eps", "standard_eps"} <= set(settings):
            # with another eps the recipe's own number would be another share, or more than all of it
            settings["standard_eps"] = same_share(settings["standard_eps"], of=settings["eps"], at=known.eps)
        if known.backbone is not None:
            settings = fitting_shape(settings, known.backbone)
        experts = known.num_experts or ""
        if experts.isdigit() and int(experts) >= 1 and isinstance(top_k := settings.get("router_top_k"), int):
            settings["router_top_k"] = min(top_k, int(experts))
        self.set_defaults(recipe=recipe, **settings)  # defaults, so that the command line overrides them
        # HfArgumentParser would also read a file named after the script, run.args
        data_args, model_args, training_args, run = self.parse_args_into_dataclasses(args, look_for_args_file=False)
        if training_args.output_dir == TRAINER_OUTPUT:
            work, start = f"{Path(recipe).stem}-{training_args.method}", model_args.model_name_or_path
            folder = output_folder(work, start, model_args.model_revision) if start else Path("outputs", work)
            training_args.output_dir = folder.as_posix()
        return data_args, model_args, training_args, run

    def read_recipe(self, recipe: str) -> dict[str, Any]:
        """Settings of a recipe, by its name or path, checked against the arguments that exist."""
        path = self.recipes / f"{recipe}.yaml" if recipe in self.named else Path(recipe)
        if not path.is_file():
            raise ValueError(f"recipe={recipe!r} is neither a file nor one of {', '.join(self.named)}.")
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}  # an empty file is None
        allowed = {action.dest for action in self._actions}
        if unknown := sorted(set(settings) - allowed):
            raise ValueError(f"recipe {path.name} has unknown settings {', '.join(unknown)}.")
        # argparse converts strings only; a recipe may write 8/255, 1e-3 (text in YAML) or true
        return {name: json.dumps(v) if isinstance(v, dict) else v for name, v in settings.items()}

    def error(self, message: str) -> NoReturn:
        """Leave with the message alone: the usage of 150 arguments would hide it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        """Help in groups, ours and the most used of the Trainer's."""
        return grouped_help(self, everything="--help_all" in sys.argv)


__all__ = ["DataArguments", "ModelArguments", "RecipeParser"]
