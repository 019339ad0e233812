"""The forward pass of one lane on a GPU: decode from graphs, the rest call by call. Nothing waits for the device.

A graph holds the decode step of so many rows (a bucket); fewer are filled up with rows that read and write nothing:
their slot is -1, and their context 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from weft.core.plan import Slice
from weft.devices.cuda_inputs import Inputs, Layout, layout_of, send, send_tensors
from weft.devices.cuda_ranks import Ranks
from weft.devices.cuda_streams import Event, Gpu, Stream, Work
from weft.kernels.attention import Attention, Planner, Shape
from weft.kernels.base import Batch
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.ranked import Head, cut_step
from weft.weave.choice import Mode


@dataclass(frozen=True, slots=True)
class Graph:
    """A recorded decode step. inputs: the tensors that it reads. memory: all of them but the tables."""

    inputs: Inputs
    memory: torch.Tensor
    replay: Work


class CudaForward:
    """drawn: int64 [max_slices]: the tokens that the latest launch drew, in the order of its rows of logits. Whoever
    draws writes them there. graphs: whether decode goes through graphs, for which the kernels must not wait. planner:
    of the attention backend (kernels/attention.py); it plans on the stream that is used. ranks: the other ranks, if the
    decoder is a part of a model; all of them must run the same steps."""

    def __init__(
        self,
        gpu: Gpu,
        stream: Stream,
        decoder: Decoder,
        kv: list[Any],
        block_size: int,
        *,
        max_slices: int,
        graphs: bool,
        planner: Planner | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.drawn = torch.zeros(max_slices, dtype=torch.int64, device=gpu.device)
        self._gpu = gpu
        self._stream = stream
        self._decoder = decoder
        self._ranks = ranks
        self._kv = kv
        self._block_size = block_size
        self._width = -(-decoder.max_model_len // block_size)
        self._buckets = buckets(max_slices) if graphs else ()
        self._graphs: dict[int, Graph] = {}
        self._logits = torch.empty(0, device=gpu.device)  # of graphs
        self._hidden = torch.empty(0)
        self._planner = planner
        self._planned: Event | None = None  # when the device has what was planned last

    @property
    def head(self) -> Head:
        """Made anew: one that is kept would be in a circle with this object, and the KV would not be freed with it, but
        when Python looks for circles."""
        return Head(self._decoder.config, self._logits_of)

    def run(self, slices: Sequence[Slice], rows: Sequence[int], feeds: Sequence[int] | None = None) -> torch.Tensor:
        """Logits of these rows, float32 [R, V] on the device, good until the next run. The KV of all rows is in the
        blocks when the stream is done.

        feeds: for a decode step whose tokens are those that were drawn by the launch before: their places in `drawn`.
        Raises ValueError for slices that reach outside of their tables.
        """
        decode = all(len(piece.tokens) == 1 for piece in slices) and len(rows) == len(slices)
        if decode and self._buckets and not _scored(slices):
            return self._replay(slices, feeds)
        whole = _scored(slices)
        tokens = sum(len(piece.tokens) for piece in slices)
        mode, lengths = (Mode.FUSED, (tokens,)) if self._ranks is None else self._ranks.choose(slices)
        batches, kept, given = [], [], feeds
        for own, wanted in cut_step(slices, rows, lengths):
            batch = make_batch(own, self._block_size, None if whole else wanted)
            count = len(batch.tokens)
            plan = self._plan(batch)
            sent = send(self._gpu, batch, None if given is None else given[:count])
            given = None if given is None else given[count:]
            inputs = layout_of(batch).inputs(sent, self._block_size, whole=batch.kept is None, plan=plan)
            batches.append(self._fed(inputs, feeds is not None))
            kept.append(wanted)
        self._hidden = self._hidden_of(mode, batches, kept)
        if not whole:
            return self._logits_of(self._hidden)
        (found,) = send_tensors(self._gpu, [torch.tensor(rows, dtype=torch.int64)])
        return self._logits_of(self._hidden[found])

    def hidden(self) -> torch.Tensor:
        """The hidden rows of the last run's tokens, [T, hidden]; of a run with a slice that scores its prompt."""
        return self._hidden

    def _plan(self, batch: Batch, *, captured: bool = False) -> Any:
        if self._planner is None:
            return None
        if self._planned is not None:
            self._planned.wait()
        plan = self._planner.plan(batch, captured=captured)
        self._planned = self._stream.mark()
        return plan

    def look(self) -> Callable[[Event], None]:
        """To be called after a launch. What it returns waits for that, and raises RankLost where it waits for a rank
        that does not come."""
        return (lambda done: done.wait()) if self._ranks is None else self._ranks.look(self._gpu)

    def _hidden_of(self, mode: Mode, batches: Sequence[Batch], kept: Sequence[Sequence[int]]) -> torch.Tensor:
        if self._ranks is None:
            return self._decoder.hidden(batches[0], self._kv)
        return self._ranks.hidden(self._decoder, mode, batches, kept, self._kv)

    def _logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(hidden) if self._ranks is None else self._ranks.logits(self._decoder, hidden)

    def _fed(self, inputs: Inputs, fed: bool = True) -> Batch:
        """The batch with its tokens where they were left on the device."""
        batch = inputs.batch
        if not fed:
            return batch
        tokens = torch.where(inputs.feeds < 0, batch.tokens, self.drawn[inputs.feeds.clamp(min=0)])
        return replace(batch, tokens=tokens)

    def _replay(self, slices: Sequence[Slice], feeds: Sequence[int] | None) -> torch.Tensor:
        count = len(slices)
        size = next(bucket for bucket in self._buckets if bucket >= count)
        if feeds is not None:
            feeds = [*feeds, *[-1] * (size - count)]
        graph, batch = self._graph(size), filled(slices, size, self._block_size)
        self._plan(batch, captured=True)
        sent = send(self._gpu, batch, feeds)
        tables = layout_of(batch).views(sent)[-1]
        graph.memory.copy_(sent[: len(graph.memory)])
        graph.inputs.batch.tables[:, : tables.shape[1]].copy_(tables)
        graph.replay()
        return self._logits[:count]

    def _graph(self, size: int) -> Graph:
        """Made when it is asked for; the largest is made before any other, whose memory then is part of its memory."""
        if size not in self._graphs:
            if not self._graphs and size != self._buckets[-1]:
                self._graph(self._buckets[-1])
            self._graphs[size] = self._record(size)
        return self._graphs[size]

    def _record(self, size: int) -> Graph:
        if not len(self._logits):
            shape = (self._buckets[-1], self._decoder.config.vocabulary)
            self._logits = torch.empty(shape, device=self._gpu.device)
        fixed, whole = Layout(size, size, 0), Layout(size, size, self._width)
        memory = torch.zeros(whole.size, dtype=torch.uint8, device=self._gpu.device)
        nobody = filled((), size, self._block_size)
        plan = self._plan(nobody, captured=True)
        inputs = whole.inputs(memory, self._block_size, whole=True, plan=plan)
        memory[: fixed.size].copy_(send(self._gpu, nobody, None)[: fixed.size])
        logits = self._logits[:size]
        mode = Mode.FUSED if self._ranks is None else self._ranks.choose_one(size)

        def work() -> None:
            hidden = self._hidden_of(mode, [self._fed(inputs)], [range(size)])
            logits.copy_(self._logits_of(hidden))

        return Graph(inputs, memory[: fixed.size], self._stream.capture(work))


def planner_of(gpu: Gpu, attend: Attention, decoder: Decoder, block_size: int, max_slices: int) -> Planner | None:
    """What plans a lane's steps for its attention; None for a backend that needs no plan."""
    config = decoder.config
    shape = Shape(
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.head_dim**-0.5,
        block_size,
        decoder.dtype,
        tuple(dict.fromkeys(config.windows)),
    )
    width = -(-decoder.max_model_len // block_size)
    return attend.planner(shape, max_slices, width, lambda tensor: send_tensors(gpu, [tensor])[0])


def filled(slices: Sequence[Slice], size: int, block_size: int) -> Batch:
    """A decode batch of `size` rows, of which the last ones are nobody's."""
    nobody = Slice(-1, 0, (0,), (0,))
    batch = make_batch([*slices, *[nobody] * (size - len(slices))], block_size)
    batch.slots[len(slices) :] = -1
    batch.contexts[len(slices) :] = 0
    return batch


def buckets(most: int) -> tuple[int, ...]:
    """Sizes of decode graphs: few, and at most a third of the rows for nothing from 16 on."""
    sizes = {most}
    size = 1
    while size < most:
        sizes.add(size)
        if size >= 16 and size * 3 // 2 < most:
            sizes.add(size * 3 // 2)
        size *= 2
    return tuple(sorted(sizes))


def last_rows(slices: Sequence[Slice]) -> list[int]:
    """The last row of each slice that draws a token."""
    ends = accumulate([len(piece.tokens) for piece in slices])
    return [end - 1 for piece, end in zip(slices, ends, strict=True) if piece.sample is not None]


def _scored(slices: Sequence[Slice]) -> bool:
    return any(piece.prompt_logprobs is not None for piece in slices)
