"""The Trainer of transformers with an attack inside the loss, which survives interruptions.

In: a model, `RobustTrainingArguments`, datasets. Out: the trained model, a log, checkpoints.

Calls: attacks, data, evaluation, hub, losses, models.
"""

from .arguments import METHODS, RobustTrainingArguments
from .checkpoints import CheckpointError, last_good_checkpoint
from .time_estimate import TimeEstimate, estimate_time
from .trainer import RobustTrainer
from .validation import robust_accuracy_metrics

__all__ = [
    "CheckpointError",
    "METHODS",
    "RobustTrainer",
    "RobustTrainingArguments",
    "TimeEstimate",
    "estimate_time",
    "last_good_checkpoint",
    "robust_accuracy_metrics",
]
