"""The mixture of experts: E image classifiers behind a router that chooses who answers for an image.

Images go in as floats in [0, 1]; normalisation is inside the model, so an attack radius always counts in pixel units.
This file travels to the Hub as remote code together with the other *_dualmoe.py files.

Paper: *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach*, https://arxiv.org/abs/2502.06832
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from .backbones_dualmoe import Trunk, check_model_size, create_backbone, cut_backbone
from .configuration_dualmoe import MoEConfig
from .experts_dualmoe import hard_route, soft_route
from .inputs_dualmoe import Normalize, check_expert_index, check_labels, check_pixel_values, luminance
from .pretrained_dualmoe import RobustPreTrainedModel, check_same_parameters
from .routing_dualmoe import create_router, load_balancing_loss

INITIALISED_BY_PARENT = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)  # by transformers' own _init_weights


@dataclass
class MoEImageClassifierOutput(ModelOutput):
    """Output of `MoEForImageClassification`; B images, E experts, C labels.

    Args:
        loss: Scalar: cross-entropy + router_aux_loss_coef * aux_loss; only with labels.
        logits: (B, C); k = 1: the chosen expert's logits; k > 1: log-probabilities of the mixture.
        router_logits: (B, E) before softmax; only where asked for.
        expert_index: (B,) the expert used for k = 1; (B, k), highest score first, for k > 1.
        aux_loss: Scalar load-balancing loss, unweighted, over the rows that the router decided; None where nobody can
            learn from it: without labels under `no_grad` (`pipeline` can only split a batch of outputs that have a row
            per image) or with frozen routes (attacks).
        extra_logits: (B, C) of the experts `extra_expert_index`, 0 in rows without one; only where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    router_logits: Tensor | None = None
    expert_index: Tensor | None = None
    aux_loss: Tensor | None = None
    extra_logits: Tensor | None = None


class MoEForImageClassification(RobustPreTrainedModel):
    """E image classifiers behind a router that sends each image to its k best experts (paper, Section 3).

    k = 1: the output is exactly f_i(x) of the expert with the highest score, at the cost of one expert; the router
    learns through the straight-through weight a_i / stopgrad(a_i). k > 1: the mixture of the k experts' probabilities
    with renormalised weights, as log-probabilities.
    """

    config_class = MoEConfig
    config: MoEConfig

    def __init__(self, config: MoEConfig):
        check_model_size(config)  # before anything takes memory: a config may come from a stranger
        super().__init__(config)
        self.normalize = Normalize(config.image_mean, config.image_std)
        self.trunk = Trunk(config)
        self.experts = nn.ModuleList(self._create_expert() for _ in range(config.num_experts))
        self.router = create_router(config, self.trunk.num_features)
        self._keep_initialisation()  # before post_init, which would fill timm's layers anew
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if type(module) in INITIALISED_BY_PARENT:
            return
        names = set()  # of what no weight file has filled
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                names.add(name)
        if hasattr(module, "init_non_persistent_buffers"):  # timm 1.0.22 has none
            names -= module._non_persistent_buffers_set
        if names:
            self._refill_from_fresh_backbone(module, names)

    def _refill_from_fresh_backbone(self, module: nn.Module, names: set[str]) -> None:
        """Give these tensors of a part of a backbone the values of a fresh one: the parent knows nothing of them."""
        whole_names = {id(m): name for part in self._backbone_parts() for name, m in part.named_modules()}
        if id(module) not in whole_names:
            return
        with torch.device("cpu"):  # from_pretrained builds on the meta device, where there are no values to copy
            fresh = create_backbone(self.config).get_submodule(whole_names[id(module)])
        for name in names:
            getattr(module, name).copy_(getattr(fresh, name))

    def _backbone_parts(self) -> list[nn.Module]:
        return [*self.experts] if self.trunk.stages is None else [self.trunk.stages, *self.experts]

    def _create_expert(self) -> nn.Module:
        backbone = create_backbone(self.config)
        return backbone if self.trunk.stages is None else cut_backbone(backbone, self.config.shared_stages, "expert")

    @classmethod
    def from_backbone(
        cls,
        config: MoEConfig,
        *,
        pretrained: bool = False,
        init_experts_from: str | os.PathLike | nn.Module | None = None,
        **timm_kwargs: Any,
    ) -> "MoEForImageClassification":
        """Build a mixture that starts from trained weights: of one network for trunk and experts, or of a mixture.

        Args:
            config: Configuration of the mixture.
            pretrained: Start from timm's pretrained weights of `config.backbone`.
            init_experts_from: Start every expert from a trained single network ("upcycling"): a timm module of the
                same architecture, or a `MoEForImageClassification` with one expert; or start from a mixture of the
                same shape, whose router is taken over, too. A model, or the folder or Hub id of one; of a
                `MoEForImageClassification` the pixel mean and std are taken over as well.
            timm_kwargs: Passed on to `timm.create_model` with `pretrained=True`.

        Raises:
            ValueError: Both or neither source is given, or the source has other parameters than the backbone, or, with
                several experts, than the mixture.
        """
        if pretrained == (init_experts_from is not None):
            raise ValueError(
                f"Give exactly one source: pretrained={pretrained} and init_experts_from={init_experts_from!r}."
            )
        source = init_experts_from
        if isinstance(source, (str, os.PathLike)):
            source = cls.from_pretrained(source)
        if isinstance(source, cls):
            return cls._from_mixture(config, source)
        model = cls(config)
        if pretrained:
            source = create_backbone(config, pretrained=True, **timm_kwargs)
        model.load_backbone(source.state_dict())
        return model

    @classmethod
    def _from_mixture(cls, config: MoEConfig, source: "MoEForImageClassification") -> "MoEForImageClassification":
        config = copy.deepcopy(config)  # weights are of use behind the normalisation that they were trained with
        config.image_mean, config.image_std = source.config.image_mean, source.config.image_std
        model = cls(config)
        if len(source.experts) == 1:
            model.load_backbone(source.backbone_state_dict())
            return model
        target = f"a mixture with num_experts={config.num_experts}"
        check_same_parameters(model.state_dict(), source.state_dict(), target)
        model.load_state_dict(source.state_dict())
        return model

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The weights of a one-expert model under the names of its whole timm backbone.

        Raises:
            ValueError: The model has several experts.
        """
        if len(self.experts) != 1:
            raise ValueError(f"A single backbone needs num_experts=1; this model has num_experts={len(self.experts)}.")
        trunk = {} if self.trunk.stages is None else self.trunk.stages.state_dict()
        return {**trunk, **self.experts[0].state_dict()}

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Fill the trunk and every expert from the state dict of one whole backbone.

        Raises:
            ValueError: Names or shapes differ from those of the backbone.
        """
        parts = self._backbone_parts()
        own = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
        check_same_parameters(own, state_dict, f"backbone={self.config.backbone!r}")
        for part in parts:
            part.load_state_dict(state_dict, strict=False)  # a part reads its own names only; all were checked above

    def _prepare(self, pixel_values: Tensor) -> Tensor:
        """Check and normalise; a one-channel model also takes RGB (as `pipeline` sends) and sees its luminance."""
        channels = self.config.num_channels
        is_rgb = pixel_values.ndim == 4 and pixel_values.shape[1] == 3
        if channels == 1 and is_rgb and pixel_values.is_floating_point():
            pixel_values = luminance(pixel_values)
        check_pixel_values(pixel_values, channels, self.config.image_size)
        images = self.normalize(pixel_values)
        # autocast casts by itself
        return images if torch.is_autocast_enabled(images.device.type) else images.to(self.dtype)

    def _encode(self, pixel_values: Tensor, route: bool = True) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) -> trunk output for the experts, and float32 router logits (B, E), 0 unless `route`."""
        images = self._prepare(pixel_values)
        hidden = self.trunk(images)
        if not route:
            return hidden, images.new_zeros(len(images), len(self.experts), dtype=torch.float32)
        router_logits = self.router(hidden if self.config.router == "features" else images)
        return hidden, router_logits.float()

    def route(self, pixel_values: Tensor) -> Tensor:
        """Router logits (B, E), before softmax, of images (B, C, H, W); runs no more than the router needs."""
        images = self._prepare(pixel_values)
        return self.router(self.trunk(images) if self.config.router == "features" else images).float()

    def expert_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every expert (B, E, C), at the cost of E experts, and router logits (B, E) before softmax."""
        hidden, router_logits = self._encode(pixel_values)
        return torch.stack([expert(hidden) for expert in self.experts], dim=1), router_logits  # (B, E, C)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        expert_index: Tensor | None = None,
        output_router_logits: bool | None = None,
        extra_expert_index: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MoEImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W) floats in [0, 1].
            labels: (B,) int64; with them the output carries the training loss.
            expert_index: (B,) int64: the expert to use for each image instead of the router's choice; -1 leaves the
                choice to the router. So one batch can serve several terms of a loss.
            output_router_logits: Whether to return the router logits; default: the config's.
            extra_expert_index: (B,) int64: an expert whose own logits to return as well, -1 = none. It shares the
                trunk's work with the rest.
            return_dict: False gives a tuple of the fields that are not None. The config's field of this name has no
                effect, since the code around the model reads fields by name.

        Raises:
            ValueError: Wrong shape, dtype or values of an argument.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        # not in passes of an attack
        balanced = labels is not None or (torch.is_grad_enabled() and self._learns_routes())
        hidden, router_logits = self._encode(pixel_values, route=balanced or wanted or len(self.experts) > 1)
        check_expert_index("expert_index", expert_index, len(pixel_values), len(self.experts))
        check_expert_index("extra_expert_index", extra_expert_index, len(pixel_values), len(self.experts))
        logits, index, extra_logits = self._run_experts(hidden, router_logits, expert_index, extra_expert_index)
        aux_loss = self._aux_loss(router_logits, expert_index) if balanced else None
        loss = None
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels)
            loss = F.cross_entropy(logits.float(), labels) + self.config.router_aux_loss_coef * aux_loss
        output = MoEImageClassifierOutput(
            loss, logits, router_logits if wanted else None, index, aux_loss, extra_logits
        )
        return output.to_tuple() if return_dict is False else output

    def _learns_routes(self) -> bool:
        """Whether a balance loss would move any weight; an attack freezes them all."""
        parts = [self.router, self.trunk] if self.config.router == "features" else [self.router]
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def _run_experts(
        self, hidden: Tensor, router_logits: Tensor, expert_index: Tensor | None, extra: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, C), the experts used, (B,) or (B, k), and the logits (B, C) of the extra experts, if any."""
        top_k = self.config.router_top_k
        if top_k > 1:
            return soft_route(self.experts, hidden, router_logits, top_k, expert_index, extra)
        # an attack freezes the router: no straight-through weight, so it sees the true gradient
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.router.parameters())
        return hard_route(self.experts, hidden, router_logits, expert_index, extra, learns)

    def _aux_loss(self, router_logits: Tensor, expert_index: Tensor | None) -> Tensor:
        """The balance loss over the rows that the router decided."""
        # a route that was given says nothing about the router
        rows = None if expert_index is None else expert_index < 0
        return load_balancing_loss(router_logits, self.config.router_top_k, rows)


def has_experts(model: Callable, minimum: int = 1) -> bool:
    """Whether `model` is a mixture of at least `minimum` experts; by attribute: remote code has other classes."""
    return hasattr(model, "expert_logits") and model.config.num_experts >= minimum


__all__ = ["MoEForImageClassification", "MoEImageClassifierOutput", "has_experts"]
