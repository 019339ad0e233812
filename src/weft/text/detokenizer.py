"""Tokens in, text out, as it is generated: the incremental detokenizer of one sequence, and stop strings over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from weft.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# Tokens that may wait for the rest of a character. A character has four bytes at most, so what waits longer is no
# character; without a bound, a model that emits lone continuation bytes for ever would cost quadratic time.
HOLD_LIMIT = 32
# Prompt tokens that are decoded before the first generated one: enough for a character that the prompt's end splits.
PROMPT_CONTEXT = 12


class Detokenizer:
    """Turns the tokens of one sequence into text, piece by piece.

    The pieces of `push` and the last one of `flush` concatenate to the text of all tokens. No piece ends within a
    character; bytes that belong to none become U+FFFD once that is certain. What was handed out is not taken back: a
    run of byte-fallback tokens that begins with whole characters and then breaks keeps those characters (tokenizers'
    own DecodeStream fails there, for good, and its time is quadratic in the length of a broken run).
    prompt: ids before the first token, so that the space before a word is kept and a split character is completed.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Invariant: `_context` are the tokens of the last piece and `_before` their text (decoders treat the first word
        # of a text unlike the others, so a piece is decoded after its predecessor); `_held` are the tokens after them.
        self._context: list[int] = []
        self._before = ""
        self._held: list[int] = []
        for token in self._prompt_end(list(prompt[-PROMPT_CONTEXT:])):
            self.push(token)

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        if not self._tokenizer.visible(token, self._skip):
            return ""
        self._held.append(token)
        if not self._decode(self._context + self._held).endswith(REPLACEMENT):
            return self._release(len(self._held))
        return self._release(self._certain()) if len(self._held) >= HOLD_LIMIT else ""

    def flush(self) -> str:
        """The rest, at the end of the sequence: U+FFFD for a character that was never completed."""
        return self._release(len(self._held)) if self._held else ""

    def _prompt_end(self, ids: list[int]) -> list[int]:
        """The tail of the prompt, from a place that is not within a character: one of any four tokens is."""
        tails = [ids[start:] for start in range(4)]
        return next((tail for tail in tails if not self._decode(tail).startswith(REPLACEMENT)), ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _release(self, count: int) -> str:
        """Hand out the text of the first `count` held tokens, whatever it is; the others go on waiting."""
        ready, self._held = self._held[:count], self._held[count:]
        whole, own = self._decode(self._context + ready), self._decode(ready)
        # They disagree when `ready` breaks a run of bytes whose beginning was handed out: it then stands alone.
        text = whole[len(self._before) :] if whole.startswith(self._before) else own
        self._context, self._before = ready, own
        return text

    def _certain(self) -> int:
        """How many held tokens can be released: all but the last three, which may yet become a character, or a few more
        so that the cut changes nothing."""
        held, size = self._held, len(self._held)
        whole = self._decode(held)
        cuts = range(size - 3, size - 7, -1)
        return next((cut for cut in cuts if self._decode(held[:cut]) + self._decode(held[cut:]) == whole), size - 3)


class Fed(NamedTuple):
    """text: safe to send. stop: the stop string that ended the sequence, if one did."""

    text: str
    stop: str | None


class StopChecker:
    """Finds the first of several stop strings in text that comes in pieces, and holds back what may begin one.

    The first match is the one that is complete first, and of those the longest; so the result does not depend on how
    the text is cut into pieces. Holds fewer characters than the longest stop string has.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._initials = frozenset(stop[0] for stop in self._stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def feed(self, text: str) -> Fed:
        window = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := window.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return Fed(window[: end if self._include else start], stop)
        cut = self._hold_from(window)
        self._held = window[cut:]
        return Fed(window[:cut], None)

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    def _hold_from(self, window: str) -> int:
        """Start of the longest suffix that could begin a stop string.

        Invariant: a position that is rejected here is never looked at again, so the work is linear in the text.
        """
        for position in range(max(0, len(window) - self._longest + 1), len(window)):
            if window[position] in self._initials:
                suffix = window[position:]
                if any(stop.startswith(suffix) for stop in self._stops):
                    return position
        return len(window)


class TextStream:
    """The text of one sequence as a client may see it: detokenized, and cut at the first stop string.

    min_tokens: text of that many first tokens is not searched for stop strings.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens, prompt)
        self._checker = StopChecker(stops, include_stop)
        self._unchecked = min_tokens
        self.stopped_by: str | None = None

    def feed(self, token: int) -> Fed:
        """Text that is safe to send after this token. Once a stop string was found, later tokens give nothing."""
        if self.stopped_by is not None:
            return Fed("", self.stopped_by)
        text = self._detokenizer.push(token)
        if self._unchecked > 0:
            self._unchecked -= 1
            return Fed(text, None)
        return self._check(text)

    def finish(self) -> Fed:
        """The rest of the text, when the sequence ended without a stop string (or with one in the very rest)."""
        if self.stopped_by is not None:
            return Fed("", self.stopped_by)
        fed = self._check(self._detokenizer.flush())
        return fed if fed.stop is not None else Fed(fed.text + self._checker.finish(), None)

    def _check(self, text: str) -> Fed:
        fed = self._checker.feed(text)
        self.stopped_by = fed.stop
        return fed
