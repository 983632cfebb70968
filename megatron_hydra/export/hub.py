"""An exported folder onto the Hugging Face Hub, by huggingface_hub and its own login."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hydra.errors import UserError


def check_push(repo: str) -> None:
    """See, before the work, that somebody is logged in who could push to a repository.

    Args:
        repo: `NAME` or `OWNER/NAME`.

    Raises:
        UserError: If the name cannot be, huggingface_hub is not installed, nobody is logged in, or
            the Hub cannot be reached.
    """
    hub = _hub()
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError as error:
        raise UserError(f"--push {repo}: {_first(error)}") from error
    try:
        hub.HfApi().whoami()
    except Exception as error:  # its own, requests' and httpx's, by release
        raise UserError(
            f"--push {repo}: the Hub does not know who you are ({_first(error)}); log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error


def push_folder(folder: Path, repo: str, is_public: bool) -> str:
    """Upload a folder in one commit; the repository is made where there is none.

    Args:
        folder: Of `export`.
        repo: `NAME`, for one's own, or `OWNER/NAME`.
        is_public: Whether a new repository is; one that is there stays as it is.

    Returns:
        The repository's address.

    Raises:
        UserError: If the Hub refuses; the folder stays.
    """
    api = _hub().HfApi()
    try:
        made = api.create_repo(repo, private=not is_public, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Upload a model exported by megatron_hydra",
            # Weights of an earlier export, cut in other files, would be loaded in place of these.
            delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
        )
    except Exception as error:  # as above
        raise UserError(
            f"the export to {folder} is done, but it could not be pushed to {repo}: "
            f"{_first(error)}; try again with `hf upload {repo} {folder}`"
        ) from error
    return str(made)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UserError("--push needs huggingface_hub, which is not installed") from error
    return huggingface_hub


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else repr(error)
