"""The FlashInfer backend with the package itself, where it is installed: attention against the reference, in a graph
too, and a device that serves with it.

    pip install flashinfer-python          it compiles its kernels when they are first asked for, and needs nvcc for it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

from tests.gpu.test_equality import GREEDY, PROMPTS, Case, Driver, opened

from weft.core.plan import Slice
from weft.devices.cuda_forward import filled
from weft.devices.cuda_inputs import send_tensors
from weft.devices.cuda_streams import open_gpu
from weft.kernels.attention import Shape, open_attention
from weft.kernels.reference import PlainKv, ReferenceKernels
from weft.models.batch import make_batch

reference = ReferenceKernels(())
WINDOWS = (None, 600)


def shape_of(group: int) -> Shape:
    return Shape(8 * group, 8, 128, 128**-0.5, 16, torch.bfloat16, WINDOWS)


class Lane:
    """A planner, keys and values of random numbers, and the reference's copy of them."""

    def __init__(self, shape: Shape) -> None:
        self.gpu, self.shape = open_gpu(), shape
        self.stream = self.gpu.stream()
        self.backend = open_attention("flashinfer", self.gpu.device)
        planner = self.backend.planner(shape, 8, 128, lambda tensor: send_tensors(self.gpu, [tensor])[0])
        assert planner is not None
        self.planner = planner
        self.kv: Any = self.backend.make_kv(300, shape.block_size, shape.kv_heads, shape.head_dim, shape.dtype)
        for part in (self.kv.keys, self.kv.values):
            part.codes.normal_()
        self.truth = PlainKv(*(part.codes.transpose(1, 2).cpu() for part in (self.kv.keys, self.kv.values)))

    def attend(self, q: torch.Tensor, batch: Any, plan: Any, window: int | None) -> torch.Tensor:
        shape, given = self.shape, replace(batch, plan=plan)
        return self.backend.attention(q, self.kv, given, shape.heads, shape.kv_heads, shape.scale, window)

    def expected(self, q: torch.Tensor, batch: Any, window: int | None) -> torch.Tensor:
        shape = self.shape
        return reference.attention(q.cpu(), self.truth, batch, shape.heads, shape.kv_heads, shape.scale, window)

    def queries(self, rows: int) -> torch.Tensor:
        width = self.shape.heads * self.shape.head_dim
        return torch.randn(rows, width, device=self.gpu.device, dtype=self.shape.dtype)


def slices_of(ranges: Sequence[tuple[int, int]]) -> list[Slice]:
    return [
        Slice(i, begin, (0,) * (end - begin), tuple(range(70 * i, 70 * i + 70)))
        for i, (begin, end) in enumerate(ranges)
    ]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("group", [4, 7])
@pytest.mark.parametrize(
    "ranges", [[(0, 900), (500, 516), (31, 32)], [(1000, 1001), (15, 16), (16, 17), (0, 1)]], ids=str
)
def test_attention_is_the_references(group: int, ranges: list[tuple[int, int]]) -> None:
    lane = Lane(shape_of(group))
    batch = make_batch(slices_of(ranges), 16)
    q = lane.queries(len(batch.tokens))
    with lane.stream.use():
        lane.gpu.settle()
        plan = lane.planner.plan(batch)
        found = [lane.attend(q, batch, plan, window) for window in WINDOWS]
        lane.gpu.settle()
    for window, part in zip(WINDOWS, found, strict=True):
        close(part, lane.expected(q, batch, window))


def test_a_graph_reads_what_was_planned_last() -> None:
    """Recorded for rows of nobody, replayed for sequences of other lengths, with rows that nobody is in."""
    lane = Lane(shape_of(4))
    q = lane.queries(4)
    out = {window: torch.empty_like(q) for window in WINDOWS}
    with lane.stream.use():
        lane.gpu.settle()
        plan = lane.planner.plan(filled((), 4, 16), captured=True)
        batch = filled((), 4, 16)

        def work() -> None:
            for window, place in out.items():
                place.copy_(lane.attend(q, batch, plan, window))

        replay = lane.stream.capture(work)
        for ends in ((1, 33, 16), (1100,), (16, 17, 900, 2)):
            seen = filled(slices_of([(end - 1, end) for end in ends]), 4, 16)
            assert lane.planner.plan(seen, captured=True) is plan
            replay()
            lane.gpu.settle()
            used = make_batch(slices_of([(end - 1, end) for end in ends]), 16)
            for window, place in out.items():
                close(place[: len(ends)], lane.expected(q[: len(ends)], used, window))


def test_a_device_serves_with_it(tiny_model: Path) -> None:
    """As with weft's own kernels, but for roundings: answers are compared until two tokens were too near each other."""
    case, params = Case("tiny_model", "bfloat16", "auto"), replace(GREEDY, logprobs=1)
    answers = []
    for backend in ("flashinfer", "triton"):
        with opened(case, tiny_model, attention_backend=backend) as device:
            assert backend in device.describe().kernels
            answers.append(Driver(device, max_num_batched_tokens=40, max_num_seqs=4).answers(PROMPTS, params))
    compared = 0
    for one, two in zip(*answers, strict=True):
        for mine, theirs in zip(one.scores, two.scores, strict=True):
            assert mine is not None and theirs is not None
            if mine.token != theirs.token:
                break
            assert mine.logprob == pytest.approx(theirs.logprob, abs=0.1)
            compared += 1
    assert compared >= 2 * len(PROMPTS)
