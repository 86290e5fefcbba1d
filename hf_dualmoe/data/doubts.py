"""Reasons to doubt accuracies on a dataset: classes without an image, images that are in train too."""

import logging
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .datasets import DataSplits

logger = logging.getLogger("hf_dualmoe.data.datasets")  # users find all warnings about data under one name

LOOK = 1024  # bytes of an image that a search for duplicates looks at first


def with_doubts(splits: "DataSplits", limits: Mapping[str, int | None]) -> "DataSplits":
    """Notes, in place, which classes a set lacks and how many images it shares with train, and warns of both.

    A set that the caller limited to fewer images than there are classes lacks some by that: no warning.
    """
    for role, data in splits.sets.items():
        counts = torch.bincount(data.labels, minlength=splits.num_labels).tolist()
        missing = [name for name, count in zip(splits.class_names, counts, strict=True) if count == 0]
        if missing and (limits[role] or splits.num_labels) >= splits.num_labels:
            splits.missing_classes[role] = missing
            shown = f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}"
            text = "%s has no image of %d of the %d classes: %s"
            logger.warning(text, role, len(missing), splits.num_labels, shown)
        shared = 0 if splits.train in (None, data) else count_duplicates(splits.train.images, data.images)
        if shared:
            splits.duplicates[role] = shared
            text = "%d of the %d %s images are in train too, to the pixel: accuracy on them says nothing of new images"
            logger.warning(text, shared, len(data), role)
    return splits


def count_duplicates(train: Tensor, others: Tensor) -> int:
    """Counts the images of `others` whose pixels are, all of them, those of an image of `train`.

    A first look at the middle `LOOK` bytes of each image leaves few to be hashed as a whole.

    Args:
        train, others: uint8, shapes (N, C, H, W) and (M, C, H, W).
    """
    train_rows, other_rows = train.flatten(1).numpy(), others.flatten(1).numpy()
    start = max(0, (train_rows.shape[1] - LOOK) // 2)
    # hash() is salted in each process, which is fine for a comparison within one
    looks = [[hash(row[start : start + LOOK].tobytes()) for row in rows] for rows in (train_rows, other_rows)]
    alike = set(looks[0]) & set(looks[1])
    whole = [
        [
            blake2b(row.tobytes(), digest_size=16).digest()
            for row, look in zip(rows, seen, strict=True)
            if look in alike
        ]
        for rows, seen in zip((train_rows, other_rows), looks, strict=True)
    ]
    return sum(Counter(whole[1])[digest] for digest in set(whole[0]))


__all__ = ["count_duplicates", "with_doubts"]
