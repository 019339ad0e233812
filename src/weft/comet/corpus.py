"""Text to calibrate on that is everywhere: the sources of the running Python's standard library.

The files are those that the built-in model was made from, split as they were for it (tools/builtin_data.py): what is
held out there is held out here, so a figure on held-out text is not flattered.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HELD_OUT_PERCENT = 5
SMALLEST = 64  # characters
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
SKIPPED_PATHS = (
    "_sysconfigdata",
    "config-",
    "encodings/",
    "html/entities.py",
    "locale.py",
    "pydoc_data/topics.py",
    "stringprep.py",
)


def is_held_out(path: str) -> bool:
    """By the path below the standard library's folder alone, so the same everywhere."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT


def standard_library() -> tuple[list[str], list[str]]:
    """The texts to train or calibrate on, and those held out, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: tuple[list[str], list[str]] = ([], [])
    for path, text in _files(root):
        texts[is_held_out(path)].append(text)
    return texts


def windows(
    texts: Sequence[str], encode: Callable[[str], list[int]], count: int, length: int, seed: int
) -> list[list[int]]:
    """Up to `count` rows of `length` token ids, cut without overlap from the texts in random order."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    tokens: list[int] = []
    for text in order:
        tokens += encode(text)
        if len(tokens) >= count * length:
            break
    rows = min(count, len(tokens) // length)
    return [tokens[row * length : (row + 1) * length] for row in range(rows)]


def _files(root: Path) -> Iterator[tuple[str, str]]:
    seen: set[bytes] = set()
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.as_posix().startswith(SKIPPED_PATHS):
            continue
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # a handful of old files in other encodings are no loss
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen and len(text) >= SMALLEST:
            seen.add(digest)
            yield relative.as_posix(), text
