"""The steps behind `load_splits`, whose docstring has the rules: find splits, labels, rows; decode the pixels."""

import glob
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .decoding import decode_images
from .image_folders import SPLIT_NAMES, FolderError, read_image_folder, role_of, scan, shorten

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("hf_dualmoe.data.datasets")  # users find all warnings about data under one name

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
TABLES = (".parquet", ".arrow")
OTHER_SOURCES = (".tar", ".zip", ".json", ".jsonl", ".csv")  # `datasets` may know what to do with a folder of these

# --- sources ---------------------------------------------------------------------------------------------------------


def load_source(
    name: str, config_name: str | None, revision: str | None, token: str | bool | None
) -> "Mapping[str, datasets.Dataset]":
    """Loads the dataset as split -> rows, without decoding any image."""
    import datasets

    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".parquet"  # never a Hub id
    if local and not path.exists():
        raise FileNotFoundError(f"name={name!r} looks like a local path, but {path.absolute()} does not exist")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"name={name!r} is a file; allowed are folders and .parquet files")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": glob.escape(str(path))})  # it takes patterns
        if path.is_dir():
            return _load_folder(path, config_name)
        return datasets.load_dataset(name, config_name, revision=revision, token=token)
    except (IndexError, ValueError) as error:  # what datasets 5 raises for a split without rows
        if isinstance(error, FolderError):
            raise
        raise ValueError(f"cannot load {name!r}; has it an empty split? {type(error).__name__}: {error}") from error


def _load_folder(path: Path, config_name: str | None) -> "Mapping[str, datasets.Dataset]":
    """Images are read by `image_folders`, what `save_to_disk` wrote and folders of tables by `datasets`."""
    import datasets

    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)
    if (path / "state.json").is_file():
        return {"train": datasets.load_from_disk(path)}
    found = scan(path)
    endings = {Path(file).suffix.lower() for files in found.left_out.values() for file in files}
    tables = endings.intersection(TABLES)
    holders = [folder for folder in found.root.walk() if folder.images]
    if tables and len(holders) > 1:
        raise FolderError(
            f"dataset folder {str(path)!r} holds images ({shorten([str(f.path) for f in holders])}) and also "
            f"{' and '.join(tables)} files; give the path of a folder with one of them"
        )
    if holders and not tables:
        if config_name is not None:
            raise FolderError(f"config_name={config_name!r} does not fit a folder of images; allowed is None")
        return read_image_folder(found)
    if not tables and endings.isdisjoint(OTHER_SOURCES):
        left = f"; left out: {found.summary()}" if found.left_out else ""
        raise FileNotFoundError(f"dataset folder {str(path)!r} holds no image that Pillow reads here{left}")
    whole = str(path.resolve())  # "." has no name
    if glob.has_magic(whole):
        raise FolderError(f"dataset folder {whole!r}: `datasets` would take its name for a pattern; rename it")
    return datasets.load_dataset(whole, config_name)


def assign_roles(splits: list[str], asked: Mapping[str, str | None], needs_train: bool) -> dict[str, str]:
    """Maps train, test, validation to splits by rules 1 to 3 of `load_splits`; roles to be held out are absent.

    Train, if it has a split, comes first. Without need of it, a dataset with a split for test needs none for train.
    """
    for role, split in asked.items():
        if split is not None and split not in splits:
            raise ValueError(f"{role}_split={split!r} is not a split of the dataset; available: {splits}")
    roles = {role: split for role, split in asked.items() if split is not None}
    names = {role: _usual(splits, role) for role in SPLIT_NAMES}
    lone = splits if len(splits) == 1 and role_of(splits[0]) in (None, "train") else []
    usual = {"train": lone or names["train"], "test": names["test"] + names["validation"]}
    for role, found in (usual | {"validation": names["validation"]}).items():
        free = [split for split in found if split not in roles.values()]
        if role not in roles and free:
            roles[role] = free[0]
    enough = "train" in roles or (not needs_train and "test" in roles)
    if not enough and len(splits) == 1 and not any(asked.values()):
        raise ValueError(
            f"the only split of the dataset is {splits[0]!r}, by its name no training data; train_split={splits[0]!r} "
            f"(--train_split {splits[0]}) uses it all the same"
        )
    if not enough or len(set(roles.values())) < len(roles):
        raise ValueError(f"train_split, validation_split, test_split: need train and no split twice among {splits}")
    unused = [split for split in splits if split not in roles.values()]
    if unused and not any(asked.values()):
        logger.warning("splits that are not used: %s; train_split, validation_split, test_split name others", unused)
    return {role: roles[role] for role in ("train", "test", "validation") if role in roles}


def _usual(splits: list[str], role: str) -> list[str]:
    """The splits with a usual name of that role, the likeliest first."""
    order = SPLIT_NAMES[role]
    return sorted((s for s in splits if s.casefold() in order), key=lambda split: order.index(split.casefold()))


@dataclass
class Part:
    """The `rows` of one source split that play one role; `labels` are those of the whole source split."""

    source: "datasets.Dataset"
    split: str
    labels: np.ndarray
    rows: np.ndarray


def read_labels(
    sources: "Mapping[str, datasets.Dataset]", roles: Mapping[str, str], label_column: str | None, one_class: bool
) -> tuple[dict[str, Part], list[str]]:
    """Returns role -> part with all rows of its split, and the class names, which the first of `roles` defines.

    A train split of one class is refused unless `one_class`.
    """
    from datasets import ClassLabel

    parts, classes = {}, None
    for role, split in roles.items():
        source = sources[split]
        if len(source) == 0:
            raise ValueError(f"empty dataset: split {split!r} has no rows")
        column = _find_column(source.features, label_column, "label", ClassLabel, LABEL_COLUMNS)
        values = source.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()  # images stay unread
        if isinstance(source.features[column], ClassLabel):
            names = dict(enumerate(source.features[column].names))
            values = [names.get(value, value) for value in values]
            classes = classes or list(names.values())
        usable = [isinstance(value, (str, int)) for value in values]  # no classes for nulls, floats and lists
        classes = classes or sorted({value for value, ok in zip(values, usable, strict=True) if ok})
        number = {value: i for i, value in enumerate(classes)}
        labels = np.array([number.get(value, -1) if ok else -1 for value, ok in zip(values, usable, strict=True)])
        if labels.min() < 0:
            row = int(labels.argmin())
            told = f"column {column!r} of split {split!r} has the label {values[row]!r} in row {row}"
            if not usable[row]:
                raise ValueError(f"{told}: labels must be text, integers or a ClassLabel")
            raise ValueError(f"{told}; allowed are the {len(classes)} classes of {next(iter(roles))}: {classes[:20]}")
        if role == "train" and not one_class and labels.min() == labels.max():
            raise ValueError(
                f"all {len(labels)} images of split {split!r}, from which classes are learned, have one label: "
                f"{values[0]!r} (column {column!r}); at least 2 classes are needed. -1 often stands for hidden labels."
            )
        parts[role] = Part(source, split, labels, np.arange(len(labels)))
    return parts, [str(value) for value in classes]


def _find_column(features: "datasets.Features", asked: str | None, kind: str, kind_type: type, usual: tuple) -> str:
    """Returns the column to use: the one asked for, the only one of type `kind_type`, or the only usual name."""
    if asked is not None:
        found = [asked] if asked in features else []
    else:
        found = [name for name, feature in features.items() if isinstance(feature, kind_type)]
        found = found or [name for name in usual if name in features]
    if len(found) != 1:
        reason = f"{kind}_column={asked!r} does not exist" if asked else f"{len(found)} columns may hold the {kind}"
        raise ValueError(f"{reason}; set {kind}_column to one of the available columns: {list(features)}")
    return found[0]


def choose_rows(parts: dict[str, Part], fraction: float, limits: Mapping[str, int | None], seed: int) -> None:
    """Moves rows of train to the roles missing in `parts` (rule 4 of `load_splits`), then applies `limits`.

    Without train, missing roles stay missing.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction={fraction}; allowed is 0 < validation_fraction < 1")
    train = parts.get("train")
    n = max(1, round(fraction * len(train.rows))) if train else 0  # of the whole train, for both sets held out
    for role in ("test", "validation"):
        if role not in parts and train:
            train.rows, held = hold_out(train.rows, train.labels, n, seed)
            parts[role] = Part(train.source, train.split, train.labels, held)
    for role, limit in limits.items():
        if limit is not None and role in parts:
            rows = parts[role].rows
            parts[role].rows = rows[stratified(parts[role].labels[rows], limit, seed, f"max_{role}_samples")]


def decode_part(
    part: Part, image_column: str | None, image_size: int | None, num_channels: int | None, on_bad_image: str
) -> tuple[Tensor, np.ndarray, list[int]]:
    """Returns the decodable images of the part, their rows (int64), and the rows of the undecodable ones."""
    import datasets

    column = _find_column(part.source.features, image_column, "image", datasets.Image, IMAGE_COLUMNS)
    # bytes and paths as they are: `decoding` has one rule for all images, and survives bad ones
    source = part.source.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    tables = source.select(part.rows).with_format("arrow").iter(batch_size=256)
    encoded = (image for table in tables for image in table.column(0).to_pylist())
    try:
        images, failures = decode_images(
            encoded,
            len(part.rows),
            image_size=image_size,
            num_channels=num_channels,
            rows=part.rows,
            progress=not datasets.are_progress_bars_disabled(),
        )
    except ValueError as error:
        raise ValueError(f"split {part.split!r}: {error}") from error
    bad = part.rows[list(failures)].tolist()
    if bad:
        message = f"split {part.split!r}: {len(bad)} of {len(part.rows)} images cannot be decoded, in rows {bad[:10]}"
        message += f"{' and more' if len(bad) > 10 else ''} ({next(iter(failures.values()))})"
        if on_bad_image == "raise":
            raise ValueError(f"{message}; on_bad_image='skip' leaves them out")
        logger.warning("%s; skipped", message)
    return images, np.setdiff1d(part.rows, bad), bad


# --- choices of rows -------------------------------------------------------------------------------------------------


def stratified(labels: np.ndarray, n: int, seed: int, argument: str) -> np.ndarray:
    """Chooses `n` of the rows of `labels` (N,), in which each class keeps its share to within one row; ascending."""
    if not 1 <= n <= len(labels):
        raise ValueError(f"{argument}={n}, but only 1 to {len(labels)} images can be chosen")
    rng = np.random.RandomState(seed)  # its stream is frozen: every version of NumPy makes the same choice
    shuffled = rng.permutation(len(labels))
    _, classes, counts = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    quota, remainder = np.divmod(counts * n, len(labels))
    favoured = np.lexsort((rng.permutation(len(counts)), -remainder))  # largest remainder first, ties at random
    quota[favoured[: n - quota.sum()]] += 1
    by_class = np.argsort(classes, kind="stable")
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each row within its class
    return np.sort(shuffled[by_class[rank < np.repeat(quota, counts)]])


def hold_out(rows: np.ndarray, labels: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits `rows`, numbers of entries of `labels`, into those that stay and `n` stratified ones."""
    if n >= len(rows):
        raise ValueError(f"cannot hold {n} images out of {len(rows)} in train; name a split or provide more images")
    held = stratified(labels[rows], n, seed, "n")
    return np.delete(rows, held), rows[held]
