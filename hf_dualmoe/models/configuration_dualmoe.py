"""Configurations of the robust mixture of experts and of the dual model.

Everything needed to rebuild a model is here: image size, mean and standard deviation, experts, routing, mixing weight.
This file travels to the Hub as remote code together with the other *_dualmoe.py files.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .validation_dualmoe import (
    FORMAT_VERSION,
    MAX_SIZES,
    MAX_TEXT,
    MAX_WIDTH,
    ValidatedConfig,
    check_choice,
    check_component_number,
    check_count,
    check_flag,
    check_format_version,
    check_labels_size,
    check_loads_nothing,
    check_normalisation,
    check_range,
    is_number,
    shown,
)

STEMS = ("cifar", "default")
ROUTERS = ("linear", "pooled", "conv", "features")
MIXINGS = ("probs", "logits", "weights")
LOGIT_MAP_KEYS = {"scale", "clamp", "power"}
# keys of a component's config in which two networks may differ and still be merged: what a trained one does not use
NO_PART_OF_THE_FUNCTION = {
    "_name_or_path",
    "name_or_path",
    "architectures",
    "auto_map",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "use_cache",
    "initializer_range",
    "format_version",
    "router_aux_loss_coef",
    "output_router_logits",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
}


def plain(value: Any) -> Any:
    """A value as a config.json gives it back: lists for tuples, text for keys."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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
    # else Trainer.evaluate gathers them as predictions
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
    router_top_k: int = 1  # not `top_k`: transformers reserves the names of generation parameters
    router: str = "linear"
    router_pool_size: int = 4
    shared_stages: int = 0
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_fields()
        self.backbone_kwargs = dict(self.backbone_kwargs or {})  # a copy: the caller may reuse its dict
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
    sub_configs = {"standard": AutoConfig, "robust": AutoConfig}  # parts of any model type
    keys_to_ignore_at_inference = [
        "standard_logits",
        "robust_logits",
        "standard_router_logits",
        "robust_router_logits",
        "standard_expert_index",
        "robust_expert_index",
        "aux_loss",
        "router_logits",
        "expert_index",
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

    def __post_init__(self, **kwargs: Any) -> None:
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
            ours = getattr(self, name).model_type == MoEConfig.model_type  # not isinstance: see `create_component`
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
        """As the parent's, without where the components came from: mostly paths of this machine."""
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
