"""A trained classifier with a fresh head for other classes; all below the head is kept."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .loading import NormalizedClassifier


def with_class_names(config: PreTrainedConfig, class_names: Sequence[str]) -> Any:
    """A copy of a model's config with these classes, in this order; the two parts of a dual model get them as well."""
    config = copy.deepcopy(config)
    for part in (config, getattr(config, "standard", None), getattr(config, "robust", None)):
        if part is not None:
            part.id2label = dict(enumerate(class_names))
            part.label2id = {name: i for i, name in enumerate(class_names)}
            if hasattr(part, "label_names"):  # of a TimmWrapperConfig, which is saved with these
                part.label_names = list(class_names)
    return config


def rename_classes(model: nn.Module, class_names: Sequence[str]) -> None:
    """Give the classes of a model other names, in place."""
    network = getattr(model, "network", model)
    for config in {id(m.config): m.config for m in (model, *network.modules()) if hasattr(m, "config")}.values():
        named = with_class_names(config, class_names)
        for name in ("id2label", "label2id", "label_names"):
            if hasattr(config, name):
                setattr(config, name, getattr(named, name))


def head_of(network: PreTrainedModel) -> list[str]:
    """The parameters and buffers of a network whose shape depends on the number of classes.

    Raises:
        ValueError: There are none.
    """
    names = [f"LABEL_{i}" for i in range(network.config.num_labels)]
    shapes = []
    for more in ([], ["one more"]):  # two twins: what changes shape with one class more is the head
        with torch.device("meta"):  # shapes are enough
            twin = type(network)(with_class_names(network.config, [*names, *more]))
        shapes.append({name: tensor.shape for name, tensor in twin.state_dict().items()})
    found = [name for name, shape in shapes[0].items() if shapes[1].get(name) != shape]
    if not found:
        raise ValueError(f"{type(network).__name__} has no head that depends on the number of classes.")
    return found


def with_new_head(model: nn.Module, class_names: Sequence[str]) -> nn.Module:
    """The same classifier with a new head, drawn at random, for other classes.

    Args:
        model: What `load_classifier` gave.
        class_names: Name of each class, in label order.

    Raises:
        ValueError: The model has no head that could be replaced.
    """
    network = model.network if isinstance(model, NormalizedClassifier) else model
    head = set(head_of(network))
    fresh = type(network)(with_class_names(network.config, class_names))
    kept = {name: tensor for name, tensor in network.state_dict().items() if name not in head}
    fresh.load_state_dict({**fresh.state_dict(), **kept})
    fresh = fresh.to(network.dtype).train(network.training)
    if isinstance(model, NormalizedClassifier):
        return NormalizedClassifier(fresh, model.preprocessing, model.processor).train(model.training)
    return fresh


__all__ = ["rename_classes", "with_new_head"]
