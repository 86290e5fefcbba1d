"""Evaluation: how often a classifier is right on clean and on attacked images, and where its dial should stand.

In: a model and a dataset. Out: a `RobustnessReport` (results.json, a table, plots), and outcomes.parquet, which says
what became of each image.

Calls: attacks, data, models.
"""

from .calibration import calibrate_robust_logits
from .dial import AlphaChoice, choose_alpha, dial_attack, sweep_alpha
from .evaluation import evaluate_robustness
from .metrics import robust_accuracy, wilson_interval
from .outcomes import recount
from .plots import save_plots
from .report import RobustnessReport
from .sanity import Check, run_sanity_checks

__all__ = [
    "AlphaChoice",
    "Check",
    "RobustnessReport",
    "calibrate_robust_logits",
    "choose_alpha",
    "dial_attack",
    "evaluate_robustness",
    "recount",
    "robust_accuracy",
    "run_sanity_checks",
    "save_plots",
    "sweep_alpha",
    "wilson_interval",
]
