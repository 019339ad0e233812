"""What a slice asks of the device, and whether the device has answered it."""

from __future__ import annotations

from weft.core.plan import Sampled, Sampling, Slice, TokenScore
from weft.core.sequence import Sequence

# Of a named tuple from a plain one: half of what calling the class takes, and this is done for every token.
made = tuple.__new__


def decode_slice(sequence: Sequence, source: tuple[int, ...] = ()) -> Slice:
    """The last token, which was drawn and not computed yet. source: see `Slice`."""
    tokens, plain = sequence.tokens, sequence.plain
    start = len(tokens) - 1
    sample = sampling(sequence) if plain is None else made(Sampling, (plain, sequence.seed, start + 1, (), (), ()))
    return made(Slice, (sequence.id, start, (tokens[start],), sequence.table, sample, None, None, source))


def prefill_slice(sequence: Sequence, budget: int) -> Slice:
    """Up to `budget` of the tokens that are not computed yet; the one with the last of them draws the next."""
    tokens, start = sequence.tokens, sequence.computed
    end = min(len(tokens), start + budget)
    return Slice(
        sequence=sequence.id,
        start=start,
        tokens=tuple(tokens[start:end]),
        blocks=sequence.table,
        sample=sampling(sequence) if end == len(tokens) else None,
        prompt_logprobs=sequence.live.request.params.prompt_logprobs if sequence.scores_due else None,
        next_token=tokens[end] if sequence.scores_due and end < len(tokens) else None,
    )


def sampling(sequence: Sequence) -> Sampling:
    """How to draw the token after the ones that are known."""
    live, tokens = sequence.live, sequence.tokens
    params, length = live.request.params, len(tokens)
    # `forbidden` keeps stop ids away until min_tokens were generated.
    forbidden = live.forbidden if sequence.generated < params.min_tokens else ()
    if params.penalised:
        output = tuple(tokens[sequence.prompt_len :])
        return Sampling(params, sequence.seed, length, live.request.prompt, output, forbidden)
    return Sampling(params, sequence.seed, length, (), (), forbidden)


def shortfall(piece: Slice, drawn: Sampled | None, scores: tuple[TokenScore, ...], vocabulary: int) -> str | None:
    """What the device left out or made up, if anything."""
    if piece.sample is not None:
        if drawn is None:
            return "the device returned no token for the sequence"
        if not 0 <= drawn.token < vocabulary:
            return f"the device returned token {drawn.token}, outside of the vocabulary"
    if piece.prompt_logprobs is not None:
        rows = len(piece.tokens) - (piece.next_token is None)
        if len(scores) != rows:
            return f"the device scored {len(scores)} prompt tokens instead of {rows}"
    return None
