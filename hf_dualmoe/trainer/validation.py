"""Evaluations during training: what they measure, and the number of each image, which seeds its attack."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import EvalPrediction


def robust_accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """SA and RA in %, and their mean, from the logits on clean and (where there are any) attacked images."""
    logits = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
    correct = [values.argmax(axis=1) == prediction.label_ids for values in logits]
    metrics = {"sa": 100 * float(correct[0].mean())}
    if len(correct) == 2:
        # an image that is wrong when clean is not robust
        metrics["ra"] = 100 * float((correct[0] & correct[1]).mean())
        metrics["sa_ra_mean"] = (metrics["sa"] + metrics["ra"]) / 2
    return metrics


class NumberedDataset(Dataset):
    """Items of a dataset with their numbers as "ids": the seeds of the evaluation's attacks.

    Args:
        dataset: Gives mappings; with `__getitems__` also lists of them, or a whole batch as one mapping.
    """

    def __init__(self, dataset: Dataset | Sequence[Mapping[str, Any]]):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "ids": index}

    def __getitems__(self, indices: Sequence[int]) -> Mapping[str, Any] | list[dict[str, Any]]:
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        batch = self.dataset.__getitems__(indices)
        if isinstance(batch, Mapping):
            return {**batch, "ids": torch.as_tensor(indices)}
        return [{**item, "ids": index} for item, index in zip(batch, indices, strict=True)]


def numbered(dataset: Dataset | None) -> Dataset | None:
    """The dataset with numbers; a stream, which has none, as it is."""
    return dataset if dataset is None or isinstance(dataset, IterableDataset) else NumberedDataset(dataset)


__all__ = ["robust_accuracy_metrics"]
