"""Configurations of the robust mixture of experts and of the dual model.

Everything needed to rebuild a model is here: image size, mean and standard deviation, experts, routing, mixing weight.
This file travels to the Hub as remote code together with `modeling_dualmoe.py`; it imports nothing but transformers.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

FORMAT_VERSION = 1  # raise it when an older hf_dualmoe could no longer read the config rightly
STEMS = ("cifar", "default")
ROUTERS = ("linear", "pooled", "conv", "features")
MIXINGS = ("probs", "logits")
LOGIT_MAP_KEYS = {"scale", "clamp", "power"}


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that names the field, the value and the choices."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise a ValueError unless `value` is a number with low <= value <= high."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and value >= low and (high is None or value <= high)):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}={value!r} must be a number {allowed}.")


def check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise a ValueError unless `value` is an integer with low <= value <= high."""
    if not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be an integer.")
    check_range(name, value, low, high)


def check_format_version(version: int) -> None:
    """Refuse a config that a newer release wrote: reading it half-right would give a silently wrong model."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version!r}: this config was written by a newer hf_dualmoe; this one reads versions up "
            f"to {FORMAT_VERSION}. Upgrade hf_dualmoe, or use trust_remote_code=True to load the model's own code."
        )


def check_normalisation(name: str, mean: list[float] | None, std: list[float] | None, num_channels: int) -> None:
    """Raise a ValueError unless `mean` and `std` are both None, or one finite value per channel with std > 0."""
    if (mean is None) != (std is None):
        raise ValueError(f"{name}_mean={mean!r} and {name}_std={std!r} must be given together.")
    for field, values in ((f"{name}_mean", mean), (f"{name}_std", std)):
        if values is not None and len(values) != num_channels:
            raise ValueError(f"{field} has {len(values)} values but num_channels={num_channels}.")
        if values is not None and not all(math.isfinite(value) for value in values):
            raise ValueError(f"{field}={values!r} must be finite.")
    if std is not None and min(std) <= 0:
        raise ValueError(f"{name}_std={std!r} must be > 0 in every channel.")


class ValidatedConfig(PreTrainedConfig):
    """A config whose values are also checked when `from_pretrained` overrides them."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
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
        for name in ("image_size", "num_channels", "num_experts", "router_pool_size"):
            check_count(name, getattr(self, name), 1)
        check_count("shared_stages", self.shared_stages, 0)
        check_range("router_aux_loss_coef", self.router_aux_loss_coef, 0)
        if self.backbone_image_size is not None:
            check_count("backbone_image_size", self.backbone_image_size, 1)
        check_count("router_top_k", self.router_top_k, 1)
        if self.router_top_k > self.num_experts:
            raise ValueError(f"router_top_k={self.router_top_k} must not exceed num_experts={self.num_experts}.")
        if self.router == "features" and self.shared_stages == 0:
            raise ValueError(
                "router='features' reads the shared trunk: it needs shared_stages >= 1, got shared_stages=0."
            )
        if isinstance(self.width, (int, float)):
            if self.width <= 0:
                raise ValueError(f"width={self.width!r} must be a multiplier > 0, a list of stage channels, or None.")
        self.image_mean = self._per_channel("image_mean")
        self.image_std = self._per_channel("image_std")
        check_normalisation("image", self.image_mean, self.image_std, self.num_channels)

    def _per_channel(self, name: str) -> list[float]:
        value = getattr(self, name)
        return [float(value)] * self.num_channels if isinstance(value, (int, float)) else [float(v) for v in value]


class DualMoEConfig(ValidatedConfig):
    """Configuration of `DualMoEForImageClassification`: F_D = (1 - alpha) F_S + alpha F_R.

    Args:
        standard: Config of F_S (or a dict of one); any image classifier of transformers or a `MoEConfig`.
        robust: Config of F_R, likewise.
        alpha: Weight of F_R in [0, 1]. Robustness of F_R can only carry over where alpha > 1/2.
        mixing: "probs" mixes probabilities, "logits" mixes logits (as the paper's code does).
        standard_logit_map, robust_logit_map: Optional calibration before mixing, as in MixedNUTS
            (https://arxiv.org/abs/2402.02263): a dict with any of `scale` (> 0), `clamp` (bias c of a
            layer-normalised, rectified logit; omitted = neither) and `power` (> 0).
        standard_image_mean, standard_image_std, robust_image_mean, robust_image_std: Normalisation to apply before a
            component that does not normalise its input itself (all models but ours); None = none.
        format_version: Version of this format, checked on loading.

    Raises:
        ValueError: A field is out of range, or the two components disagree on size, channels or labels.
    """

    model_type = "dual_moe"
    sub_configs = {"standard": AutoConfig, "robust": AutoConfig}
    keys_to_ignore_at_inference = [
        *("standard_logits", "robust_logits", "standard_router_logits", "robust_router_logits"),
        *("standard_expert_index", "robust_expert_index", "aux_loss"),
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
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self.standard = self._component("standard")
        self.robust = self._component("robust")
        if self.id2label is None and kwargs.get("num_labels") is None:
            kwargs.pop("num_labels", None)  # transformers would build no labels at all from an explicit None
            self.id2label = dict(self.robust.id2label)
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
            if standard is not None and robust is not None and standard != robust:
                raise ValueError(f"standard.{name}={standard} and robust.{name}={robust} must be equal.")
        for name in ("standard", "robust"):
            mean, std = getattr(self, f"{name}_image_mean"), getattr(self, f"{name}_image_std")
            check_normalisation(f"{name}_image", mean, std, getattr(getattr(self, name), "num_channels", 3))

    def _component(self, name: str) -> PreTrainedConfig:
        value = getattr(self, name)
        if value is None:
            return MoEConfig()
        if not isinstance(value, dict):
            return value
        model_type = value.get("model_type", MoEConfig.model_type)
        config_class = MoEConfig if model_type == MoEConfig.model_type else type(AutoConfig.for_model(model_type))
        return config_class.from_dict(value)  # some classes translate what `to_dict` wrote

    def _check_logit_map(self, name: str) -> None:
        logit_map = getattr(self, name)
        if logit_map is None:
            return
        if unknown := set(logit_map) - LOGIT_MAP_KEYS:
            raise ValueError(f"{name} has unknown keys {sorted(unknown)}; allowed: {sorted(LOGIT_MAP_KEYS)}.")
        for key in ("scale", "power"):
            if not logit_map.get(key, 1.0) > 0:
                raise ValueError(f"{name}[{key!r}]={logit_map[key]!r} must be > 0.")

    @property
    def image_size(self) -> int | None:
        """Height and width of the images in pixels; None where neither component states it."""
        return getattr(self.robust, "image_size", None) or getattr(self.standard, "image_size", None)

    @property
    def num_channels(self) -> int:
        """Image channels."""
        return getattr(self.robust, "num_channels", 3)


__all__ = ["DualMoEConfig", "MoEConfig"]
