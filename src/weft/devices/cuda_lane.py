"""One lane of a GPU: plans become launches on the lane's stream, and launches become results when the device is there.

The lane computes ahead. After a decode step it launches the next one of the same sequences at once, with the tokens
that are still on the device: it guesses the next plan. A plan that asks for what was guessed has its answer already, so
the host has a whole step's time to take in a result and to make the next plan. What was guessed for a sequence that has
ended by then is thrown away; what a plan asks beyond the guess is a launch of its own.

That costs nothing but a row, and harms nobody: a guess writes to the one slot after its sequence's last, in a block
that the sequence held when its last ticket was submitted and that nobody can share, as it is not full. When the
sequence ends and somebody else is given that block, his launch comes after the guess: by itself on this stream, by an
event on the other lane's (`follow`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from weft.core.plan import Plan, Result, Sampled, Slice, Ticket
from weft.devices.cuda_draw import Draw, Outcome, start_draw
from weft.devices.cuda_forward import CudaForward, last_rows
from weft.devices.cuda_streams import Event, Gpu, Stream
from weft.devices.shares import Shares
from weft.devices.step import PromptScores, score_prompts
from weft.errors import RankLost
from weft.models.decoder import Decoder


@dataclass(slots=True, eq=False)
class Launch:
    """What was asked of the device at one time. look: waits for its end, `done`. before: the launch whose tokens it
    took, if it was a guess.

    tokens: by sequence, what it drew; empty until it was read.
    """

    slices: tuple[Slice, ...]
    draw: Draw
    began: Event
    done: Event
    look: Callable[[Event], None]
    before: Launch | None = None
    tokens: dict[int, int] = field(default_factory=dict)

    def read(self) -> dict[int, Outcome]:
        """Wait for the device; the outcomes by sequence. Raises DeviceError, RankLost among them."""
        self.look(self.done)
        drawing = [piece.sequence for piece in self.slices if piece.sample is not None]
        outcomes = dict(zip(drawing, self.draw.read(), strict=True))
        self.tokens = {sequence: found[0] for sequence, found in outcomes.items() if not isinstance(found, str)}
        self.before = None  # no chain of all that ever was
        return outcomes


@dataclass(frozen=True, slots=True)
class Pending:
    """A plan whose launches are under way, or an error. lost: that of a device that can go on no more. moved: as in
    Result."""

    plan: Plan
    launches: tuple[Launch, ...] = ()
    prompt_scores: PromptScores = ()
    failed: tuple[tuple[int, str], ...] = ()
    error: str | None = None
    lost: RankLost | None = None
    moved: float = 0.0

    def finish(self) -> Result:
        """Wait for the device and say what it found. Raises DeviceError when the device has failed."""
        ticket = Ticket(self.plan.step, self.plan.lane)
        if self.lost is not None:
            raise self.lost
        if self.error is not None:
            return Result(ticket, error=self.error, moved=self.moved)
        outcomes: dict[int, Outcome] = {}
        for launch in self.launches:
            outcomes |= launch.read()
        sampled, failed = [], dict(self.failed)
        for piece in self.plan.slices:
            if piece.sample is None or piece.sequence in failed:
                continue
            outcome = outcomes[piece.sequence]
            if isinstance(outcome, str):
                failed[piece.sequence] = outcome
            else:
                sampled.append(Sampled(piece.sequence, *outcome))
        seconds = sum(launch.done.seconds_since(launch.began) for launch in self.launches)
        scores, alone = self.prompt_scores, tuple(failed.items())
        return Result(ticket, tuple(sampled), scores, alone, seconds=seconds, moved=self.moved)


class CudaLane:
    """One thread calls `start`, in the order of plans. Another may ask `writing` at any time."""

    def __init__(self, gpu: Gpu, stream: Stream, decoder: Decoder, forward: CudaForward, block_size: int) -> None:
        self._gpu = gpu
        self._stream = stream
        self._decoder = decoder
        self._forward = forward
        self._block_size = block_size
        self._shares: Shares[int] = Shares()
        self._guess: Launch | None = None
        self._guesses: tuple[tuple[frozenset[int], Event], ...] = ()  # that may still write, oldest first
        self._overwritten: frozenset[int] = frozenset()  # blocks that others have written to since the latest guess

    def start(
        self, plan: Plan, others: Iterable[CudaLane] = (), *, ahead: bool = True, share: int | None = None
    ) -> Pending:
        """Launch a plan, or what of it was not launched already. An exception fails the step, not the lane.

        others: the lanes whose guesses it must not run into. ahead: whether to guess what comes next. share: of the
        device, from now on (see Shares); None for the same as before.
        """
        if share is not None:
            self._shares.adopt(plan.lane, share, self._stream.move)
        try:
            with self._stream.use(), torch.inference_mode():
                pending = self._start(plan, others, ahead)
        except RankLost as error:  # that is more than this step
            return Pending(plan, lost=error)
        except Exception as error:
            self._guess = None
            pending = Pending(plan, error=f"{type(error).__name__}: {error}")
        moved = self._stream.moved()
        return replace(pending, moved=moved) if moved else pending

    def check(self) -> None:
        """Raises DeviceError when the device has failed, so that nothing will work any more."""
        self._stream.check()

    def writing(self, blocks: set[int]) -> list[Event]:
        """When the guesses that may still write to some of these blocks have done so."""
        return [event for written, event in self._guesses if not written.isdisjoint(blocks) and not event.reached()]

    def overwritten(self, blocks: set[int]) -> None:
        """Another lane writes to these blocks: what was guessed there will not be there any more. A sequence that was
        preempted meanwhile may get the very same blocks again, and ask for what was guessed.

        It cannot meet `start` in the other thread: whose blocks a guess writes to, he is in a plan until that is over.
        """
        self._overwritten |= blocks

    def _start(self, plan: Plan, others: Iterable[CudaLane], ahead: bool) -> Pending:
        guess, self._guess = self._guess, None
        overwritten, self._overwritten = self._overwritten, frozenset()
        rest = plan.slices if guess is None else self._not_guessed(plan.slices, guess, overwritten)
        launches = [guess] if guess is not None and len(rest) < len(plan.slices) else []
        prompt_scores: PromptScores = ()
        failed: dict[int, str] = {}
        if rest:
            launches.append(self._launch(rest, others))
            prompt_scores, failed = score_prompts(rest, self._forward.head, self._forward.hidden)
        decode = all(len(piece.tokens) == 1 for piece in plan.slices)  # prompts are followed by prompts
        if ahead and decode and len(launches) == 1:
            self._guess = self._go_ahead(plan, launches[0], others)
        return Pending(plan, tuple(launches), prompt_scores, tuple(failed.items()))

    def _launch(
        self, slices: tuple[Slice, ...], others: Iterable[CudaLane], feeds: Sequence[int] | None = None
    ) -> Launch:
        written = self._written(slices)
        for other in others:
            for event in other.writing(written):
                self._stream.follow(event)
            other.overwritten(written)
        began = self._stream.mark()
        logits = self._forward.run(slices, last_rows(slices), feeds)
        samplings = [piece.sample for piece in slices if piece.sample is not None]
        draw = start_draw(self._gpu, logits, samplings, self._forward.drawn)
        look = self._forward.look()
        return Launch(slices, draw, began, self._stream.mark(), look)

    def _go_ahead(self, plan: Plan, launch: Launch, others: Iterable[CudaLane]) -> Launch | None:
        """Launch the next decode step of a plan's sequences, where it can be told and has room."""
        going_on = [piece for piece in plan.slices if piece.end < self._decoder.max_model_len]
        following = [_next(piece, self._block_size) for piece in going_on]
        slices = tuple(piece for piece in following if piece is not None)
        if not slices or len(slices) != len(following):
            return None
        places = {piece.sequence: place for place, piece in enumerate(launch.slices)}
        guess = self._launch(slices, others, [places[piece.sequence] for piece in slices])
        guess.before = launch
        old = tuple(entry for entry in self._guesses if not entry[1].reached())
        self._guesses = (*old, (frozenset(self._written(slices)), guess.done))
        return guess

    def _not_guessed(self, slices: tuple[Slice, ...], guess: Launch, overwritten: frozenset[int]) -> tuple[Slice, ...]:
        """The slices that the guess did not compute, or of which what it wrote is gone. Their tokens are known by now,
        if they were made from its results."""
        guessed = {piece.sequence: piece for piece in guess.slices}
        tokens = {} if guess.before is None else guess.before.tokens

        def computed(piece: Slice) -> bool:
            found = guessed.get(piece.sequence)
            return (
                found is not None
                and piece.tokens == (tokens.get(piece.sequence),)
                and (piece.start, piece.sample, piece.prompt_logprobs) == (found.start, found.sample, None)
                and piece.blocks[: len(found.blocks)] == found.blocks
                and overwritten.isdisjoint(self._written([found]))
            )

        return tuple(piece for piece in slices if not computed(piece))

    def _written(self, slices: Iterable[Slice]) -> set[int]:
        size = self._block_size
        return {block for one in slices for block in one.blocks[one.start // size : (one.end - 1) // size + 1]}


def _next(piece: Slice, block_size: int) -> Slice | None:
    """What a sequence computes after this slice, but for its token; None where nobody can know, or room lacks."""
    sampling = piece.sample
    if sampling is None or piece.prompt_logprobs is not None or sampling.params.penalised or sampling.forbidden:
        return None
    if piece.end >= len(piece.blocks) * block_size:
        return None
    return Slice(piece.sequence, piece.end, (0,), piece.blocks, sampling._replace(position=sampling.position + 1))
