"""Typed look-ups in the JSON files of a checkpoint, with errors that name the key and its value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.errors import CheckpointError

CONFIG_FILE = "config.json"
LARGEST = 2**31 - 1  # token ids, positions and block numbers are int32 somewhere below


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueError
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a JSON {type(raw).__name__}; it must be an object")
    return raw


class Keys:
    """Typed look-ups in a JSON object; a value that cannot be used raises CheckpointError with its key and value.

    A key that is absent or null takes the default; without a default it is an error.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw = raw
        self.prefix = prefix

    def error(self, key: str, reason: str) -> CheckpointError:
        value = repr(self.raw.get(key))
        shown = value if len(value) <= 200 else value[:200] + "..."
        return CheckpointError(f"{CONFIG_FILE}: {self.prefix}{key} is {shown}; {reason}")

    def get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{CONFIG_FILE} lacks {self.prefix}{key}")
        return default

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        value = self.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"it must be a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not (0 < value <= 1e30):  # the comparison refuses NaN too
            raise self.error(key, "it must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "it must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "it must be a string")
        return value

    def inner(self, key: str) -> Keys | None:
        """The object under `key`; None where the key is absent, null or an empty object."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "it must be an object")
        return Keys(value, f"{self.prefix}{key}.") if value else None
