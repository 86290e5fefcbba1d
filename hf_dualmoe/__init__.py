"""Image classifiers that stay accurate under attack: robust mixtures of experts, native to Hugging Face."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .models.configuration_dualmoe import DualMoEConfig, MoEConfig
from .models.modeling_dualmoe import DualMoEForImageClassification, MoEForImageClassification, RobustPreTrainedModel

for _config, _model in ((MoEConfig, MoEForImageClassification), (DualMoEConfig, DualMoEForImageClassification)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)
    # What `save_pretrained` copies beside the weights, for those who have not installed this package.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForImageClassification")


def _push_to_hub(self, repo_id: str, **kwargs):
    """Upload weights, config, code, image processor and card in one commit; see `hub.push_model`."""
    from .hub.publish import push_model  # not needed to load or run a model

    return push_model(self, repo_id, **kwargs)


RobustPreTrainedModel.push_to_hub = _push_to_hub  # here: the modeling file travels without the package

__version__ = "0.1.0"
