"""Image classifiers that stay accurate under attack: robust mixtures of experts, native to Hugging Face.

`import hf_dualmoe` gives the models and registers them with the Auto classes of transformers. All other names of
`__all__` are loaded when they are first used; the rooms (`hf_dualmoe.attacks`, ...) have more.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .models.configuration_dualmoe import DualMoEConfig, MoEConfig
from .models.modeling_dualmoe import DualMoEForImageClassification
from .models.moe_dualmoe import MoEForImageClassification
from .models.pretrained_dualmoe import RobustPreTrainedModel

if TYPE_CHECKING:
    from .attacks import PGD, autoattack, worst_case
    from .certification import certify
    from .data import load_splits
    from .evaluation import RobustnessReport, evaluate_robustness
    from .models import load_classifier
    from .trainer import RobustTrainer, RobustTrainingArguments

__version__ = "0.1.0"
__all__ = [
    "PGD",
    "DualMoEConfig",
    "DualMoEForImageClassification",
    "MoEConfig",
    "MoEForImageClassification",
    "RobustTrainer",
    "RobustTrainingArguments",
    "RobustnessReport",
    "autoattack",
    "certify",
    "evaluate_robustness",
    "load_classifier",
    "load_splits",
    "worst_case",
]
_ROOMS = {  # of the names that are loaded when they are first used
    "PGD": "attacks",
    "RobustTrainer": "trainer",
    "RobustTrainingArguments": "trainer",
    "RobustnessReport": "evaluation",
    "autoattack": "attacks",
    "certify": "certification",
    "evaluate_robustness": "evaluation",
    "load_classifier": "models",
    "load_splits": "data",
    "worst_case": "attacks",
}

for _config, _model in ((MoEConfig, MoEForImageClassification), (DualMoEConfig, DualMoEForImageClassification)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)  # a reload registers twice, which would raise
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)


def __getattr__(name: str) -> Any:  # PEP 562: `import hf_dualmoe` needs no datasets and evaluate, which take seconds
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _push_model(model: RobustPreTrainedModel, repo_id: str, **options: Any) -> Any:
    """`hub.push_model`, imported when it is first used: nobody needs it to load or run a model."""
    from .hub import push_model

    return push_model(model, repo_id, **options)


RobustPreTrainedModel.register_publisher(_push_model)  # models call no other room, so they are told
