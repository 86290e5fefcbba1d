"""Standard and robust accuracy from predictions, with Wilson score intervals.

Needs numpy only and imports nothing of this package: `evaluate` copies this file beside `robust_accuracy.py`, here and
from the Hub, and the package imports it through `hf_dualmoe.evaluation.metrics`.
"""

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def wilson_interval(successes: int, total: int, confidence_level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Unlike the normal approximation it stays inside [0, 100] % and is of use at shares of 0 and 100 % and for few
    images.

    Args:
        successes: Number of successes, in [0, total].
        total: Number of trials, >= 1.
        confidence_level: Share of such intervals that hold the true value, in (0, 1).

    Returns:
        (low, high) in %.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """
    if total < 1:
        raise ValueError(f"total={total!r} must be at least 1.")
    if not 0 <= successes <= total:
        raise ValueError(f"successes={successes!r} must be in [0, total] = [0, {total}].")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level={confidence_level!r} must be in (0, 1), such as 0.95.")
    z = NormalDist().inv_cdf((1 + confidence_level) / 2)
    share, weight = successes / total, z * z / total  # p and z**2 / n of Wilson's formula
    centre = (share + weight / 2) / (1 + weight)
    half_width = z / (1 + weight) * (share * (1 - share) / total + weight / (4 * total)) ** 0.5
    low = 0.0 if successes == 0 else centre - half_width  # exact there; rounding would leave 1e-17
    high = 1.0 if successes == total else centre + half_width
    return 100 * low, 100 * high


def robust_accuracy(
    clean_predictions: ArrayLike, predictions: ArrayLike, references: ArrayLike, confidence_level: float = 0.95
) -> dict[str, Any]:
    """Standard and robust accuracy; an image is robust only if it is classified rightly both clean and attacked.

    Args:
        clean_predictions: (N,) integer classes predicted for the clean images.
        predictions: (N,) integer classes predicted for the attacked images.
        references: (N,) the right classes, >= 0.
        confidence_level: Of the intervals, in (0, 1).

    Returns:
        `sa` and `ra` in % with `sa_interval` and `ra_interval` [low, high] in %; `per_class_ra`,
        `per_class_ra_interval` and `per_class_count` by label, for the labels among the references; the counts
        `num_images`, `num_clean_correct` and `num_robust`; `confidence_level`.

    Raises:
        ValueError: Lengths differ, there are no images, a label is negative or not an integer, or the confidence level
            is out of range.
    """
    given = {"clean_predictions": clean_predictions, "predictions": predictions, "references": references}
    clean, attacked, right = (_check_labels(name, values) for name, values in given.items())
    if not len(clean) == len(attacked) == len(right):
        lengths = f"clean_predictions={len(clean)}, predictions={len(attacked)}, references={len(right)}"
        raise ValueError(f"lengths differ ({lengths}); all three need one entry per image.")
    correct = clean == right
    robust = correct & (attacked == right)
    result: dict[str, Any] = {}
    for name, mask in (("sa", correct), ("ra", robust)):
        result[name] = 100 * float(mask.mean())
        result[f"{name}_interval"] = list(wilson_interval(int(mask.sum()), len(mask), confidence_level))
    classes = {int(label): robust[right == label] for label in np.unique(right)}
    return {
        **result,
        "per_class_ra": {label: 100 * float(mask.mean()) for label, mask in classes.items()},
        "per_class_ra_interval": {
            label: list(wilson_interval(int(mask.sum()), len(mask), confidence_level))
            for label, mask in classes.items()
        },
        "per_class_count": {label: len(mask) for label, mask in classes.items()},
        "num_images": len(right),
        "num_clean_correct": int(correct.sum()),
        "num_robust": int(robust.sum()),
        "confidence_level": confidence_level,
    }


def _check_labels(name: str, values: ArrayLike) -> np.ndarray:
    """(N,) integers, N >= 1, none negative."""
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (images,) with at least one image.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}; expected integer class indices, not scores.")
    if array.min() < 0:
        raise ValueError(f"{name} contains {array.min()}; class indices must be >= 0.")
    return array


__all__ = ["robust_accuracy", "wilson_interval"]
