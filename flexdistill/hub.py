"""Converted models go to the Hugging Face Hub; its token is read where huggingface_hub keeps it, and never shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .errors import FlexdistillError, first_sentence
from .progress import progress_bars_on_terminals_only
from .runtime.configuration_flexformer import MODEL_TYPE
from .storage import expanded

# of an earlier push, where the weights were cut into other files: they would be loaded in the place of the new ones
_STALE_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"]
_REMEDIES: dict[int | None, str] = {
    401: "the token is not valid: log in again with `hf auth login`, or set HF_TOKEN",
    403: "name a repository of your own, give a token that may write, or propose the files with --create-pr",
    404: "check the repository's name and the revision",
}


def push(
    directory: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a converted model to a model repository on the Hub, which is made if it is not there.

    If an upload breaks off, the same call goes on with it: `HfApi.upload_folder` commits nothing that is committed
    already and sends no data that the Hub holds already, by whole files over LFS and by pieces of them over Xet.

    Args:
        directory: folder that a conversion wrote.
        repository: USER/NAME or ORGANISATION/NAME.
        private: whether a repository that is made is private; None: as its owner has it by default.
        revision: branch, which is made if it is not there, or an open pull request as `refs/pr/1`; None: main.
        create_pr: open a pull request.

    Returns:
        address of the pull request, if one was opened, else of the commit.

    Raises:
        FlexdistillError: if the folder holds no converted model, there is no token, or the Hub refuses or is out of
            reach.
    """
    folder = _exported(directory)
    if create_pr and revision is not None:
        raise FlexdistillError(
            "A new pull request is for the main branch; leave --revision out, or leave --create-pr out and name the "
            "open one, such as --revision refs/pr/1."
        )
    with _hub(repository) as api, progress_bars_on_terminals_only():
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise FlexdistillError(
                f"Repository {repository} exists and is public; change that in its settings, or leave out --private."
            )
        if revision is not None and not revision.startswith("refs/"):
            _make_branch(api, repository, revision)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=_STALE_WEIGHTS,
            commit_message="Upload Flexformer model",
        )
    return commit.pr_url or commit.commit_url


def check_owner(repository: str) -> None:
    """Checks, without changing anything, that there is a valid token, and that its account owns the repository.

    Raises:
        FlexdistillError: if not.
    """
    with _hub(repository) as api:
        account = api.whoami()
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    owner = repository.split("/")[0]
    if owner not in owners:
        raise FlexdistillError(
            f"The token's account does not own {owner!r}; name a repository of {' or '.join(owners)}."
        )


def _exported(directory: str | Path) -> Path:
    folder = expanded(directory)
    if not folder.is_dir():
        raise FlexdistillError(f"Folder {directory} does not exist; give the one that `flexdistill convert` wrote.")
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        model_type = None
    if model_type != MODEL_TYPE or not any(folder.glob("*.safetensors")):
        raise FlexdistillError(
            f"Folder {directory} holds no converted model; give the one that `flexdistill convert` wrote."
        )
    return folder


def _make_branch(api: HfApi, repository: str, branch: str) -> None:
    try:
        api.model_info(repository, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repository, branch=branch, exist_ok=True)


@contextmanager
def _hub(repository: str) -> Iterator[HfApi]:
    """The Hub as the token's owner sees it; what it refuses becomes a FlexdistillError."""
    token = get_token()
    if token is None:
        raise FlexdistillError("There is no Hugging Face token; log in with `hf auth login`, or set HF_TOKEN.")
    if not (token.isascii() and token.isprintable()):  # else the error of the refused HTTP header would show it
        raise FlexdistillError("The Hugging Face token holds characters that no token has; set HF_TOKEN anew.")
    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise FlexdistillError(f"Repository {repository!r} names no owner; write USER/NAME.")
        yield HfApi(token=token)
    except FlexdistillError:
        raise
    except Exception as error:  # httpx, Xet and huggingface_hub each have errors of their own
        raise FlexdistillError(_explanation(repository, error).replace(token, "HF_TOKEN")) from error


def _explanation(repository: str, error: Exception) -> str:
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    reason = getattr(error, "server_message", None) or first_sentence(error)
    if isinstance(error, OfflineModeIsEnabled):
        reason, remedy = "offline mode is on", "unset HF_HUB_OFFLINE"
    elif status is None and isinstance(error, ValueError):
        remedy = "check the repository's name and the model card"
    else:
        remedy = _REMEDIES.get(status, "check the network; `flexdistill push` goes on with a push that broke off")
    where = f"HTTP {status}: {reason}" if status else reason
    return f"Repository {repository!r} cannot be written ({where}); {remedy}."
