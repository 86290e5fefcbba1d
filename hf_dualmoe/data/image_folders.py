"""Local folders of images -> labelled files, by one rule; nothing is decoded.

1. **Split folders.** Where a folder at the top has the name of a split (`SPLIT_NAMES`, in any case) and class folders
   inside, each folder at the top is a split: `train/cat/1.png`, `Testing/cat/2.png`.
2. **Else class folders.** Each folder at the top is a class: `cat/1.png`. So a class may be called "train".
3. Images lie in their class folder itself, not below it. Links are followed, to files and to folders.
4. **Left out, counted and named in a warning:** hidden files and folders, files without the ending of an image that
   Pillow reads here, images outside class folders, folders without an image, links in a circle.
5. **Refused, with what was found and what was expected:** images deeper than classes, splits without class folders or
   twice, a lone class.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .decoding import readable_endings

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("hf_dualmoe.data.datasets")  # users find all warnings about data under one name

SPLIT_NAMES = {  # role -> usual names, the likeliest first
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HIDDEN = ("__MACOSX", "@eaDir")  # and all names that begin with a dot
EXPECTED = "expected CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE, with at least 2 classes"
SHOWN = 3  # names in a message, of each kind


class FolderError(ValueError):
    """A local folder that does not follow the rule; the message says what was found and what is expected."""


@dataclass(eq=False)
class Folder:
    """A folder: the images in it and the folders in it, each by name."""

    path: Path
    images: list[Path] = field(default_factory=list)
    folders: "list[Folder]" = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its own name, the last part of the path, as text."""
        return text_of(self.path.name)

    @property
    def has_classes(self) -> bool:
        """Whether folders in it hold images."""
        return any(folder.images for folder in self.folders)

    def walk(self) -> "Iterator[Folder]":
        """This folder and all below it."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def all_images(self) -> Iterator[Path]:
        """The images in it and below it."""
        for folder in self.walk():
            yield from folder.images


@dataclass(eq=False)
class Scan:
    """What was found in and below a folder: reason -> paths from there, of what is left out."""

    root: Folder
    left_out: dict[str, list[str]]

    def leave_out(self, reason: str, path: Path) -> None:
        """Note that this file or folder is not used."""
        self.left_out[reason].append(text_of(str(path.relative_to(self.root.path))))

    def summary(self) -> str:
        """What is left out, such as "hidden: 2 (.DS_Store, cat/._1.png); .csv files: 1 (labels.csv)"; may be empty."""
        return "; ".join(f"{reason}: {len(paths)} ({shorten(paths)})" for reason, paths in self.left_out.items())


def text_of(name: str) -> str:
    """The text of a file name or path that the system gave: its bytes are UTF-8, also where the locale says otherwise.

    Bytes that are no UTF-8 come as surrogates.
    """
    try:
        return os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not from the system: text already
        return name


def shorten(names: list[str]) -> str:
    """The first `SHOWN` names, joined; what is no UTF-8 is escaped."""
    text = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return text.encode("utf-8", "backslashreplace").decode()


# --- looking ---------------------------------------------------------------------------------------------------------


def scan(path: Path) -> Scan:
    """Finds the images in and below a folder; the order is that of names, whatever the file system's.

    Raises:
        FolderError: It or a folder below may not be read.
    """
    real = path.resolve()
    found = Scan(Folder(path), defaultdict(list))  # paths as given; only the search for circles resolves links
    try:
        # a link to these is a circle
        _scan_into(found.root, found, readable_endings(), frozenset({real, *real.parents}))
    except PermissionError as error:
        raise FolderError(f"folder {error.filename!r} may not be read: {error.strerror}") from error
    return found


def _scan_into(folder: Folder, found: Scan, endings: set[str], above: frozenset[Path]) -> None:
    for entry in sorted(os.scandir(folder.path), key=lambda entry: entry.name):  # labels follow from the order
        path = folder.path / entry.name
        if reason := _reason_to_leave_out(entry, endings):
            found.leave_out(reason, path)
        elif not entry.is_dir():
            folder.images.append(path)
        elif (real := path.resolve()) in above:
            found.leave_out("links in a circle", path)
        else:
            folder.folders.append(Folder(path))
            _scan_into(folder.folders[-1], found, endings, above | {real})


def _reason_to_leave_out(entry: os.DirEntry, endings: set[str]) -> str | None:
    """Why a file or folder is no image and no class; None if it may be one."""
    name = entry.name
    if name.startswith(".") or name in HIDDEN:
        return "hidden"
    text = text_of(name)
    if text.encode("utf-8", "surrogateescape") != text.encode("utf-8", "replace"):  # Arrow holds UTF-8 alone
        return "names that are no UTF-8"
    if entry.is_dir():
        return None
    ending = os.path.splitext(name)[1].lower()
    if ending not in endings:
        return f"{ending} files, not read as images" if ending else "files without an ending"
    return None if entry.is_file() else "no regular files"


# --- splits and classes ----------------------------------------------------------------------------------------------


def role_of(name: str) -> str | None:
    """The role that the name of a split means, in any case: train, validation, test, or None."""
    return next((role for role, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def read_image_folder(found: Scan) -> "dict[str, datasets.Dataset]":
    """Split -> rows with `image` (a path) and `label`, by the rule above; one split "train" without split folders.

    Raises:
        FolderError: The folders do not follow the rule; the message says what was found and what is expected.
    """
    splits = _split_folders(found) or {"train": found.root}
    classes = {name: _class_folders(folder, found) for name, folder in splits.items()}
    if found.root in splits.values():
        _check_classes(classes["train"], found)
    else:
        for path in found.root.images:
            found.leave_out("images outside class folders", path)
    if found.left_out:
        logger.warning("left out of %s: %s", found.root.path, found.summary())
    return {name: _to_dataset(folders) for name, folders in classes.items()}


def _split_folders(found: Scan) -> dict[str, Folder]:
    """Name -> folder of the splits at the top; empty where the top has classes."""
    tops = [folder for folder in found.root.folders if any(folder.all_images())]
    if not any(role_of(folder.name) and folder.has_classes for folder in tops):
        return {}
    names = [folder.name for folder in tops]
    for folder in tops:
        if not folder.has_classes:
            raise _refusal(
                found,
                f"split folders ({', '.join(names)}), but {_describe(folder)} without class folders has no labels; "
                f"move it away, or give the path of one split",
            )
        twins = [name for name in names if role_of(name) and role_of(name) == role_of(folder.name)]
        if len(twins) > 1:
            raise _refusal(found, f"split folders, but {' and '.join(twins)} are both the {role_of(twins[0])} split")
    for folder in found.root.folders:
        if folder not in tops:
            found.leave_out("folders without an image", folder.path)
    return {folder.name: folder for folder in tops}


def _class_folders(folder: Folder, found: Scan) -> list[Folder]:
    """The folders of a split that hold images; what else is in it is noted as left out."""
    below = [deep for top in folder.folders for deep in top.walk() if deep is not top and deep.images]
    if below:
        place = below[0].path.relative_to(found.root.path)
        parent = below[0].path.parent
        parent = parent.parent if role_of(text_of(parent.name)) else parent  # the folder above a split has the dataset
        raise _refusal(
            found,
            f"one folder per class ({_describe_all(folder.folders)}), but {place}/ with {_count(below[0])} lies one "
            f"folder too deep; are the classes in {str(parent)!r}?",
        )
    for path in folder.images:
        found.leave_out("images outside class folders", path)
    for top in folder.folders:
        if not top.images:
            found.leave_out("folders without an image", top.path)
    return [top for top in folder.folders if top.images]


def _check_classes(classes: list[Folder], found: Scan) -> None:
    """Refuses one class, and split folders that hold images in place of classes."""
    roles = {role for folder in classes if (role := role_of(folder.name))}
    if len(roles) > 1 or len(roles) == len(classes) > 0:
        raise _refusal(found, f"split folders ({_describe_all(classes)}), but there are no class folders in them")
    if len(classes) < 2:
        read = _describe_all(classes) or f"none; {len(found.root.images)} images lie beside them"
        raise _refusal(found, f"one folder per class ({read}), but that is {len(classes)} class{'es' * (not classes)}")


def _refusal(found: Scan, what: str) -> FolderError:
    left = f" Left out: {found.summary()}." if found.left_out else ""
    return FolderError(f"dataset folder {str(found.root.path)!r} was read as {what}; {EXPECTED}.{left}")


def _count(folder: Folder) -> str:
    number = len(folder.images)
    return f"{number} image{'s' * (number != 1)}"


def _describe(folder: Folder) -> str:
    return f"{folder.name}/ with {_count(folder)}"


def _describe_all(folders: list[Folder]) -> str:
    return shorten([_describe(folder) for folder in folders])


def _to_dataset(classes: list[Folder]) -> "datasets.Dataset":
    """Rows in the order of class and file name."""
    import datasets

    rows = [(text_of(str(path)), label) for label, folder in enumerate(classes) for path in folder.images]
    label = datasets.ClassLabel(names=[folder.name for folder in classes])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    columns = {"image": [path for path, _ in rows], "label": [label for _, label in rows]}
    return datasets.Dataset.from_dict(columns, features)


__all__ = [
    "SPLIT_NAMES",
    "Folder",
    "FolderError",
    "Scan",
    "read_image_folder",
    "role_of",
    "scan",
    "shorten",
    "text_of",
]
