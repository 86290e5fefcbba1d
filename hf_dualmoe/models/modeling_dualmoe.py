"""The dual model: a standard and a robust classifier with a dial between accuracy and robustness.

This file travels to the Hub as remote code together with the other *_dualmoe.py files: `moe_dualmoe` has the mixture
of experts, `mixing_dualmoe` the dial in the outputs, `merging_dualmoe` the dial in the weights.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .backbones_dualmoe import limited_size
from .configuration_dualmoe import MIXINGS, DualMoEConfig, MoEConfig, side_of
from .inputs_dualmoe import Normalize, Resize, check_labels, check_pixel_values
from .merging_dualmoe import cached_merge, forget_merge, interpolate, weights_cosine, weights_obstacles
from .mixing_dualmoe import apply_logit_map, check_alpha, mix_logits
from .moe_dualmoe import MoEForImageClassification, MoEImageClassifierOutput, has_experts
from .pretrained_dualmoe import RobustPreTrainedModel, check_same_parameters
from .validation_dualmoe import check_choice

logger = logging.get_logger(__name__)

UNRELATED = 0.1  # cosine of the weights of networks without a common start; measured on digits: 0.006, with one 0.999


@dataclass
class DualMoEImageClassifierOutput(ModelOutput):
    """Output of `DualMoEForImageClassification`; B images, C labels.

    Args:
        loss: Scalar: cross-entropy of the mixture + aux_loss; only with labels.
        logits: (B, C) log-probabilities (mixing="probs"), mixed logits (mixing="logits") or logits of the merged
            network (mixing="weights"); None where the two models saw different images.
        standard_logits, robust_logits: (B, C) logits of F_S and F_R, before any logit map. They and all else of F_S
            and F_R are None with mixing="weights", where neither runs: `model.standard` and `model.robust` tell.
        standard_router_logits, robust_router_logits: (B, E) before softmax; only where asked for.
        standard_expert_index, robust_expert_index: As in `MoEImageClassifierOutput`; None for a component without
            experts.
        aux_loss: Scalar sum of the load-balancing losses, each weighted with its router_aux_loss_coef; None as there.
        robust_extra_logits: `extra_logits` of F_R.
        router_logits, expert_index: Those of the merged network, with mixing="weights" and experts.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    standard_logits: Tensor | None = None
    robust_logits: Tensor | None = None
    standard_router_logits: Tensor | None = None
    robust_router_logits: Tensor | None = None
    standard_expert_index: Tensor | None = None
    robust_expert_index: Tensor | None = None
    aux_loss: Tensor | None = None
    robust_extra_logits: Tensor | None = None
    router_logits: Tensor | None = None
    expert_index: Tensor | None = None


class DualMoEForImageClassification(RobustPreTrainedModel):
    """The dual model F_D(x) = (1 - alpha) F_S(x) + alpha F_R(x) of a standard and a robust classifier (paper, Eq. 7).

    alpha = 0 is F_S alone, alpha = 1 is F_R alone; `set_alpha` or `forward(..., alpha=)` turn the dial at run time.
    With mixing="weights" the dial is in the weights: see `merging_dualmoe` and `merge`.
    """

    config_class = DualMoEConfig
    config: DualMoEConfig

    def __init__(self, config: DualMoEConfig):
        super().__init__(config)
        self.standard = create_component(config.standard, config)
        self.robust = create_component(config.robust, config)
        self._create_normalizers()
        self._keep_initialisation()
        self.post_init()

    def _create_normalizers(self) -> None:
        for name in ("standard", "robust"):
            mean, std = getattr(self.config, f"{name}_image_mean"), getattr(self.config, f"{name}_image_std")
            normalizer = nn.Identity() if mean is None or std is None else Normalize(mean, std)
            size = side_of(name, getattr(getattr(self.config, name), "image_size", None))
            if self.config.input_size not in (None, size):
                normalizer = nn.Sequential(Resize(size), normalizer)
            setattr(self, f"normalize_{name}", normalizer)

    @classmethod
    def from_models(
        cls, standard: PreTrainedModel, robust: PreTrainedModel, alpha: float = 0.75, **config_kwargs: Any
    ) -> "DualMoEForImageClassification":
        """Join two trained image classifiers; any model that `AutoModelForImageClassification` gives will do.

        Args:
            standard: F_S.
            robust: F_R, with the same labels in the same order.
            alpha: Weight of F_R in [0, 1].
            config_kwargs: Further fields of `DualMoEConfig`, such as `standard_image_mean` and `standard_image_std`
                for a model that expects normalised images, or `mixing`.

        Raises:
            ValueError: One is no model of transformers, the two disagree on labels, image size or channels, alpha is
                out of range, mixing="weights" and they cannot be merged, or one could not be built again from its
                config, as loading will.
        """
        for name, model in (("standard", standard), ("robust", robust)):
            check_component(name, model)
        named = common_labels(standard.config.id2label, robust.config.id2label)
        config_kwargs = {"id2label": named, "label2id": {name: i for i, name in named.items()}, **config_kwargs}
        configs = copy.deepcopy((standard.config, robust.config))  # the joined config writes into its parts
        for config, model in zip(configs, (standard, robust), strict=True):
            config.architectures = [type(model).__name__]  # transformers has two classes for some model types
        config = cls.config_class(standard=configs[0], robust=configs[1], alpha=alpha, **config_kwargs)
        with torch.device("meta"):  # no second copy of the weights
            joined = cls(config)
        for name, model in (("standard", standard), ("robust", robust)):
            target = f"a {type(getattr(joined, name)).__name__} of {name}.config, which would be built on loading"
            check_same_parameters(getattr(joined, name).state_dict(), model.state_dict(), target)
        joined.standard = standard
        joined.robust = copy.deepcopy(robust) if robust is standard else robust  # shared tensors cannot be saved
        joined._create_normalizers()  # again, since those of above are on the meta device
        if joined.config.mixing == "weights":
            joined._check_mergeable()
        return joined.train(standard.training)  # one mode for both: F_S and F_R may differ

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the two components' dtypes, in which both are saved and loaded again: nothing is rounded."""
        return torch.promote_types(self.standard.dtype, self.robust.dtype)

    def set_alpha(self, alpha: float) -> None:
        """Turn the dial: the weight of F_R in [0, 1], from now on and in what is saved.

        Raises:
            ValueError: alpha is out of range.
        """
        check_alpha(alpha)
        forget_merge(self)
        self.config.alpha = float(alpha)

    def set_mixing(self, mixing: str) -> None:
        """Say what alpha mixes, from now on and in what is saved: "probs", "logits" or "weights".

        Raises:
            ValueError: There is no such mixing, or F_S and F_R cannot be merged.
        """
        check_choice("mixing", mixing, MIXINGS)
        if mixing == "weights":
            self._check_mergeable()
        self.config.mixing = mixing

    def merge(self, alpha: float | None = None) -> PreTrainedModel:
        """The network with weights and BatchNorm statistics (1 - alpha) theta_S + alpha theta_R, as a plain model.

        Of the class of F_R, in eval mode, with weights of its own: to be saved, attacked or trained like any other.
        Images that F_R gets normalised by `robust_image_mean` and `robust_image_std` must be given to it so.

        Args:
            alpha: Weight of F_R in [0, 1]; None = the config's.

        Raises:
            ValueError: alpha is out of range, or F_S and F_R cannot be merged; the message says why.
        """
        alpha = self._merging_alpha(alpha)
        self._check_mergeable()
        return self._interpolated(alpha)

    def _interpolated(self, alpha: float) -> PreTrainedModel:
        self._refuse_unmergeable()
        model = interpolate(self.standard, self.robust, alpha)
        model.config.id2label, model.config.label2id = dict(self.config.id2label), dict(self.config.label2id)
        return model

    # it looks at versions and addresses of tensors, which a compiled graph does not know
    @torch.compiler.disable
    def merged_network(self, alpha: float | None = None) -> PreTrainedModel | None:
        """With mixing="weights" the network that answers, kept until alpha or a weight changes; else None.

        Writes through `tensor.data` are only seen after `set_alpha`, `train` or `eval`.
        """
        if self.config.mixing != "weights":
            return None
        alpha = self._merging_alpha(alpha)
        return cached_merge(self, (self.standard, self.robust), alpha, make=lambda: self._interpolated(alpha))

    def _refuse_unmergeable(self) -> None:
        obstacles = self.config.merge_obstacles() or weights_obstacles(self.standard, self.robust)
        if obstacles:
            raise ValueError(f"F_S and F_R cannot be merged: {'; '.join(obstacles)}.")

    def _check_mergeable(self) -> None:
        """Refuse what cannot be merged; warn where it can, but hardly to any use."""
        self._refuse_unmergeable()
        cosine = weights_cosine(self.standard, self.robust)
        if cosine < UNRELATED:
            logger.warning_once(
                f"F_S and F_R look trained apart (cosine of their weights {cosine:.3f}). Between networks without a "
                "common start there is none that is of use; see what `sweep_alpha` measures there."
            )

    def _merging_alpha(self, alpha: float | Tensor | None) -> float:
        """The one position of the dial that a network can have."""
        alpha = self.config.alpha if alpha is None else alpha
        check_alpha(alpha)
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise ValueError(
                f"alpha has shape {tuple(alpha.shape)}, but with mixing='weights' one network answers for all images: "
                "give one number."
            )
        return float(alpha)

    def train(self, mode: bool = True) -> "DualMoEForImageClassification":
        """As `nn.Module.train`; a merged network is made anew at the next call."""
        forget_merge(self)
        return super().train(mode)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        alpha: float | Tensor | None = None,
        expert_index: Tensor | None = None,
        robust_pixel_values: Tensor | None = None,
        output_router_logits: bool | None = None,
        extra_expert_index: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> DualMoEImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images with both models and mix; with mixing="weights" with the merged network alone.

        Args:
            pixel_values: (B, C, H, W) floats in [0, 1].
            labels: (B,) int64; with them the output carries the training loss.
            alpha: Weight of F_R for this call: a number in [0, 1], or (not with mixing="weights") a tensor that
                broadcasts against (B, 1); None = the config's.
            expert_index: As in `MoEForImageClassification.forward`, for F_R or the merged network.
            robust_pixel_values: (B', C, H, W) other images for F_R: training shows F_S clean and F_R attacked images
                in one call, so that DDP sees one forward; there is then no mixture and `logits` is None.
            output_router_logits: Whether to return the router logits.
            extra_expert_index: As in `MoEForImageClassification.forward`, for F_R.
            return_dict: As in `MoEForImageClassification.forward`.

        Raises:
            ValueError: Wrong shape, dtype or values of an argument; or, with mixing="weights", the model is in train
                mode or was given what only training needs.
        """
        if self.config.mixing == "weights":
            self._refuse_training(robust_pixel_values, extra_expert_index)
            output = self._forward_merged(pixel_values, labels, alpha, expert_index, output_router_logits)
        else:
            alpha = self._checked_alpha(alpha, len(pixel_values))
            standard = self._run("standard", pixel_values, labels, None, output_router_logits)
            own_images = robust_pixel_values is None
            robust = self._run(
                "robust",
                pixel_values if own_images else robust_pixel_values,
                labels if own_images else None,
                expert_index,
                output_router_logits,
                extra_expert_index,
            )
            logits = self.mix(standard.logits, robust.logits, alpha) if own_images else None
            output = self._joined_output(standard, robust, logits, labels)
        return output.to_tuple() if return_dict is False else output

    def _checked_alpha(self, alpha: float | Tensor | None, batch_size: int) -> float | Tensor:
        """alpha, or else the config's; ValueError unless it is one number in [0, 1], or one for each image."""
        alpha = self.config.alpha if alpha is None else alpha
        check_alpha(alpha)
        if isinstance(alpha, Tensor) and alpha.numel() != 1 and alpha.shape != (batch_size, 1):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; expected one number, or ({batch_size}, 1).")
        return alpha

    def _joined_output(
        self, standard: ModelOutput, robust: ModelOutput, logits: Tensor | None, labels: Tensor | None
    ) -> DualMoEImageClassifierOutput:
        """Join the outputs of both models and, where there is one, their mixture."""
        parts = [self._weighted_aux_loss("standard", standard), self._weighted_aux_loss("robust", robust)]
        parts = [part for part in parts if part is not None]
        aux_loss = sum(parts) if parts else None
        return DualMoEImageClassifierOutput(
            loss=self._loss(logits, labels, aux_loss),
            logits=logits,
            standard_logits=standard.logits,
            robust_logits=robust.logits,
            standard_router_logits=standard.get("router_logits"),
            robust_router_logits=robust.get("router_logits"),
            standard_expert_index=standard.get("expert_index"),
            robust_expert_index=robust.get("expert_index"),
            aux_loss=aux_loss,
            robust_extra_logits=robust.get("extra_logits"),
        )

    def _loss(self, logits: Tensor | None, labels: Tensor | None, aux_loss: Tensor | None) -> Tensor | None:
        """Cross-entropy + weighted balance losses; None without logits or labels."""
        if logits is None or labels is None:
            return None
        check_labels(labels, len(logits), self.config.num_labels)
        return F.cross_entropy(logits, labels) + (0 if aux_loss is None else aux_loss)

    def _refuse_training(self, robust_pixel_values: Tensor | None, extra_expert_index: Tensor | None) -> None:
        if self.training or robust_pixel_values is not None or extra_expert_index is not None:
            raise ValueError(
                "mixing='weights' is a dial for trained models: no gradient reaches F_S and F_R. Train with "
                "mixing='probs' and call set_mixing('weights') then, or train the network that merge() gives."
            )

    def _forward_merged(
        self,
        pixel_values: Tensor,
        labels: Tensor | None,
        alpha: float | Tensor | None,
        expert_index: Tensor | None,
        output_router_logits: bool | None,
    ) -> DualMoEImageClassifierOutput:
        network = self.merged_network(alpha)
        # as F_R, since merged parts are normalised alike (`merge_obstacles`)
        output = self._run("robust", pixel_values, labels, expert_index, output_router_logits, network=network)
        logits, aux_loss = output.logits.float(), self._weighted_aux_loss("robust", output)
        return DualMoEImageClassifierOutput(
            loss=self._loss(logits, labels, aux_loss),
            logits=logits,
            aux_loss=aux_loss,
            router_logits=output.get("router_logits"),
            expert_index=output.get("expert_index"),
        )

    def mix(self, standard_logits: Tensor, robust_logits: Tensor, alpha: float | Tensor | None = None) -> Tensor:
        """`mix_logits` under this model's logit maps, mixing rule and (by default) alpha."""
        alpha = self.config.alpha if alpha is None else alpha
        standard_logits = apply_logit_map(standard_logits, self.config.standard_logit_map)
        robust_logits = apply_logit_map(robust_logits, self.config.robust_logit_map)
        return mix_logits(standard_logits, robust_logits, alpha, self.config.mixing)

    def _run(
        self,
        name: str,
        pixel_values: Tensor,
        labels: Tensor | None,
        expert_index: Tensor | None,
        output_router_logits: bool | None,
        extra_expert_index: Tensor | None = None,
        network: nn.Module | None = None,
    ) -> ModelOutput:
        model = getattr(self, name) if network is None else network
        if has_experts(model):  # labels only tell it that its balance loss is wanted
            return model(pixel_values, labels, expert_index, output_router_logits, extra_expert_index)
        if expert_index is not None or extra_expert_index is not None:
            raise ValueError(f"expert_index was given, but the {name} model has no experts.")
        check_pixel_values(pixel_values, getattr(model.config, "num_channels", 3), self.config.input_size)
        output = model(getattr(self, f"normalize_{name}")(pixel_values).to(model.dtype))
        return ModelOutput(logits=output[0]) if isinstance(output, tuple) else output  # config.return_dict=False

    def _weighted_aux_loss(self, name: str, output: ModelOutput) -> Tensor | None:
        if output.get("aux_loss") is None:
            return None
        return getattr(self.config, name).router_aux_loss_coef * output.aux_loss


def check_component(name: str, model: Any) -> None:
    """Raise a ValueError unless F_S or F_R is a model of transformers, without anything around it."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} is a {type(model).__name__}; expected a model of transformers. To join what load_classifier "
            "gives, or folders, use hf_dualmoe.models.joining.join_models."
        )


def common_labels(standard: dict[int, str], robust: dict[int, str]) -> dict[int, str]:
    """The label names of two components: those of the one that has any, or of both where they agree.

    Raises:
        ValueError: They disagree.
    """
    generic = [all(name == f"LABEL_{i}" for i, name in names.items()) for names in (standard, robust)]
    if standard != robust and not (any(generic) and len(standard) == len(robust)):
        raise ValueError(f"standard has labels {standard} but robust has {robust}; they must agree in order.")
    return {i: str(name) for i, name in (standard if generic[1] else robust).items()}


def create_component(config: PreTrainedConfig, dual_config: DualMoEConfig) -> PreTrainedModel:
    """Build F_S or F_R with the dual model's number of labels."""
    # from_pretrained(..., num_labels=) changes the outer config alone
    if config.num_labels != dual_config.num_labels:
        config.num_labels = dual_config.num_labels
    if config.model_type == MoEConfig.model_type:  # not isinstance: code from the Hub has config classes of its own
        return MoEForImageClassification(config)
    with limited_size():  # without memory, to see how large it would be
        AutoModelForImageClassification.from_config(config)
    return AutoModelForImageClassification.from_config(config)


__all__ = [
    "DualMoEForImageClassification",
    "DualMoEImageClassifierOutput",
    "MoEForImageClassification",
    "MoEImageClassifierOutput",
]
