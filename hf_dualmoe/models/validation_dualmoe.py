"""Checks of a config; their errors name the field, its value and what is allowed.

A config may come from a stranger: refuse what would exhaust the memory, load a file or run code. The limits are far
above any sensible model; `check_model_size` in backbones_dualmoe.py counts the parameters.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1  # raise it when an older hf_dualmoe could no longer read the config rightly
MAX_SIZES = {
    "image_size": 4096,
    "backbone_image_size": 4096,
    "router_pool_size": 4096,
    "num_channels": 1024,
    "num_experts": 1024,
    "router_top_k": 1024,
    "shared_stages": 1024,
    "num_labels": 200_000,
}
MAX_WIDTH = 100  # multiplier of the stage channels
MAX_NUMBER = 100_000  # of anything in backbone_kwargs and width
MAX_COMPONENT_INTEGER = 2**24  # in the config of another kind of model: above any vocabulary or context length
MAX_ITEMS = 1_000  # in a list or dict of those
MAX_NESTING = 8  # levels of dicts and lists in those
MAX_TEXT = 200  # letters of a name, or of a value in a message
MIN_STD = 1e-6  # in [0, 1] pixel units; dividing by less would overflow
# keys by which a config could make timm or transformers read files, use the network or run other people's code
LOADING_KEYS = {
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "custom_load",
    "use_pretrained_backbone",
    "trust_remote_code",
    "transformers_weights",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
}
OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def shown(value: Any) -> str:
    """A value as text for an error message: at most `MAX_TEXT` letters, and no endless numbers."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "an integer beyond 10**30"
    try:
        text = repr(value)
    except Exception:  # an integer too long to print inside a list, or a broken __repr__
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number that fits into float32; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e38 < value < 1e38


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that names the field, the value and the choices."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, allowed))}.")


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise a ValueError unless `value` is a finite number with low <= value <= high."""
    if not (is_number(value) and value >= low and (high is None or value <= high)):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}={shown(value)} must be a number {allowed}.")


def check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise a ValueError unless `value` is an integer with low <= value <= high."""
    if not isinstance(value, int):
        raise ValueError(f"{name}={shown(value)} must be an integer.")
    if high is not None and is_number(value) and value > high:
        raise ValueError(f"{name}={shown(value)} must be at most {high}.")
    check_range(name, value, low)


def check_flag(name: str, value: bool) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False.")


def check_small(name: str, value: int | float) -> None:
    """Raise a ValueError unless `value` is in [-`MAX_NUMBER`, `MAX_NUMBER`]."""
    if not -MAX_NUMBER <= value <= MAX_NUMBER:  # NaN too
        raise ValueError(f"{name}={shown(value)} must be a number in [-{MAX_NUMBER}, {MAX_NUMBER}].")


def check_component_number(name: str, value: int | float) -> None:
    """Raise a ValueError where a config class could make an endless list of an integer, or `value` is NaN."""
    if isinstance(value, float):
        low, high = -math.inf, math.inf
    else:
        high = MAX_SIZES["num_labels"] if name.endswith("['num_labels']") else MAX_COMPONENT_INTEGER
        low = -MAX_COMPONENT_INTEGER
    if not low <= value <= high:
        raise ValueError(f"{name}={shown(value)} must be a number in [{low}, {high}].")


def check_loads_nothing(
    name: str,
    value: Any,
    skip: tuple[str, ...] = (),
    check_size: Callable[[str, int | float], None] = check_small,
    depth: int = 0,
) -> None:
    """Refuse a value that could make timm or transformers load something, or build something huge.

    Args:
        name: Its name in the config.
        value: Plain data: text, numbers, lists and dicts of them; other objects are left alone.
        skip: Keys of dicts that are not looked at.
        check_size: Called with the name and value of each number; raises where it is out of range.
        depth: Levels above `value`.

    Raises:
        ValueError: A key of `LOADING_KEYS`, text that names something on the Hub, a number out of range, more than
            `MAX_ITEMS` items, or nested too deeply.
    """
    if depth > MAX_NESTING:
        raise ValueError(f"{name} is nested too deeply.")
    if isinstance(value, (int, float)):
        check_size(name, value)
    if isinstance(value, str) and value.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise ValueError(f"{name}={shown(value)} would load another model; a config cannot.")
    elif isinstance(value, (list, tuple, dict)):
        if len(value) > MAX_ITEMS:
            raise ValueError(f"{name} has {len(value)} items; at most {MAX_ITEMS} are allowed.")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            harmless = item is None or item is False or (isinstance(item, str) and item in OWN_IMPLEMENTATIONS)
            if key in skip:
                continue
            if key in LOADING_KEYS and not harmless:
                raise ValueError(f"{name}[{key!r}]={shown(item)} is not allowed: a config cannot load files or code.")
            check_loads_nothing(f"{name}[{shown(key)}]", item, skip, check_size, depth + 1)


def check_labels_size(id2label: Any, label2id: Any) -> None:
    """Raise a ValueError unless both are None or dicts of a sensible number of labels."""
    for name, value in (("id2label", id2label), ("label2id", label2id)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name}={shown(value)} must be a dict, or None.")
        if value is not None and len(value) > MAX_SIZES["num_labels"]:
            raise ValueError(f"{name} has {len(value)} labels; at most {MAX_SIZES['num_labels']} are allowed.")


def check_labels_maps(id2label: Any, label2id: Any) -> None:
    """Raise a ValueError unless `id2label` names the labels 0, 1, ... and `label2id` gives their numbers, or None."""
    check_labels_size(id2label, label2id)
    if id2label is not None and {str(key) for key in id2label} != {str(i) for i in range(len(id2label))}:
        raise ValueError(f"id2label={shown(id2label)} must name the labels 0, 1, 2, ... without a gap.")
    if id2label is not None and not (id2label and all(isinstance(name, str) for name in id2label.values())):
        raise ValueError(f"id2label={shown(id2label)} must name at least one label, each with a text.")
    if label2id is not None and not all(is_label_number(number) for number in label2id.values()):
        raise ValueError(f"label2id={shown(label2id)} must give each label its number.")


def is_label_number(value: Any) -> bool:
    """Whether `value` is a number, or the text of one, as examples of transformers write into `label2id`."""
    return is_number(value) or (isinstance(value, str) and len(value) <= MAX_TEXT and value.isdecimal())


def check_normalisation(name: str, mean: list[float] | None, std: list[float] | None, num_channels: int) -> None:
    """Raise a ValueError unless `mean` and `std` are both None, or one finite value per channel with std > 0."""
    if (mean is None) != (std is None):
        raise ValueError(f"{name}_mean={mean!r} and {name}_std={std!r} must be given together.")
    for field, values in ((f"{name}_mean", mean), (f"{name}_std", std)):
        if values is not None and not isinstance(values, (list, tuple)):
            raise ValueError(f"{field}={shown(values)} must be a list of numbers.")
        if values is not None and len(values) != num_channels:
            raise ValueError(f"{field} has {len(values)} values but num_channels={num_channels}.")
        if values is not None and not all(is_number(value) for value in values):
            raise ValueError(f"{field}={shown(values)} must be finite numbers.")
    if std is not None and min(std) < MIN_STD:
        raise ValueError(f"{name}_std={shown(std)} must be > 0 (at least {MIN_STD}) in every channel.")


def check_format_version(version: int) -> None:
    """Refuse a config that a newer release wrote: reading it half-right would give a silently wrong model."""
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"format_version={shown(version)}: this config was written by a newer hf_dualmoe; this one reads versions "
            f"up to {FORMAT_VERSION}. Upgrade hf_dualmoe, or use trust_remote_code=True to load the model's own code."
        )


class ValidatedConfig(PreTrainedConfig):
    """A config whose values are also checked when `from_pretrained` overrides them.

    Keys that are no field are left out, with a warning: transformers itself would set any key of a config.json as an
    attribute, methods among them.
    """

    _auto_class = "AutoConfig"  # `save_pretrained` copies the code
    OTHER_KEYS = {  # of a config.json, that are no field of the class
        "model_type",
        "auto_map",
        "num_labels",
        "torch_dtype",
        "output_attentions",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "use_cache",
        "attn_implementation",
        "experts_implementation",
        "custom_pipelines",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        known = self.OTHER_KEYS | {field.name for field in fields(type(self))}
        if unknown := [key for key in kwargs if key not in known]:
            names = ", ".join(map(shown, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            logger.warning(f"{type(self).__name__} has no field {names}; ignored.")
        kwargs = {key: value for key, value in kwargs.items() if key in known}
        if kwargs.get("num_labels") is not None:
            check_count("num_labels", kwargs["num_labels"], 1, MAX_SIZES["num_labels"])
        check_labels_maps(self.id2label, self.label2id)
        if self.label2id is not None:
            self.label2id = {name: int(number) for name, number in self.label2id.items()}
        if str(self.dtype).removeprefix("torch.") not in ("None", "float32", "float64", "float16", "bfloat16"):
            raise ValueError(f"dtype={shown(self.dtype)} must be 'float32', 'float64', 'float16', 'bfloat16' or None.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for key in LOADING_KEYS & set(config_dict):
            check_loads_nothing("config", {key: config_dict[key]})
        if kwargs.get("num_labels") is not None:
            check_count("num_labels", kwargs["num_labels"], 1, MAX_SIZES["num_labels"])
        result = super().from_dict(config_dict, **kwargs)  # sets overrides as attributes, after __post_init__
        (result[0] if isinstance(result, tuple) else result)._check_fields()
        return result
