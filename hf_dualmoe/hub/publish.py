"""Publish a saved model to the Hub: `upload_plan` checks everything first, then all goes in one commit."""

import filecmp
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
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
from huggingface_hub.utils import RepositoryNotFoundError
from transformers import PreTrainedModel

from ..evaluation.outcomes import OUTCOMES_NAME
from ..evaluation.report import RobustnessReport
from .card_text import PLOTS
from .model_card import CARD_NAME, CONFIG_NAME, RESULTS_NAME, check_card, is_rendered, read_json
from .upload_plan import SENT, WEIGHTS, check_repo_id, plan_upload

REPLACED = (RESULTS_NAME, OUTCOMES_NAME, *PLOTS, *WEIGHTS)  # removed from the repository where no longer in the folder


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
    validate_on_hub(check_card(upload.card))  # before a repository is created
    api = HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.repo_info(repo_id, revision=revision).sha  # all below is about this one commit
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
    # parent_commit: refused where somebody has committed since we looked
    commit = api.create_commit(repo_id, operations, revision=revision, parent_commit=head, **options)
    return Published(commit, commit.oid != head, notes)  # equal files make no commit: the Hub returns the head


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
        elif (origin := origin_of(model)) and same_model(origin, folder):  # a model that was trained on is another one
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
    weights = "model.safetensors"  # weights in several files are not compared: then no results go along
    if not all((folder / name).is_file() for folder in (left, right) for name in (weights, CONFIG_NAME)):
        return False
    ignored = ("alpha", "auto_map", "transformers_version", "architectures", "dtype", "_name_or_path")

    def settings(value: Any) -> Any:
        return {k: settings(v) for k, v in value.items() if k not in ignored} if isinstance(value, dict) else value

    configs = [json.dumps(settings(read_json(folder / CONFIG_NAME)), sort_keys=True) for folder in (left, right)]
    return configs[0] == configs[1] and filecmp.cmp(left / weights, right / weights, shallow=False)  # bytes, not dates


__all__ = ["Published", "publish_folder", "push_model"]
