"""Standard and robust accuracy as a module of the `evaluate` library; works offline from this folder.

metric = evaluate.load("path/to/hf_dualmoe/evaluation/metrics/robust_accuracy")
metric.add_batch(clean_predictions=clean, predictions=attacked, references=labels)
metric.compute()
"""

from typing import Any

# `evaluate` alone loads this file: it is an optional package
import datasets
import evaluate
from numpy.typing import ArrayLike

from .accuracy_counts import robust_accuracy

DESCRIPTION = """
Accuracy of an image classifier on clean images (SA) and under an attack (RA), in %, with Wilson score intervals. An
image counts as robust only if it is classified rightly both clean and attacked.
"""
INPUTS_DESCRIPTION = """
Args:
    clean_predictions: (N,) integer classes predicted for the clean images.
    predictions: (N,) integer classes predicted for the attacked images.
    references: (N,) the right classes, >= 0.
    confidence_level: Of the intervals, in (0, 1); default 0.95.
Returns:
    sa, ra: in %; sa_interval, ra_interval: [low, high] in %.
    per_class_ra, per_class_ra_interval, per_class_count: by label, for the labels among the references.
    num_images, num_clean_correct, num_robust, confidence_level.
Examples:
    >>> metric = evaluate.load("hf_dualmoe/evaluation/metrics/robust_accuracy")
    >>> results = metric.compute(clean_predictions=[0, 1, 1, 0], predictions=[0, 1, 0, 1], references=[0, 1, 1, 1])
    >>> results["sa"], results["ra"]
    (75.0, 50.0)
"""
CITATION = """
@article{wilson1927probable,
  title={Probable Inference, the Law of Succession, and Statistical Inference},
  author={Wilson, Edwin B.},
  journal={Journal of the American Statistical Association},
  volume={22}, number={158}, pages={209--212}, year={1927}
}
"""


class RobustAccuracy(evaluate.Metric):
    """SA and RA with intervals; the mathematics is `accuracy_counts.robust_accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        names = ("clean_predictions", "predictions", "references")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("int64") for name in names}),
        )

    def _compute(
        self,
        clean_predictions: ArrayLike,
        predictions: ArrayLike,
        references: ArrayLike,
        confidence_level: float = 0.95,
    ) -> dict[str, Any]:
        return robust_accuracy(clean_predictions, predictions, references, confidence_level)
