"""Incremental text equals the text of all tokens, and stop strings cut it where a search over the whole text would."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.text.detokenizer import HOLD_LIMIT, Detokenizer, Fed, StopChecker, TextStream
from weft.text.tokenizer import Tokenizer

KINDS = ("builtin", "byte_level", "byte_fallback", "unigram")
TEXTS = st.text(
    st.sampled_from("the qux  \n日語你好😀👩\u200d👧e\u0301é\u00a0") | st.characters(codec="utf-8"), max_size=30
)
IDS = st.lists(st.integers(0, 10**6), max_size=HOLD_LIMIT - 2)


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """The oracle: all tokens at once. In a run of byte-fallback tokens, the whole characters that it begins with are
    kept and each byte after them is U+FFFD."""
    if skip:
        ids = [token for token in ids if token not in tokenizer.special_ids]
    shown: list[int] = []
    for run in re.findall(r"(?:<\d+>)+|\[\d+\]", "".join(map(marked(tokenizer), ids))):
        numbers = [int(number) for number in re.findall(r"\d+", run)]
        raw = b"".join(map(tokenizer.token_bytes, numbers)) if run[0] == "<" else b""
        good = max(size for size in range(len(raw) + 1) if is_utf8(raw[:size]))
        # U+FFFD is spelled in three byte tokens of its own, which are valid.
        broken = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in b"\xef\xbf\xbd"] * (len(raw) - good)
        shown += [*numbers[:good], *broken] if raw else numbers
    return tokenizer.decode(shown, skip_special_tokens=skip)


def marked(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    return lambda token: f"<{token}>" if "<0x" in (tokenizer.backend.id_to_token(token) or "") else f"[{token}]"


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@given(numbers=IDS, skip=st.booleans())
@settings(max_examples=80, deadline=None)
def test_random_ids(kind: str, numbers: list[int], skip: bool, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    # No text has <0x20>: a space is a piece of its own, and the decoder drops one at the beginning.
    space = tokenizer.backend.token_to_id("<0x20>")
    ids = [number % tokenizer.vocabulary for number in numbers if number % tokenizer.vocabulary != space]
    got = pieces(tokenizer, ids, skip)
    assert "".join(got) == whole(tokenizer, ids, skip)
    if kind != "byte_fallback":
        assert "".join(got) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=80, deadline=None)
def test_random_text_never_shows_half_a_character(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)
    got.pop()
    # What the tokens so far say in whole characters has been handed out.
    raw = b"".join(tokenizer.token_bytes(token) for token in ids if token not in tokenizer.special_ids)
    if "\ufffd" not in text and kind == "byte_level":
        assert "".join(got) == raw.decode()


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=TEXTS, share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_text_goes_on_from_the_prompt(kind: str, text: str, share: float, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    cut = int(share * len(ids))
    before = tokenizer.decode(ids[:cut])
    if before.endswith("\ufffd"):
        return
    detokenizer = Detokenizer(tokenizer, prompt=ids[:cut])
    after = "".join([*map(detokenizer.push, ids[cut:]), detokenizer.flush()])
    assert before + after == tokenizer.decode(ids)


def test_a_character_that_the_prompt_splits(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    ids = tokenizer.encode("the 😀 the", add_special_tokens=False)
    cut = tokenizer.decode(ids).index("😀") - 1  # "▁the", "▁", then the four bytes
    detokenizer = Detokenizer(tokenizer, prompt=ids[:cut])
    assert "".join([*map(detokenizer.push, ids[cut:]), detokenizer.flush()]) == "😀 the"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_bytes_that_are_no_character_are_not_held_for_ever(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    by_text = tokenizer.backend.token_to_id
    byte = by_text("<0xBD>") if kind == "byte_fallback" else by_text("½")
    assert tokenizer.token_bytes(byte) == b"\xbd"
    detokenizer = Detokenizer(tokenizer)
    sizes = []
    for _ in range(40 * HOLD_LIMIT):
        detokenizer.push(byte)
        sizes.append(len(detokenizer._held))
    assert max(sizes) < HOLD_LIMIT
    tail = tokenizer.encode("the 你 the", add_special_tokens=False)
    got = pieces(tokenizer, [byte] * 40 * HOLD_LIMIT + tail)
    assert "".join(got).replace("\ufffd", "").strip() == "the 你 the"
    assert "".join(got).count("\ufffd") == 40 * HOLD_LIMIT


def test_a_broken_run_keeps_the_characters_already_sent(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    ids = [tokenizer.backend.token_to_id(text) for text in ("<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "a", "b")]
    assert pieces(tokenizer, ids) == ["", "", "你", "", "\ufffda", "b", ""]


def first_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The oracle: at every position of the whole text, does a stop string end here? The longest of those."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    parts=st.lists(st.text("ab<|é", max_size=6), max_size=20),
    stops=st.lists(st.text("ab<|é", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_equal_a_search_over_the_whole_text(parts: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    text, stopped = "", None
    for number, part in enumerate(parts):
        fed = checker.feed(part)
        text += fed.text
        if fed.stop is not None:
            stopped = fed.stop
            break
        # Held back is exactly what could still begin a stop string.
        seen = "".join(parts[: number + 1])
        held = max((k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0)
        assert text == seen[: len(seen) - held]
    else:
        text += checker.finish()
    assert (text, stopped) == first_stop("".join(parts), stops, include)


def test_ten_long_stops_over_a_long_text_look_at_each_position_once() -> None:
    checker = StopChecker(["a" * 500 + letter for letter in "bcdefghijk"])
    looked = 0

    class Counting(str):
        def startswith(self, *args: object) -> bool:  # type: ignore[override]
            nonlocal looked
            looked += 1
            return str.startswith(self, *args)  # type: ignore[arg-type]

    checker._stops = tuple(Counting(stop) for stop in checker._stops)
    text = ("a" * 499 + "x") * 20
    got = "".join(checker.feed(char).text for char in text) + checker.finish()
    assert got == text
    assert looked <= 20 * len(text)


def feed_all(stream: TextStream, ids: list[int]) -> tuple[str, str | None]:
    fed = [*map(stream.feed, ids), stream.finish()]
    return "".join(piece.text for piece in fed), stream.stopped_by


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, stops=st.lists(st.text("the 日語😀", min_size=1, max_size=4), max_size=3), include=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stream_is_the_text_cut_at_its_stop(
    kind: str, text: str, stops: list[str], include: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, stops, include_stop=include)
    assert feed_all(stream, ids) == first_stop(tokenizer.decode(ids), stops, include)


def test_after_a_stop_nothing_follows(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    stream = TextStream(tokenizer, ["b"])
    assert feed_all(stream, tokenizer.encode("abc")) == ("a", "b")
    assert stream.feed(tokenizer.encode("c", False)[0]) == Fed("", "b")


def test_stop_strings_wait_for_min_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("xbxbx", add_special_tokens=False)
    assert feed_all(TextStream(tokenizer, ["b"], min_tokens=2), ids) == ("xbx", "b")


def test_a_stop_in_the_very_rest(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    assert feed_all(TextStream(tokenizer, ["\ufffd"]), ids) == ("a", "\ufffd")
