"""Putting a model folder on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
# a run's folder also holds checkpoints, logs and the command with its local paths
_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "*token*.json", "*token*.txt", "*.model", "*.jinja",
    "*vocab*", "*merges.txt", "*special_tokens_map.json", "README.md",
)  # fmt: skip
_NOT_MODEL = ("checkpoint-*", ".*", "*/.*", "evaluation/*")


def check_push(name: str, folder: str | Path | None = None, bases: Mapping[str, str] | None = None) -> None:
    """Refuse, before hours of work, what could not be pushed.

    Args:
        name: "name" or "org/name". folder: the model, where it exists already. bases: where it does not, the models by
            role that its config will name.

    Raises:
        ValueError: no hub name, nobody logged in, or a model that others could not load.
    """
    from huggingface_hub import get_token

    if not _NAME.fullmatch(name):
        raise ValueError(f"--push-to-hub {name!r}: expected a repository, NAME or ORGANISATION/NAME")
    if get_token() is None:
        raise ValueError(f"--push-to-hub {name}: no access token; log in with `hf auth login` or set HF_TOKEN")
    if folder is not None:
        config = Path(folder) / "config.json"
        if not config.is_file():
            raise ValueError(f"--push-to-hub {name}: {str(folder)!r} holds no config.json, so it is no complete model")
        data = json.loads(config.read_text(encoding="utf-8"))
        bases = {role: data.get(role) for role in ("encoder", "llm")}
    for role, base in (bases or {}).items():
        if isinstance(base, str) and Path(base).is_dir():
            raise ValueError(
                f"--push-to-hub {name}: the model names its {role} by the local folder {base!r}, which nobody else "
                "has; store it with the model (--include-base, or `mtllm convert --to merged`)"
            )


def push(folder: str | Path, name: str, *, private: bool = True) -> str:
    """Upload the model files of `folder` to the repository `name`, which is made where it does not exist.

    Args:
        private: of a repository that is made now; one that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        ValueError: see `check_push`. OSError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_push(name, folder)
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=str(folder),
            allow_patterns=list(_MODEL_FILES),
            ignore_patterns=list(_NOT_MODEL),
            commit_message="Upload model with mtllm-fast",
        )
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"--push-to-hub {name}: {reason}; the model is complete in {folder}") from error
    return str(repository)
