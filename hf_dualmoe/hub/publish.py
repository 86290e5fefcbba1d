"""Publishing a saved model to the Hub: everything is checked first, then sent in one commit.

Only safetensors, JSON, the model's own code files, plots and the card are sent; checkpoints and pickles never are.
Paths of the publisher's machine are shortened to their last part, or refused where only the publisher can remove them.
"""

import filecmp
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    snapshot_download,
)
from huggingface_hub.utils import RepositoryNotFoundError, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

from ..evaluation.outcomes import OUTCOMES_NAME
from ..evaluation.report import RobustnessReport
from .card_text import PLOTS
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
REPLACED = (RESULTS_NAME, OUTCOMES_NAME, *PLOTS, *WEIGHTS)  # removed from the repository where no longer in the folder
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class Upload:
    """What a folder would send.

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
        """What the commit adds, without the card."""
        return [
            CommitOperationAdd(name, self.texts[name].encode() if name in self.texts else path)
            for name, path in self.files.items()
        ]


@dataclass(frozen=True)
class Published:
    """The outcome of `publish_folder`.

    Args:
        commit: The commit that the repository is at now.
        changed: Whether it is a new one; False = everything was there already.
        notes: What was done otherwise than asked.
    """

    commit: CommitInfo
    changed: bool
    notes: Sequence[str] = ()


# --- before anything is sent -----------------------------------------------------------------------------------------


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
    names = sorted(path.name for path in folder.iterdir())
    if refuse_pickles and (pickles := [name for name in names if name.endswith(PICKLES)]):
        raise ValueError(
            f"{folder} holds {', '.join(pickles)}: pickles can run code where they are loaded and are not published. "
            "Move them away, or publish a folder that save_pretrained wrote."
        )
    code = code_files(folder)
    wanted = [name for name in names if (folder / name).is_file() and any(fnmatch(name, o) for o in (*SENT, *code))]
    files = {name: folder / name for name in wanted if name != CARD_NAME}
    if missing := [name for name in code if name not in files]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, which the auto_map of a JSON file or one of its code files names."
        )
    check_weights(files)
    card = final_card(folder, repo_id, **metadata)
    texts = cleaned_texts(files)
    read = {name: path for name, path in files.items() if path.suffix in (".json", ".py", ".svg")}
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
    for secret in {given, (given or "").strip(), get_token()} - {None, ""}:
        text = text.replace(secret, "***")
    return TOKEN.sub("***", text)


def upload_warnings(folder: Path, files: Iterable[str]) -> list[str]:
    """What the publisher should know before sending."""
    found, report = [], load_report(folder)
    if report is None:
        found.append(f"no {RESULTS_NAME}: the card will say that robustness was not measured (training/evaluate.py).")
    else:
        found += [f"the evaluation is suspicious, and the card says so: {reason}" for reason in report.suspicious]
        found += [f"the evaluation failed in part, and the card says so: {name}" for name in report.failures]
    if PROCESSOR_NAME not in files:
        found.append(f"no {PROCESSOR_NAME}: pipeline and AutoImageProcessor will not work.")
    return found


# --- sending ---------------------------------------------------------------------------------------------------------


def publish_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    refuse_pickles: bool = True,
    **metadata: Any,
) -> Published:
    """Send a saved folder to the Hub in one commit; where all of it is there already, nothing is sent.

    The repository and the branch are created where they do not exist. Weights, plots and results of an earlier version
    that the folder no longer has are removed in the same commit; files that are not ours stay, and so does a card that
    somebody edited on the Hub. The folder itself is not changed.

    Args:
        folder, repo_id, refuse_pickles, metadata: As in `plan_upload`.
        private: Create the repository private; None = the account's default.
        revision: Branch to commit to; None = main.
        commit_message: First line of the commit.
        commit_description: Its further lines.
        create_pr: Open a pull request instead of committing to the branch.
        token: Access token; None = the environment's (HF_TOKEN) or that of `hf auth login`.

    Raises:
        ValueError: As in `plan_upload`; or no token, a card that the Hub refuses, or `private` for a public repo.
        HfHubHTTPError: The Hub refused or failed.
    """
    upload = plan_upload(folder, repo_id, refuse_pickles=refuse_pickles, **metadata)
    if not (token if isinstance(token, str) else get_token()):
        raise ValueError("No access token: log in with `hf auth login`, or set HF_TOKEN.")
    validate_on_hub(check_card(upload.card))
    api = HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.repo_info(repo_id, revision=revision).sha
    there = set(api.list_repo_files(repo_id, revision=head))
    operations = upload.operations()
    notes = []
    if CARD_NAME in there and is_rendered(upload.card) and not is_rendered(read_remote_card(api, repo_id, head)):
        notes.append(f"the {CARD_NAME} on the Hub was edited by somebody and is kept; delete it there to replace it.")
    else:
        operations.append(CommitOperationAdd(CARD_NAME, upload.card.encode()))
    sent = {operation.path_in_repo for operation in operations} | {CARD_NAME}
    stale = [name for name in sorted(there - sent) if any(fnmatch(name, pattern) for pattern in REPLACED)]
    operations += [CommitOperationDelete(name) for name in stale]
    message = commit_message or "Upload model"
    options = {"commit_message": message, "commit_description": commit_description, "create_pr": create_pr}
    commit = api.create_commit(repo_id, operations, revision=revision, parent_commit=head, **options)
    return Published(commit, commit.oid != head, notes)


def open_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create the repository where it does not exist; ValueError where it is public and `private` was asked for."""
    try:
        known = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        known = api.repo_info(repo_id)
    if private and not known.private:
        raise ValueError(f"private was asked for, but {repo_id} exists and is public; nothing was sent.")
    return repo_id


def validate_on_hub(card: ModelCard) -> None:
    """Let the Hub check the metadata; ValueError with its message where it refuses them."""
    try:
        card.validate()
    except ValueError as error:
        raise ValueError(f"The Hub refuses the card: {error}") from error
    except Exception as error:  # no connection, or a Hub without this service: the commit itself will tell
        warnings.warn(f"The Hub could not check the card: {type(error).__name__}", stacklevel=2)


def read_remote_card(api: HfApi, repo_id: str, commit: str) -> str:
    """The text of the card at a commit."""
    return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=commit)).read_text(encoding="utf-8")


# --- models in memory ------------------------------------------------------------------------------------------------


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    report: RobustnessReport | None = None,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> CommitInfo:
    """Send a model in memory to the Hub: weights, config, code files, image processor and card, in one commit.

    Args:
        model: Model of transformers.
        repo_id: Hub id, user/name; or a name alone, for the user of the token.
        report: What was measured on it; None = the results beside the weights that the model was loaded from, where
            these are still its weights. Else the card says that robustness was not measured.
        max_shard_size: As in `save_pretrained`.
        options: As in `publish_folder`.

    Raises:
        ValueError, HfHubHTTPError: As in `publish_folder`.
    """
    if "/" not in repo_id:
        repo_id = f"{HfApi(token=options.get('token')).whoami()['name']}/{repo_id}"
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if report is not None:
            report.save(folder / RESULTS_NAME)
        elif (origin := origin_of(model)) and same_model(origin, folder):
            beside = [origin / name for name in (RESULTS_NAME, OUTCOMES_NAME, CARD_NAME)]
            for path in (*origin.glob("*.png"), *beside):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
        return publish_folder(folder, repo_id, **options).commit


def origin_of(model: PreTrainedModel) -> Path | None:
    """The folder that a model was loaded from, of the cache for one from the Hub; None where there is none."""
    name = model.config.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        commit = getattr(model.config, "_commit_hash", None)
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(SENT)))
    except (ValueError, OSError):  # no longer there, or no connection
        return None


def same_model(left: Path, right: Path) -> bool:
    """Whether two saved folders hold the same weights and, up to the dial, the same configuration."""
    weights = "model.safetensors"
    if not all((folder / name).is_file() for folder in (left, right) for name in (weights, CONFIG_NAME)):
        return False
    ignored = ("alpha", "auto_map", "transformers_version", "architectures", "dtype", "_name_or_path")

    def settings(value: Any) -> Any:
        return {k: settings(v) for k, v in value.items() if k not in ignored} if isinstance(value, dict) else value

    configs = [json.dumps(settings(read_json(folder / CONFIG_NAME)), sort_keys=True) for folder in (left, right)]
    return configs[0] == configs[1] and filecmp.cmp(left / weights, right / weights, shallow=False)


__all__ = ["Published", "Upload", "check_repo_id", "hide_tokens", "plan_upload", "publish_folder", "push_model"]
