"""Configurations of the robust mixture of experts and of the dual model.

Everything needed to rebuild a model is here: image size, mean and standard deviation, experts, routing, mixing weight.
This file travels to the Hub as remote code together with `modeling_dualmoe.py`; it imports nothing but transformers.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1  # raise it when an older hf_dualmoe could no longer read the config rightly
STEMS = ("cifar", "default")
ROUTERS = ("linear", "pooled", "conv", "features")
MIXINGS = ("probs", "logits", "weights")
LOGIT_MAP_KEYS = {"scale", "clamp", "power"}
# keys of a component's config in which two networks may differ and still be merged: what a trained one does not use
NO_PART_OF_THE_FUNCTION = {
    *("_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
    *("id2label", "label2id", "num_labels", "problem_type", "use_cache", "initializer_range", "format_version"),
    *("router_aux_loss_coef", "output_router_logits", "return_dict", "output_hidden_states", "output_attentions"),
}

# A config may come from a stranger. These limits are far above any sensible model, and low enough that what a config
# asks for is refused before it exhausts the memory; `check_model_size` in modeling_dualmoe.py counts the parameters.
MAX_SIZES = {
    **{"image_size": 4096, "backbone_image_size": 4096, "router_pool_size": 4096},
    **{"num_channels": 1024, "num_experts": 1024, "router_top_k": 1024, "shared_stages": 1024, "num_labels": 200_000},
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
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "custom_load"),
    *("use_pretrained_backbone", "trust_remote_code", "transformers_weights", "quantization_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
}
OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def shown(value: Any) -> str:
    """What an error message says of a value: at most `MAX_TEXT` letters, and no endless numbers."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "an integer beyond 10**30"
    try:
        text = repr(value)
    except Exception:  # an integer too long to print inside a list, or a broken __repr__
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def plain(value: Any) -> Any:
    """A value as a config.json gives it back: lists for tuples, text for keys."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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


def check_format_version(version: int) -> None:
    """Refuse a config that a newer release wrote: reading it half-right would give a silently wrong model."""
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"format_version={shown(version)}: this config was written by a newer hf_dualmoe; this one reads versions "
            f"up to {FORMAT_VERSION}. Upgrade hf_dualmoe, or use trust_remote_code=True to load the model's own code."
        )


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


class ValidatedConfig(PreTrainedConfig):
    """A config whose values are also checked when `from_pretrained` overrides them.

    Keys that are no field are left out, with a warning: transformers itself would set any key of a config.json as an
    attribute, methods among them.
    """

    OTHER_KEYS = (  # of a config.json, that are no field of the class
        *("model_type", "auto_map", "num_labels", "torch_dtype", "output_attentions", "_name_or_path", "name_or_path"),
        *("_commit_hash", "use_cache", "attn_implementation", "experts_implementation", "custom_pipelines"),
    )

    def __post_init__(self, **kwargs):
        known = {*self.OTHER_KEYS, *(field.name for field in fields(type(self)))}
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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        for key in LOADING_KEYS & set(config_dict):
            check_loads_nothing("config", {key: config_dict[key]})
        if kwargs.get("num_labels") is not None:
            check_count("num_labels", kwargs["num_labels"], 1, MAX_SIZES["num_labels"])
        result = super().from_dict(config_dict, **kwargs)  # sets overrides as attributes, after __post_init__
        (result[0] if isinstance(result, tuple) else result)._check_fields()
        return result


class MoEConfig(ValidatedConfig):
    """Configuration of `MoEForImageClassification`: E whole or late-stage experts behind one router.

    Args:
        backbone: Name of a timm model; each expert is one (paper: resnet18, vit_small_patch16_224). Or
            "lipschitz_mlp" or "lipschitz_cnn": a 1-Lipschitz network, whose robustness can be proved (training it
            needs deel-torchlip).
        backbone_kwargs: Further keyword arguments of `timm.create_model`, such as `{"patch_size": 4}`, or of the
            functions `lipschitz_mlp` (`hidden_sizes`, `logit_scale`) and `lipschitz_cnn` (`channels`, `depth`,
            `hidden_size`, `logit_scale`).
        stem: "cifar" = 3x3 stride-1 convolution and no max-pool (ResNets, images up to 64 px); "default" = timm's own.
        width: None, a multiplier of the stage channels, or the list of stage channels (ResNets only).
        image_size: Height and width of the images, in pixels; `eps` of an attack counts in these pixels.
        backbone_image_size: Size to which the model itself up-samples its input, for backbones pretrained at a larger
            size (a 64 px image seen by a 224 px ViT); None = `image_size`.
        num_channels: Image channels.
        image_mean, image_std: Per-channel normalisation done inside the model, in [0, 1] pixel units.
        num_experts: E (paper: 4).
        router_top_k: k, the experts used per image; 1 = hard routing (paper's code), E = dense mixture (paper's
            theory).
        router: "linear" on the normalised flattened image (paper), "pooled" = linear on the image average-pooled to
            `router_pool_size` squared, "conv" = small CNN, "features" = linear on the pooled output of the trunk.
        router_pool_size: Height and width of the grid of the "pooled" router.
        shared_stages: 0 = whole-network experts (paper); n = the first n stages (ResNet) or blocks (ViT) are one trunk
            shared by all experts.
        router_aux_loss_coef: Weight of the load-balancing loss in the training loss.
        output_router_logits: Whether `forward` returns the router logits by default.
        format_version: Version of this format, checked on loading.

    Raises:
        ValueError: A field is out of range; the message names the field, the value and what is allowed.
    """

    model_type = "robust_moe"
    keys_to_ignore_at_inference = ["router_logits", "expert_index", "aux_loss"]

    backbone: str = "resnet18"
    backbone_kwargs: dict[str, Any] | None = None
    stem: str = "cifar"
    width: float | list[int] | None = None
    image_size: int = 32
    backbone_image_size: int | None = None
    num_channels: int = 3
    image_mean: list[float] | float = 0.5
    image_std: list[float] | float = 0.25
    num_experts: int = 4
    router_top_k: int = 1
    router: str = "linear"
    router_pool_size: int = 4
    shared_stages: int = 0
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self._check_fields()
        self.backbone_kwargs = dict(self.backbone_kwargs or {})
        super().__post_init__(**kwargs)

    def _check_fields(self) -> None:
        check_format_version(self.format_version)
        check_choice("stem", self.stem, STEMS)
        check_choice("router", self.router, ROUTERS)
        if not isinstance(self.backbone, str) or len(self.backbone) > MAX_TEXT:
            raise ValueError(f"backbone={shown(self.backbone)} must be the name of a timm model.")
        if not isinstance(self.backbone_kwargs, (dict, type(None))):
            raise ValueError(f"backbone_kwargs={shown(self.backbone_kwargs)} must be a dict, or None.")
        check_loads_nothing("backbone_kwargs", self.backbone_kwargs)
        for name in ("image_size", "num_channels", "num_experts", "router_pool_size", "router_top_k"):
            check_count(name, getattr(self, name), 1, MAX_SIZES[name])
        check_count("shared_stages", self.shared_stages, 0, MAX_SIZES["shared_stages"])
        check_range("router_aux_loss_coef", self.router_aux_loss_coef, 0)
        check_flag("output_router_logits", self.output_router_logits)
        if self.backbone_image_size is not None:
            check_count("backbone_image_size", self.backbone_image_size, 1, MAX_SIZES["backbone_image_size"])
        if self.router_top_k > self.num_experts:
            raise ValueError(f"router_top_k={self.router_top_k} must not exceed num_experts={self.num_experts}.")
        if self.router == "features" and self.shared_stages == 0:
            raise ValueError(
                "router='features' reads the shared trunk: it needs shared_stages >= 1, got shared_stages=0."
            )
        self._check_width()
        self.image_mean = self._per_channel("image_mean")
        self.image_std = self._per_channel("image_std")
        check_normalisation("image", self.image_mean, self.image_std, self.num_channels)

    def _check_width(self) -> None:
        width = self.width
        if isinstance(width, (list, tuple)):
            check_loads_nothing("width", width)
            valid = all(isinstance(channels, int) and not isinstance(channels, bool) for channels in width)
        else:
            valid = width is None or (is_number(width) and 0 < width <= MAX_WIDTH)
        if not valid:
            allowed = f"a multiplier > 0 (at most {MAX_WIDTH}), a list of stage channels, or None"
            raise ValueError(f"width={shown(width)} must be {allowed}.")

    def _per_channel(self, name: str) -> list[float]:
        value = getattr(self, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value] * self.num_channels
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}={shown(value)} must be a number, or a list of one number per channel.")
        return [float(v) if is_number(v) else v for v in value]


def side_of(name: str, image_size: int | list[int] | tuple[int, ...] | None) -> int | None:
    """The side in pixels of a component's square images, which other configs also write as (height, width)."""
    if not isinstance(image_size, (list, tuple)):
        return image_size
    if len(set(image_size)) != 1:
        raise ValueError(f"{name}.image_size={shown(image_size)} must be square: one picture size serves both parts.")
    return image_size[0]


def without_origin(value: Any) -> Any:
    """The dict of a config, with an empty `_name_or_path` in it and in those inside."""
    if not isinstance(value, dict):
        return value
    return {key: "" if key == "_name_or_path" else without_origin(item) for key, item in value.items()}


class DualMoEConfig(ValidatedConfig):
    """Configuration of `DualMoEForImageClassification`: F_D = (1 - alpha) F_S + alpha F_R.

    Args:
        standard: Config of F_S (or a dict of one); any image classifier of transformers or a `MoEConfig`.
        robust: Config of F_R, likewise.
        alpha: Weight of F_R in [0, 1]. Robustness of F_R can only carry over where alpha > 1/2.
        mixing: "probs" mixes probabilities, "logits" mixes logits (as the paper's code does). "weights" mixes nothing
            but weights: one network with (1 - alpha) theta_S + alpha theta_R answers, at half the cost; for trained
            components of one shape and with a common start.
        standard_logit_map, robust_logit_map: Optional calibration before mixing, as in MixedNUTS
            (https://arxiv.org/abs/2402.02263): a dict with any of `scale` (> 0), `clamp` (bias c of a
            layer-normalised, rectified logit; omitted = neither) and `power` (> 0).
        standard_image_mean, standard_image_std, robust_image_mean, robust_image_std: Normalisation to apply before a
            component that does not normalise its input itself (all models but ours); None = none.
        input_size: Side in pixels of the images where a component takes others: the dual model resizes them to the
            `image_size` in that component's config. An attack counts in the pixels of the images. None = both
            components take images of one size.
        format_version: Version of this format, checked on loading.

    Raises:
        ValueError: A field is out of range, or the two components disagree on size, channels or labels.
    """

    model_type = "dual_moe"
    sub_configs = {"standard": AutoConfig, "robust": AutoConfig}
    keys_to_ignore_at_inference = [
        *("standard_logits", "robust_logits", "standard_router_logits", "robust_router_logits"),
        *("standard_expert_index", "robust_expert_index", "aux_loss", "router_logits", "expert_index"),
    ]

    standard: dict[str, Any] | PreTrainedConfig | None = None
    robust: dict[str, Any] | PreTrainedConfig | None = None
    alpha: float = 0.75
    mixing: str = "probs"
    standard_logit_map: dict[str, float] | None = None
    robust_logit_map: dict[str, float] | None = None
    standard_image_mean: list[float] | None = None
    standard_image_std: list[float] | None = None
    robust_image_mean: list[float] | None = None
    robust_image_std: list[float] | None = None
    input_size: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self.standard = self._component("standard")
        self.robust = self._component("robust")
        if self.id2label is None and kwargs.get("num_labels") is None:
            kwargs.pop("num_labels", None)  # transformers would build no labels at all from an explicit None
            self.id2label = {i: str(name) for i, name in (self.robust.id2label or {}).items()}
            self.label2id = {name: i for i, name in self.id2label.items()}
        self._check_fields()
        super().__post_init__(**kwargs)

    def _check_fields(self) -> None:
        check_format_version(self.format_version)
        check_range("alpha", self.alpha, 0, 1)
        check_choice("mixing", self.mixing, MIXINGS)
        self._check_logit_map("standard_logit_map")
        self._check_logit_map("robust_logit_map")
        for name in ("image_size", "num_channels", "num_labels"):
            standard, robust = getattr(self.standard, name, None), getattr(self.robust, name, None)
            if name == "image_size":
                standard, robust = side_of("standard", standard), side_of("robust", robust)
                if self.input_size is not None:
                    self._check_input_size(standard, robust)
                    continue
            if standard is not None and robust is not None and standard != robust:
                raise ValueError(f"standard.{name}={standard} and robust.{name}={robust} must be equal.")
        for name in ("standard", "robust"):
            mean, std = getattr(self, f"{name}_image_mean"), getattr(self, f"{name}_image_std")
            check_normalisation(f"{name}_image", mean, std, getattr(getattr(self, name), "num_channels", 3))
        if self.mixing == "weights" and (obstacles := self.merge_obstacles()):
            raise ValueError(f"mixing='weights' cannot merge F_S and F_R: {'; '.join(obstacles)}.")

    def _check_input_size(self, standard: int | None, robust: int | None) -> None:
        check_count("input_size", self.input_size, 1, MAX_SIZES["image_size"])
        for name, size in (("standard", standard), ("robust", robust)):
            ours = getattr(self, name).model_type == MoEConfig.model_type
            if size is None or (ours and size != self.input_size):
                allowed = f"{self.input_size}, the input_size: our mixtures resize nothing" if ours else "an integer"
                raise ValueError(f"{name}.image_size={size} must be {allowed}.")

    def merge_obstacles(self) -> list[str]:
        """Why no network between F_S and F_R can stand for both, as far as the configs tell; [] where it can.

        Whether the two have a common start, without which such a network is of no use, no config tells.
        """
        kinds = self.standard.model_type, self.robust.model_type
        if kinds[0] != kinds[1]:
            return [f"their architectures differ ({kinds[0]} and {kinds[1]})"]
        values = [plain(part.to_dict()) for part in (self.standard, self.robust)]
        keys = sorted({*values[0], *values[1]} - NO_PART_OF_THE_FUNCTION)
        obstacles = [
            f"their configs differ in {key} ({shown(values[0].get(key))} and {shown(values[1].get(key))})"
            for key in keys
            if values[0].get(key) != values[1].get(key)
        ]
        for name in ("image_mean", "image_std"):
            pair = getattr(self, f"standard_{name}"), getattr(self, f"robust_{name}")
            if pair[0] != pair[1]:
                obstacles.append(f"standard_{name}={shown(pair[0])} and robust_{name}={shown(pair[1])} differ")
        labels = [part.id2label or {} for part in (self.standard, self.robust)]
        named = [names for names in labels if any(name != f"LABEL_{i}" for i, name in names.items())]
        if len(named) == 2 and named[0] != named[1]:
            obstacles.append("they have other labels or another order of labels")
        if self.standard_logit_map or self.robust_logit_map:
            obstacles.append("logit maps apply to the outputs of two networks; set both to None")
        return obstacles

    def _component(self, name: str) -> PreTrainedConfig:
        value = getattr(self, name)
        if value is None:
            return MoEConfig()
        if isinstance(value, PreTrainedConfig):  # what could not be loaded again is refused before it is trained
            self._check_component(name, json.loads(value.to_json_string(use_diff=False)))
            return value
        if not isinstance(value, dict):
            raise ValueError(f"{name}={shown(value)} must be a config, the dict of one, or None.")
        self._check_component(name, value)
        model_type = value.get("model_type", MoEConfig.model_type)
        if not isinstance(model_type, str):
            raise ValueError(f"{name}['model_type']={shown(model_type)} must be text.")
        try:
            config_class = MoEConfig if model_type == MoEConfig.model_type else type(AutoConfig.for_model(model_type))
            return config_class.from_dict(value)  # some classes translate what `to_dict` wrote
        except Exception as error:  # each config class of transformers checks in its own way, or not at all
            raise ValueError(f"{name} is no usable config of model_type={shown(model_type)}: {error}") from error

    def _check_component(self, name: str, value: dict[str, Any]) -> None:
        """Refuse the dict of a config that could load something, or build something huge."""
        labels = ("id2label", "label2id", "label_names")
        check_loads_nothing(name, value, (*labels, "pretrained_cfg"), check_component_number)
        check_labels_size(value.get("id2label"), value.get("label2id"))
        if len(value.get("label_names") or ()) > MAX_SIZES["num_labels"]:  # of a TimmWrapperConfig
            raise ValueError(f"{name} has more than {MAX_SIZES['num_labels']} label_names.")

    def to_dict(self) -> dict[str, Any]:
        """As that of the parent, without where the components came from: paths of this machine, in most cases."""
        return {
            key: without_origin(value) if key in self.sub_configs else value
            for key, value in super().to_dict().items()
        }

    def _check_logit_map(self, name: str) -> None:
        logit_map = getattr(self, name)
        if logit_map is None:
            return
        if not isinstance(logit_map, dict):
            raise ValueError(f"{name}={shown(logit_map)} must be a dict, or None.")
        if unknown := set(logit_map) - LOGIT_MAP_KEYS:
            unknown = ", ".join(map(shown, unknown))
            raise ValueError(f"{name} has unknown keys {unknown}; allowed: {sorted(LOGIT_MAP_KEYS)}.")
        for key, value in logit_map.items():
            if not is_number(value):
                raise ValueError(f"{name}[{key!r}]={shown(value)} must be a finite number.")
            if key != "clamp" and not value > 0:
                raise ValueError(f"{name}[{key!r}]={shown(value)} must be > 0.")

    @property
    def image_size(self) -> int | None:
        """Height and width of the images in pixels; None where neither component states it."""
        if self.input_size is not None:
            return self.input_size
        sides = (side_of(name, getattr(getattr(self, name), "image_size", None)) for name in ("robust", "standard"))
        return next((side for side in sides if side), None)

    @image_size.setter
    def image_size(self, value: int) -> None:
        raise ValueError(f"image_size={value!r} cannot be set here; set it in the configs `standard` and `robust`.")

    @property
    def num_channels(self) -> int:
        """Image channels."""
        return getattr(self.robust, "num_channels", 3)


__all__ = ["DualMoEConfig", "MoEConfig"]
