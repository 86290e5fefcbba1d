"""Accuracy counts and their confidence intervals; the module for the `evaluate` library is in `robust_accuracy/`."""

from .robust_accuracy.accuracy_counts import robust_accuracy, wilson_interval

__all__ = ["robust_accuracy", "wilson_interval"]
