"""From what the user calls a model to a folder on this machine."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from weft.config import BUILTIN_MODEL
from weft.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights and plain data only: never a pickle, never code.
WANTED = ("*.safetensors", "*.json", "*.jinja")


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: 'builtin', a folder, or a hub id ORG/NAME (downloaded or taken from the cache).

    revision: branch, tag or commit of a hub id. Raises CheckpointError that says what was tried.
    """
    if model == BUILTIN_MODEL:
        return Path(__file__).parent.parent / "assets" / "builtin"
    folder = _path(model)
    if model and folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"{model} is a file; give the Hugging Face folder that holds config.json, tokenizer.json and *.safetensors"
        )
    if HUB_ID.fullmatch(model):
        return _download(model, revision)
    raise CheckpointError(
        f"model {model!r} is not '{BUILTIN_MODEL}', not a folder here, and does not look like a hub id (ORG/NAME)"
        + _suggestion(model)
    )


def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub  # slow to import, and not needed for a local folder

    try:
        found = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=list(WANTED), ignore_patterns=["*/*"]
        )
    except Exception as error:  # network, HTTP status, validation, disk: the library has no common base class
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {model!r}: there is no such folder here, and the hub id{at} could not be fetched: {reason}"
            + _suggestion(model)
        ) from error
    return Path(found)


def _path(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # ~NAME of somebody who is not here
        return Path(model)


def _suggestion(model: str) -> str:
    path = _path(model)
    if not path.parent.is_dir():
        return ""
    names = [BUILTIN_MODEL] if path.parent == Path() else []
    names += sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    near = difflib.get_close_matches(path.name, names, n=1)
    if not near:
        return ""
    return f"; did you mean {near[0] if near[0] == BUILTIN_MODEL else path.parent / near[0]}?"
