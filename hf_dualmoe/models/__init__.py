"""Classifiers of images in [0, 1]: mixtures of experts, dual models, and any model of transformers as one.

In: a configuration, or a saved folder or Hub id. Out: a model whose output has `logits`.
The files named *_dualmoe.py travel to the Hub as the code of a model: they import torch, timm, transformers and each
other, nothing else. From the top: `modeling` is the dual model, with `mixing` (the dial in the outputs) and `merging`
(that in the weights); `moe` is the mixture of experts, with `routing`, `experts`, `backbones`, `lipschitz` and
`batchnorm`; both stand on `pretrained` (saving and loading), `inputs`, `configuration` and `validation`.

Calls: no other room.
"""

from .configuration_dualmoe import DualMoEConfig, MoEConfig
from .converting import from_official
from .joining import join_models
from .loading import NormalizedClassifier, load_classifier
from .modeling_dualmoe import DualMoEForImageClassification, DualMoEImageClassifierOutput
from .moe_dualmoe import MoEForImageClassification, MoEImageClassifierOutput
from .outputs import find_logits, logits_of
from .parts import at_alpha, has_dial, has_experts, is_dual, mixes_weights, mixture_of

__all__ = [
    "DualMoEConfig",
    "DualMoEForImageClassification",
    "DualMoEImageClassifierOutput",
    "MoEConfig",
    "MoEForImageClassification",
    "MoEImageClassifierOutput",
    "NormalizedClassifier",
    "at_alpha",
    "find_logits",
    "from_official",
    "has_dial",
    "has_experts",
    "is_dual",
    "join_models",
    "load_classifier",
    "logits_of",
    "mixes_weights",
    "mixture_of",
]
