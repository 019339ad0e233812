"""The text of the standard library: the split of the built-in model's own data, and windows without overlap."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weft.comet.corpus import standard_library, windows


def test_the_split_is_that_of_the_built_in_models_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import builtin_data

    ours, theirs = standard_library(), builtin_data.corpus()
    assert len(ours[0]) > 300 and len(ours[1]) > 10
    for part, documents in zip(ours, theirs, strict=True):
        assert part == [document.text for document in documents]
    sys.modules.pop("builtin_data")


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_windows_are_cut_without_overlap_and_follow_the_seed() -> None:
    texts = ["abcdefg", "hijklmn", "opqrstu", "ABCDEFG", "HIJKLMN"]
    rows = windows(texts, encode, count=4, length=5, seed=1)
    assert [len(row) for row in rows] == [5] * 4
    characters = "".join(chr(token) for row in rows for token in row)
    assert len(set(characters)) == 20
    assert rows == windows(texts, encode, count=4, length=5, seed=1)
    assert rows != windows(texts, encode, count=4, length=5, seed=2)


def test_a_short_text_gives_fewer_windows_and_none_below_one() -> None:
    assert len(windows(["abcdefghijk"], encode, count=9, length=5, seed=0)) == 2
    assert windows(["abc"], encode, count=9, length=5, seed=0) == []
