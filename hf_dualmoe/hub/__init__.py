"""From a trained model to what others can use: model card, upload, ONNX file.

In: a folder with a model and its results.json. Out: README.md, a commit on the Hub, a file for other tools.

Calls: attacks, evaluation, models.
"""

from .model_card import CardSubject, check_card, create_model_card, refresh_model_card, write_model_card
from .onnx import DenseModel, LogitsModel, export_onnx, onnx_difference
from .publish import Published, publish_folder, push_model
from .trainer_publishing import PublishingMixin
from .upload_plan import Upload, plan_upload

__all__ = [
    "CardSubject",
    "DenseModel",
    "LogitsModel",
    "Published",
    "PublishingMixin",
    "Upload",
    "check_card",
    "create_model_card",
    "export_onnx",
    "onnx_difference",
    "plan_upload",
    "publish_folder",
    "push_model",
    "refresh_model_card",
    "write_model_card",
]
