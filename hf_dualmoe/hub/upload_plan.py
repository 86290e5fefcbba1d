"""Plan an upload to the Hub, and check all of it before anything is sent: files, their texts, the card.

Only safetensors, JSON, the model's own code files, plots and the card go; checkpoints and pickles never do. Paths of
the publisher's machine are shortened to their last part, or refused where only the publisher can remove them.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, get_token
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from ..evaluation.outcomes import OUTCOMES_NAME
from .local_paths import LOCAL_PATH, PROCESSOR_NAME, check_no_path, cleaned_texts, is_private, shorten_paths
from .model_card import (
    CARD_NAME,
    CONFIG_NAME,
    RESULTS_NAME,
    check_card,
    is_rendered,
    load_report,
    read_json,
    render_folder,
)

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
SENT = (CONFIG_NAME, PROCESSOR_NAME, RESULTS_NAME, OUTCOMES_NAME, CARD_NAME, "*.png", "*.svg", *WEIGHTS)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class Upload:
    """All that a folder would send.

    Args:
        repo_id: Hub id, user/name.
        files: Name in the repository -> file; the card, which is rendered for the repository, is in `card`.
        texts: Name in the repository -> text that is sent instead of what the file holds.
        card: Text of README.md.
        left_out: Names in the folder that are not sent.
        warnings: What the publisher should know.
    """

    repo_id: str
    files: dict[str, Path]
    texts: dict[str, str]
    card: str
    left_out: Sequence[str]
    warnings: Sequence[str]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that would be sent, by name."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(text.encode()) for name, text in {**self.texts, CARD_NAME: self.card}.items()}
        return dict(sorted(sizes.items()))

    def operations(self) -> list[CommitOperationAdd]:
        """Additions of the commit, without the card."""
        return [
            CommitOperationAdd(name, self.texts[name].encode() if name in self.texts else path)
            for name, path in self.files.items()
        ]


def plan_upload(folder: str | os.PathLike, repo_id: str, *, refuse_pickles: bool = True, **metadata: Any) -> Upload:
    """Check a saved folder and render its card; reads files and sends nothing.

    Args:
        folder: What `save_pretrained` wrote, best with the results.json of an evaluation.
        repo_id: Hub id, user/name.
        refuse_pickles: Whether pickles in the folder are an error; they are never sent in either case.
        metadata: As in `create_model_card`; has no effect on a card that somebody edited.

    Raises:
        ValueError: An invalid id, a folder that is no saved model or holds pickles, a broken file, a missing code
            file, a card that is not valid, or an access token or a path of this machine inside a text file.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    check_saved_folder(folder)
    # at the top alone: folders in it are checkpoints or not ours
    names = sorted(path.name for path in folder.iterdir())
    if refuse_pickles and (pickles := [name for name in names if name.endswith(PICKLES)]):
        raise ValueError(
            f"{folder} holds {', '.join(pickles)}: pickles can run code where they are loaded and are not published. "
            "Move them away, or publish a folder that save_pretrained wrote."
        )
    code = code_files(folder)  # by name, not *.py: a folder may hold scripts of somebody
    wanted = [name for name in names if (folder / name).is_file() and any(fnmatch(name, o) for o in (*SENT, *code))]
    files = {name: folder / name for name in wanted if name != CARD_NAME}
    if missing := [name for name in code if name not in files]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, which the auto_map of a JSON file or one of its code files names."
        )
    check_weights(files)  # opened, since an interrupted copy has the right name
    card = final_card(folder, repo_id, **metadata)
    texts = cleaned_texts(files)
    read = {name: path for name, path in files.items() if path.suffix in (".json", ".py", ".svg")}
    # tokens are ASCII: other bytes may be lost
    texts_read = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in read.items()}
    check_no_token({**texts_read, CARD_NAME: card})
    left_out = [name for name in names if name not in files and name != CARD_NAME]
    return Upload(repo_id, files, texts, card, left_out, upload_warnings(folder, files))


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError unless `repo_id` has the form user/name."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r} is not valid: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} is not valid; expected user/name.")


def check_saved_folder(folder: Path) -> None:
    """Raise a ValueError unless the folder holds a saved model."""
    if not folder.is_dir():
        raise ValueError(f"model={str(folder)!r} is not a folder; expected one that save_pretrained wrote.")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"model={str(folder)!r} has no {CONFIG_NAME}; expected a folder that save_pretrained wrote.")
    config = read_json(folder / CONFIG_NAME)
    if "model_type" not in config:
        raise ValueError(f"{folder / CONFIG_NAME} names no model_type; expected the config of a transformers model.")


def code_files(folder: Path) -> list[str]:
    """Files of the code of model and image processor, and of all code beside it that these import.

    Whether they are there or not: `save_pretrained` writes them, but somebody may have moved a folder in part.
    """
    found: list[str] = []
    modules = [module for name in (CONFIG_NAME, PROCESSOR_NAME) for module in named_modules(folder / name)]
    while modules:
        name = f"{modules.pop()}.py"
        if name not in found:
            found.append(name)
            modules += get_relative_imports(folder / name) if (folder / name).is_file() else []
    return sorted(found)


def named_modules(path: Path) -> list[str]:
    """The modules that the `auto_map` of a JSON file names, as in {"AutoModel": "module.Class"}."""
    auto_map = read_json(path).get("auto_map", {}) if path.is_file() else {}
    # repo--module.Class, or without repo
    return [str(target).split("--")[-1].split(".")[0] for target in auto_map.values()]


def check_weights(files: dict[str, Path]) -> None:
    """Raise a ValueError unless there are weights, all that an index names, and each is safetensors."""
    weights = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    index = files.get("model.safetensors.index.json")
    needed = set(read_json(index).get("weight_map", {}).values()) if index else {"model.safetensors"}
    if index and "model.safetensors" in weights:
        raise ValueError(
            "The folder holds model.safetensors and model.safetensors.index.json: one is left from an earlier save, "
            "and it is not clear which weights would be loaded; remove one."
        )
    if missing := sorted(needed - set(weights)):
        raise ValueError(f"The folder lacks {', '.join(missing)}; expected weights saved as safetensors.")
    for name, path in weights.items():
        try:
            with safe_open(path, framework="pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise ValueError(f"{name} is not a safetensors file: {error}") from error


def final_card(folder: Path, repo_id: str, **metadata: Any) -> str:
    """The text of the card to send: rendered for the repository, or the folder's own where somebody edited it."""
    path = folder / CARD_NAME
    if path.is_file() and not is_rendered(text := path.read_text(encoding="utf-8")):
        load_report(folder)  # a broken results.json is refused here too
        check_card(text)
        check_no_path(CARD_NAME, [path for path in LOCAL_PATH.findall(text) if is_private(path, folder)])
        return text
    return shorten_paths(str(render_folder(folder, repo_id=repo_id, **metadata)))


def check_no_token(texts: dict[str, str]) -> None:
    """Raise a ValueError where a text holds an access token; the message does not repeat it."""
    token = get_token()
    for name, text in texts.items():
        if TOKEN.search(text) or (token and len(token) > 8 and token in text):
            raise ValueError(f"{name} holds what looks like an access token; remove it, and revoke the token.")


def hide_tokens(text: str, given: str | None = None) -> str:
    """The text with access tokens, the given one and the stored one among them, replaced by stars."""
    for secret in {given, (given or "").strip(), get_token()} - {None, ""}:  # pasted tokens come with line ends
        text = text.replace(secret, "***")
    return TOKEN.sub("***", text)


def upload_warnings(folder: Path, files: Iterable[str]) -> list[str]:
    """Warnings for the publisher, before anything is sent."""
    found, report = [], load_report(folder)
    if report is None:
        found.append(f"no {RESULTS_NAME}: the card will say that robustness was not measured (training/evaluate.py).")
    else:
        found += [f"the evaluation is suspicious, and the card says so: {reason}" for reason in report.suspicious]
        found += [f"the evaluation failed in part, and the card says so: {name}" for name in report.failures]
    if PROCESSOR_NAME not in files:
        found.append(f"no {PROCESSOR_NAME}: pipeline and AutoImageProcessor will not work.")
    return found


__all__ = ["Upload", "check_repo_id", "hide_tokens", "plan_upload"]
