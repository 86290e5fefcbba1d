"""Checkpoints that are whole or absent: written under another name, listed in a manifest, checked before use.

A checkpoint is written into `unfinished/` of the output folder and moved to its own name as the last act, so a run
that is killed or meets a full disk leaves no half of one. The manifest has size and CRC-32 of each file: it finds
files that were cut short or changed later.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from ..evaluation.environment import write_text

MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = "progress.json"  # skipped updates, seconds
UNFINISHED = "unfinished"
STATE_NAME = "trainer_state.json"
CHUNK = 1 << 22  # bytes read at a time
# a full disk, or a limit on the size of files or of all that somebody owns
FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))
# torch.save says RuntimeError of a failed write, and so do many errors that have nothing to do with files
TORCH_WRITE = re.compile("inline_container|PytorchStreamWriter|iostream error|unexpected pos")

logger = logging.get_logger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or must not be used; the message says which, why, and what is left."""


def list_checkpoints(output_dir: "str | Path") -> dict[int, Path]:
    """The checkpoint folders of a run by step, oldest first, whole or not."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


# --- reading ---------------------------------------------------------------------------------------------------------


def check_checkpoint(folder: "str | Path") -> None:
    """Compare all files of a checkpoint with its manifest.

    Raises:
        CheckpointError: The manifest or a file is missing, or a file has another size or other bytes.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: it was never finished.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder / MANIFEST_NAME} cannot be read: {error!r}") from error
    for name, (size, crc) in expected.items():
        path = folder / name
        try:
            actual = path.stat().st_size
            if actual != size:
                raise CheckpointError(f"{path} has {actual} bytes instead of {size}.")
            if _crc32(path) != crc:
                raise CheckpointError(f"{path} is damaged: its CRC-32 is not the one in {MANIFEST_NAME}.")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def last_good_checkpoint(output_dir: "str | Path") -> Path | None:
    """The newest checkpoint that is whole, as is the best one that it refers to; None where none was ever finished.

    Raises:
        CheckpointError: There are checkpoints, and none of them can be used.
    """
    checkpoints, problems = list_checkpoints(output_dir), []
    for folder in reversed(checkpoints.values()):
        try:
            check_checkpoint(folder)
            best = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))["best_model_checkpoint"]
            if best:  # by its name: the output folder may have moved
                check_checkpoint(folder.parent / Path(best).name)
        except (CheckpointError, OSError, ValueError, KeyError) as error:
            problems.append(str(error))
            logger.warning(f"{folder} is not used: {error}")
            continue
        return folder
    if problems:
        raise CheckpointError(f"No checkpoint in {output_dir} can be used: {' '.join(problems)}")
    return None


def read_progress(folder: "str | Path") -> dict[str, Any]:
    """Read what `RobustTrainer` keeps beside transformers' own state; empty in another trainer's checkpoint."""
    path = Path(folder) / PROGRESS_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# --- writing ---------------------------------------------------------------------------------------------------------


def clear_unfinished(run_dir: "str | Path") -> None:
    """Remove the checkpoints that an interrupted run left there; anything else is somebody's, and stays."""
    for path in unfinished_checkpoints(run_dir):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # not there, or not empty
        (Path(run_dir) / UNFINISHED).rmdir()


def unfinished_checkpoints(run_dir: "str | Path") -> list[Path]:
    """The folders in `unfinished/` of a run that are named as its checkpoints are."""
    paths = sorted((Path(run_dir) / UNFINISHED).glob("*checkpoint-*"))
    return [path for path in paths if re.fullmatch(r"(old-)?checkpoint-\d+", path.name) and path.is_dir()]


def finish_checkpoint(run_dir: "str | Path", step: int) -> Path:
    """List the files of the unfinished checkpoint in its manifest, put all on disk, give it its name."""
    run_dir, name = Path(run_dir), f"checkpoint-{step}"
    folder, target = run_dir / UNFINISHED / name, run_dir / name
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    files = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in paths}
    write_text(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=2) + "\n")
    for path in (*paths, folder / MANIFEST_NAME, folder):
        _flush(path)
    if target.exists():  # a damaged one, or one of an earlier training in this folder
        remove_checkpoint(target)
    folder.rename(target)  # the last act: the name appears when all is there
    _flush(run_dir)  # else a crash could undo the rename
    clear_unfinished(run_dir)
    return target


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; its name goes first, so that no half of it is ever seen."""
    trash = folder.parent / UNFINISHED / f"old-{folder.name}"
    trash.parent.mkdir(exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def explain_failed_write(what: str, run_dir: "str | Path") -> Iterator[None]:
    """Turn the many errors of a failed write into one that says what is lost and what is left; others pass through.

    Raises:
        CheckpointError: Something in the block could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, (OSError, SafetensorError)) and not TORCH_WRITE.search(str(error)):
            raise  # such as one of the model, or of the other processes
        clear_unfinished(run_dir)
        left = list_checkpoints(run_dir)
        last = f"the last checkpoint is {list(left.values())[-1]}" if left else "there is no earlier checkpoint"
        room, advice = "", "Mend that"
        if _is_full(error):
            disk = next(
                path for path in (Path(run_dir).absolute(), *Path(run_dir).absolute().parents) if path.exists()
            )
            room, advice = f" ({shutil.disk_usage(disk).free / 1e6:.1f} MB free)", "Make room"
        raise CheckpointError(
            f"{what} could not be written to {run_dir}{room}: {error}. Earlier checkpoints are intact; {last}. "
            f"{advice} and start the same command again."
        ) from error


def _is_full(error: Exception) -> bool:
    """Whether a failed write may be one for want of room."""
    if isinstance(error, OSError):
        return error.errno in FULL
    # safetensors gives the number of the system's error as text; torch gives none
    numbers = re.findall(r"(?:os error|code:) (\d+)", str(error))
    return bool(TORCH_WRITE.search(str(error))) or any(int(number) in FULL for number in numbers)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk, where the system can say so."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # folders cannot be opened everywhere
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "CheckpointError",
    "check_checkpoint",
    "last_good_checkpoint",
    "list_checkpoints",
    "unfinished_checkpoints",
]
