"""Image datasets decoded once into uint8 tensors, and augmentation of whole batches.

`load_splits` turns scikit-learn's digits, a Hub dataset, a local folder or a parquet file into train, validation and
test sets. Images stay uint8 until `to_unit_range` makes them float in [0, 1]; normalisation is inside the model.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .doubts import with_doubts
from .image_folders import text_of
from .splits import assign_roles, choose_rows, decode_part, hold_out, load_source, read_labels, stratified

__all__ = [
    "DataSplits",
    "ImageTensorDataset",
    "augment",
    "collate",
    "load_digits_splits",
    "load_splits",
    "to_unit_range",
]

logger = logging.getLogger(__name__)

MOST_FOR_STATISTICS = 10_000  # images that mean and std are taken from
AT_ONCE = 256  # images whose values are counted or hashed at once
ROLES = ("train", "validation", "test")


class ImageTensorDataset(Dataset):
    """Labelled images in memory; `DataLoader` gets a batch by one indexing operation (`__getitems__`).

    Use it with `collate`, and in a `Trainer` with `remove_unused_columns=False`, whose filter expects lists of items.

    Args:
        images: uint8 (0..255), shape (N, C, H, W), N >= 1.
        labels: int64, shape (N,), each in [0, len(class_names)).
        class_names: name of each class, in label order.
        rows: int64, shape (N,): number of each image in the split that it was taken from; None: 0 .. N-1.

    Raises:
        ValueError: an argument has another dtype, shape or range.
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str], rows: Tensor | None = None):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images is {images.dtype} {tuple(images.shape)}; expected torch.uint8 (N, C, H, W)")
        if len(images) == 0:
            raise ValueError("empty dataset: images has no rows; at least 1 is needed")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels is {labels.dtype} {tuple(labels.shape)}; expected torch.int64 ({len(images)},)")
        for label in (labels.min().item(), labels.max().item()):
            if not 0 <= label < len(class_names):
                raise ValueError(f"labels contains {label}; allowed is 0 <= label < {len(class_names)} (class_names)")
        rows = torch.arange(len(images)) if rows is None else rows
        if rows.dtype != torch.int64 or rows.shape != labels.shape:
            raise ValueError(f"rows is {rows.dtype} {tuple(rows.shape)}; expected torch.int64 ({len(images)},)")
        self.images, self.labels, self.class_names, self.rows = images, labels, list(class_names), rows

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns `pixel_values`, uint8 (C, H, W), and `labels`, an int64 scalar."""
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Returns a whole batch: `pixel_values`, uint8 (B, C, H, W), and `labels`, int64 (B,)."""
        return self[torch.as_tensor(indices)]

    @cached_property
    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and std (unbiased) of each channel in [0, 1] units, over the first 10,000 images; computed once.

        From the counts of the 256 values: exact, and without a float copy of the images.
        """
        images = self.images[:MOST_FOR_STATISTICS]
        channels, parts = range(images.shape[1]), images.split(AT_ONCE)
        counted = [torch.stack([part[:, c].flatten().bincount(minlength=256) for c in channels]) for part in parts]
        counts = torch.stack(counted).sum(dim=0).numpy()  # (C, 256)
        values, total = np.arange(256) / 255, counts[0].sum()
        mean = counts @ values / total
        squares = (counts * (values - mean[:, None]) ** 2).sum(axis=1)  # two passes: mean(x**2) - mean**2 would cancel
        return mean.tolist(), np.sqrt(squares / max(total - 1, 1)).tolist()

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> "ImageTensorDataset":
        """Copies the images at `indices`, in that order, into a new dataset; class names and `rows` go with them."""
        index = torch.as_tensor(indices)
        return ImageTensorDataset(self.images[index], self.labels[index], self.class_names, self.rows[index])

    def take(self, n: int, seed: int = 0) -> "ImageTensorDataset":
        """Copies a seeded random choice of `n` images with the class shares of the whole, in their original order."""
        return self.subset(stratified(self.labels.numpy(), n, seed, "n"))


def collate(batch: Mapping[str, Tensor] | Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
    """Collates a batch for a `DataLoader` or `Trainer`.

    Args:
        batch: a batch made by `ImageTensorDataset.__getitems__`, which passes through, or a list of B items with
            `pixel_values` (C, H, W) of any dtype, `labels` (scalar) and, where there are any, `ids` (scalar).

    Returns:
        `pixel_values` (B, C, H, W), `labels` (B,) and, where there are any, `ids` (B,).
    """
    if isinstance(batch, Mapping):
        return batch
    keys = ("pixel_values", "labels", *(["ids"] if "ids" in batch[0] else []))
    return {key: torch.stack([torch.as_tensor(item[key]) for item in batch]) for key in keys}


def to_unit_range(images: Tensor) -> Tensor:
    """Converts uint8 images (0..255, any shape) to float32 in [0, 1]; returns float images unchanged and unchecked.

    Raises:
        ValueError: `images` is neither uint8 nor floating point.
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise ValueError(f"images has dtype {images.dtype}; allowed are torch.uint8 and floating point")
    return images.float().div_(255)


def augment(
    images: Tensor,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Pads each image with zeros (black) and crops it at random, then mirrors it left-right with probability 1/2.

    Args:
        images: shape (B, C, H, W), any dtype and device.
        crop_padding: pixels of padding on each side, >= 0: the largest shift of an image. 0: no crop.
        flip: whether to mirror.
        shard: (rank, processes): draw for the whole batch of all processes and take this one's part, so that several
            processes with equal generators do together what one process does.

    Returns:
        New images with the shape, dtype and device of `images`; `images` itself if there is nothing to do.

    Raises:
        ValueError: `crop_padding` is negative.
    """
    if crop_padding < 0:
        raise ValueError(f"crop_padding={crop_padding}; allowed is >= 0")
    if crop_padding == 0 and not flip:
        return images
    b, c, h, w = images.shape
    rank, processes = shard  # draws below are for all processes: equal generators, and each takes its rows
    own = slice(rank * b, (rank + 1) * b)
    top, left = torch.randint(2 * crop_padding + 1, (2, processes * b, 1), device=images.device)[:, own]  # (B, 1) each
    rows = top + torch.arange(h, device=images.device)  # (B, H)
    columns = torch.arange(w, device=images.device).expand(b, w)  # (B, W)
    if flip:
        columns = torch.where(torch.rand(processes * b, 1, device=images.device)[own] < 0.5, w - 1 - columns, columns)
    # One gather of flat pixel numbers is 4 times faster than indexing by image, channel, row and column.
    flat = rows[:, :, None] * (w + 2 * crop_padding) + (left + columns)[:, None, :]  # (B, H, W)
    padded = F.pad(images, (crop_padding,) * 4).flatten(2)
    return padded.gather(2, flat.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)


@dataclass
class DataSplits:
    """Train, validation and test sets with the same classes and image shape.

    Args:
        train, validation: None where only a test set was asked for and the dataset has no more.
        name: what `load_splits` was asked for.
        skipped: train / validation / test -> row numbers in its source split of the undecodable images left out.
        missing_classes: train / validation / test -> names of the classes without an image there.
        duplicates: validation / test -> number of images that are in train too, to the pixel.
        held_out: which of test and validation were held out of train, so that `seed` chose their images.

    Raises:
        ValueError: the sets differ in class names or image shape.
    """

    train: ImageTensorDataset | None
    validation: ImageTensorDataset | None
    test: ImageTensorDataset
    name: str
    skipped: dict[str, list[int]] = field(default_factory=dict)
    missing_classes: dict[str, list[str]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    held_out: Sequence[str] = ()

    def __post_init__(self) -> None:
        first, *others = self.sets
        names, expected = self.sets[first].class_names, tuple(self.sets[first].images.shape[1:])
        for role in others:
            data = self.sets[role]
            if data.class_names != names:
                raise ValueError(f"{role} has class names {data.class_names}, {first} has {names}")
            if (shape := tuple(data.images.shape[1:])) != expected:
                raise ValueError(f"{role} images are {shape}, {first} {expected}; set image_size or num_channels")

    @property
    def sets(self) -> dict[str, ImageTensorDataset]:
        """The sets that are there, by role: train, validation, test."""
        return {role: data for role in ROLES if (data := getattr(self, role)) is not None}

    def digest(self) -> str:
        """32 hexadecimal digits that stand for class names in their order, images and labels of all sets.

        Equal data give equal digits on every machine, wherever they lie. All pixels are read: 100 MB take about 0.2 s.
        """
        total = blake2b(json.dumps(self.class_names).encode(), digest_size=16)
        for role, data in self.sets.items():
            total.update(json.dumps([role, list(data.images.shape)]).encode())
            for part in data.images.split(AT_ONCE):  # one by one: a subset may not be contiguous
                total.update(part.contiguous().numpy())
            total.update(data.labels.contiguous().numpy().astype("<i8"))  # little-endian, whatever the machine
        return total.hexdigest()

    @property
    def class_names(self) -> list[str]:
        return self.test.class_names

    @property
    def num_labels(self) -> int:
        return len(self.class_names)

    @property
    def num_channels(self) -> int:
        return self.test.images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.test.images.shape[-1]


def load_digits_splits() -> DataSplits:
    """Loads scikit-learn's 1,797 grey 8 x 8 images, always in the same stratified 60 / 15 / 25 % split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # from 0..16
    labels = digits.target.astype(np.int64)
    rest, test = hold_out(np.arange(len(labels)), labels, round(0.25 * len(labels)), seed=0)  # never the caller's seed
    train, validation = hold_out(rest, labels, round(0.15 * len(labels)), seed=0)
    whole = ImageTensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels), [str(d) for d in range(10)])
    return DataSplits(whole.subset(train), whole.subset(validation), whole.subset(test), name="digits")


def load_splits(
    name: str | os.PathLike = "digits",
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    num_channels: int | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_fraction: float = 0.1,
    max_train_samples: int | None = None,
    max_validation_samples: int | None = None,
    max_test_samples: int | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    seed: int = 0,
    needs_train: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> DataSplits:
    """Loads an image-classification dataset and decodes, once, the images that are used.

    `image_folders` has the rule for local folders of images, `decoding` says what becomes of an image. Unless an
    argument names them, the roles of the splits are, by the usual names (`image_folders.SPLIT_NAMES`, in any case):

    1. train: the one of that name, or the only split, unless its name is usual for test or validation.
    2. test: the one of that name; else the validation split, because a lone extra split is the **test** set.
    3. validation: the validation split, if it is still free.
    4. What is missing is held out of train, stratified by class: first test, then validation. So model selection never
       sees the test set. `max_train_samples` applies afterwards and does not change what is held out.

    Args:
        name: "digits" (embedded in fixed splits), a dataset id on the Hub, a folder of images in one folder per class,
            a folder of parquet files, a .parquet file, or a folder written by `save_to_disk`.
        config_name: configuration of a Hub dataset.
        image_column: default: the only `datasets.Image` column, else the only column with a usual name.
        label_column: `ClassLabel`, text or integers (classes: the sorted values in train). Default: the only
            `ClassLabel` column, else the only column with a usual name.
        image_size: side in pixels; the shorter side is resized to it and the centre cropped. Default: no resizing; all
            images must be square and equally large.
        num_channels: 3 (RGB) or 1 (grey). Default: 3 if the first image has colour, else 1.
        train_split, validation_split, test_split: names of splits of the dataset.
        validation_fraction: share of train for each held-out set, in (0, 1).
        max_train_samples, max_validation_samples, max_test_samples: use only a seeded random choice of so many images,
            stratified by class; from 1 to the number of images.
        on_bad_image: after reading a whole split with undecodable images, "raise" an error, or "skip" them with a
            warning and list them in `DataSplits.skipped`.
        seed: seed of all random choices, in [0, 2**32).
        needs_train: whether data without a split for train are refused. False: where there is one for test, that is
            enough, also with one class. Without train, test says which classes there are and nothing is held out.
        revision, token: version and access token of a Hub dataset.

    Raises:
        FileNotFoundError: `name` looks like a local path and does not exist.
        ValueError: an argument, split, column, label or image cannot be used; the message says what can.
    """
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image={on_bad_image!r}; allowed are 'raise' and 'skip'")
    name = os.fspath(name)
    limits = {"train": max_train_samples, "validation": max_validation_samples, "test": max_test_samples}
    for role, limit in limits.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise ValueError(f"max_{role}_samples={limit!r}; allowed are integers >= 1, and None")
    if not isinstance(validation_fraction, (int, float)):
        raise ValueError(f"validation_fraction={validation_fraction!r}; allowed is 0 < validation_fraction < 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:  # as NumPy's RandomState takes
        raise ValueError(f"seed={seed!r}; allowed are integers with 0 <= seed < 2**32")
    asked = {"train": train_split, "validation": validation_split, "test": test_split}
    if name == "digits":
        given = {"config_name": config_name, "image_column": image_column, "label_column": label_column}
        given |= {f"{role}_split": split for role, split in asked.items()}
        return _limited_digits(given | {"image_size": image_size, "num_channels": num_channels}, limits, seed)
    sources = load_source(name, config_name, revision, token)
    roles = assign_roles(list(sources), asked, needs_train)
    parts, class_names = read_labels(sources, roles, label_column, one_class=not needs_train)
    choose_rows(parts, validation_fraction, limits, seed)  # before decoding: only what is used is decoded
    sets, skipped = dict.fromkeys(ROLES), {}
    for role in (role for role in ROLES if role in parts):
        images, rows, bad = decode_part(parts[role], image_column, image_size, num_channels, on_bad_image)
        labels = torch.from_numpy(parts[role].labels[rows])
        sets[role] = ImageTensorDataset(images, labels, class_names, torch.from_numpy(rows))
        if bad:
            skipped[role] = bad
        if images.shape[1] == 3:
            num_channels = 3  # a later split may begin with a grey image
    held_out = [role for role in parts if role not in roles]
    return with_doubts(DataSplits(**sets, name=shown_name(name), skipped=skipped, held_out=held_out), limits)


def shown_name(name: str) -> str:
    """Name of a dataset in reports, plots and cards; of a local folder or file its own name, not its place."""
    path = Path(name).expanduser()
    return text_of(path.resolve().name if path.exists() else name)


def _limited_digits(given: Mapping[str, Any], limits: Mapping[str, int | None], seed: int) -> DataSplits:
    splits = load_digits_splits()
    for argument, value in given.items():
        allowed = {"image_size": splits.image_size, "num_channels": splits.num_channels}.get(argument)
        if value not in (None, allowed):
            shape = " x ".join(map(str, splits.test.images.shape[1:]))
            raise ValueError(
                f"{argument}={value!r} does not fit the embedded digits, which are {shape} (channels x height x "
                f"width); allowed is {allowed}, or another dataset (dataset_name)"
            )
    for role, limit in limits.items():
        if limit is not None:
            data = getattr(splits, role)
            setattr(splits, role, data.subset(stratified(data.labels.numpy(), limit, seed, f"max_{role}_samples")))
    return with_doubts(splits, limits)
