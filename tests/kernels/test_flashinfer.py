"""The FlashInfer backend around a stand-in (flashinfer_stand_in.py), against the reference's attention."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.core.plan import Slice
from weft.errors import ConfigError
from weft.kernels.attention import Shape, open_attention
from weft.kernels.base import Batch
from weft.kernels.reference import PlainKv, ReferenceKernels
from weft.models.batch import make_batch

pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels.flashinfer_attention import FlashInferAttention, FlashInferPlanner, pages_of, workspace_bytes

CPU = torch.device("cpu")
stand_in = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("flashinfer_stand_in.py"))))
backend = FlashInferAttention(CPU, stand_in)
reference = ReferenceKernels(())
few = settings(max_examples=25, deadline=None)
MIB = 2**20


def shape_of(**given: Any) -> Shape:
    usual = {"heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 0.125, "block_size": 16}
    return Shape(**usual | {"dtype": torch.bfloat16, "windows": (None,)} | given)


def planner_of(shape: Shape, sent: list[torch.Tensor] | None = None) -> FlashInferPlanner:
    kept: list[torch.Tensor] = [] if sent is None else sent
    return backend.planner(shape, 8, 16, lambda tensor: (kept.append(tensor), tensor.clone())[1])


def kv_of(shape: Shape, blocks: int, seed: int) -> Any:
    kv = backend.make_kv(blocks, shape.block_size, shape.kv_heads, shape.head_dim, shape.dtype)
    generator = torch.Generator().manual_seed(seed)
    for part in (kv.keys, kv.values):
        part.codes.copy_(torch.randn(part.codes.shape, generator=generator))
    return kv


def slices_of(ranges: Sequence[tuple[int, int]], block_size: int, seed: int) -> tuple[list[Slice], int]:
    """(slices of positions [begin, end) with blocks in no order, how many blocks there are)."""
    counts = [-(-end // block_size) for _, end in ranges]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    made = []
    for i, ((begin, end), count) in enumerate(zip(ranges, counts, strict=True)):
        made.append(Slice(i, begin, (0,) * (end - begin), tuple(order.pop() for _ in range(count))))
    return made, sum(counts) + 2


def checked(shape: Shape, kv: Any, batch: Batch, plan: Any, window: int | None, rows: int | None = None) -> None:
    """The first rows, or all, are the reference's but for the last bit of their type."""
    q = torch.randn(len(batch.tokens), shape.heads * shape.head_dim, generator=torch.Generator().manual_seed(9))
    q = q.to(shape.dtype)
    heads, kv_heads, scale = shape.heads, shape.kv_heads, shape.scale
    found = backend.attention(q, kv, replace(batch, plan=plan), heads, kv_heads, scale, window)
    truth = PlainKv(*(part.codes.transpose(1, 2) for part in (kv.keys, kv.values)))
    expected = reference.attention(q, truth, batch, heads, kv_heads, scale, window)
    eps = torch.finfo(shape.dtype).eps
    torch.testing.assert_close(found[:rows].float(), expected[:rows].float(), rtol=2 * eps, atol=eps)


@st.composite
def ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Of one to four sequences; half of the steps are decode."""
    decode = draw(st.booleans())
    made = []
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, 70))
        made.append((begin, begin + (1 if decode else draw(st.integers(1, 40)))))
    return made


@few
@given(
    ranges=ranges(),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 5, 7]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    block_size=st.sampled_from([16, 32]),
    windows=st.sampled_from([(None,), (None, 9), (1,), (40, None, 16)]),
    seed=st.integers(0, 2**31),
)
@example(
    ranges=[(0, 16), (31, 32), (17, 50)],
    kv_heads=2,
    group=7,
    dtype=torch.float16,
    block_size=16,
    windows=(None, 9),
    seed=0,
)
@example(
    ranges=[(16, 17), (31, 32), (0, 1)],
    kv_heads=1,
    group=5,
    dtype=torch.bfloat16,
    block_size=16,
    windows=(9,),
    seed=0,
)
def test_attention_is_the_references(
    ranges: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    dtype: torch.dtype,
    block_size: int,
    windows: tuple[int | None, ...],
    seed: int,
) -> None:
    """Ragged prompts behind what was there before, pages in no order, the last one full or not."""
    heads = group * kv_heads
    shape = shape_of(heads=heads, kv_heads=kv_heads, dtype=dtype, block_size=block_size, windows=windows)
    slices, blocks = slices_of(ranges, block_size, seed)
    batch, kv = make_batch(slices, block_size), kv_of(shape, blocks, seed)
    plan = planner_of(shape).plan(batch)
    for window in windows:
        checked(shape, kv, batch, plan, window)


def test_a_graph_reads_what_was_planned_last_and_padding_harms_nobody() -> None:
    """One object for each number of rows, whose buffers the next plan fills."""
    shape = shape_of(windows=(None, 20))
    planner, kv = planner_of(shape), kv_of(shape, 40, 1)

    def padded(lengths: Sequence[int], size: int) -> Batch:
        slices, _ = slices_of([(length - 1, length) for length in lengths], 16, len(lengths))
        batch = make_batch([*slices, *[Slice(-1, 0, (0,), (0,))] * (size - len(lengths))], 16)
        batch.contexts[len(lengths) :] = 0
        return batch

    recorded = planner.plan(padded((), 4), captured=True)
    for lengths in ((1, 33, 16), (70,), (16, 17, 90, 2), (5, 5)):
        batch = padded(lengths, 4)
        assert planner.plan(batch, captured=True) is recorded
        for window in shape.windows:
            seen = replace(batch, contexts=batch.contexts.clamp(min=1))  # the reference has no padding
            checked(shape, kv, seen, recorded, window, rows=len(lengths))
    assert planner.plan(padded((3,), 2), captured=True) is not recorded
    assert planner.plan(padded((3, 4, 5, 6), 4)) is not recorded  # the same rows without a graph


def test_pages_follow_one_another_and_go_to_the_device_once() -> None:
    batch = make_batch([Slice(0, 3, (0,) * 14, (7, 2, 9)), Slice(1, 0, (0,), (4,)), Slice(2, 0, (0,) * 32, (1, 3))], 16)
    batch.contexts[1] = 0
    pages = pages_of(batch)
    assert pages.starts.tolist() == [0, 2, 3, 5]  # a block that is held for later is not read
    assert pages.indices.tolist() == [7, 2, 4, 1, 3] and pages.last.tolist() == [1, 1, 16]
    assert {tensor.dtype for tensor in (pages.starts, pages.indices, pages.last)} == {torch.int32}
    sent: list[torch.Tensor] = []
    planner_of(shape_of(windows=(None, 5)), sent).plan(batch)
    assert [tensor.tolist() for tensor in sent] == [[7, 2, 4, 1, 3]]


def test_what_was_not_planned_is_refused() -> None:
    shape = shape_of()
    batch, kv = make_batch([Slice(0, 0, (0, 0), (0,))], 16), kv_of(shape, 1, 0)
    q = torch.zeros(2, 256, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="not planned for window = None"):
        backend.attention(q, kv, batch, 4, 2, 0.125)
    planned = replace(batch, plan=planner_of(shape).plan(batch))
    with pytest.raises(ValueError, match="not planned for window = 3"):
        backend.attention(q, kv, planned, 4, 2, 0.125, 3)
    with pytest.raises(ValueError, match=r"scale = 0.5 are not those that were planned"):
        backend.attention(q, kv, planned, 4, 2, 0.5)


def test_the_workspace_has_room_for_every_split() -> None:
    """Of 132 processors: 8 groups of 4 heads; a graph of 512 rows; 256 channels."""
    assert workspace_bytes(shape_of(), 8, 132) == 128 * MIB
    eight = shape_of(heads=32, kv_heads=8, head_dim=128)
    assert workspace_bytes(eight, 64, 132) == 128 * MIB
    assert workspace_bytes(eight, 512, 132) == 4 * 32 * (512 * 4 // 16 + 511) * 16 * 129
    assert workspace_bytes(shape_of(heads=64, kv_heads=8, head_dim=128), 64, 132) == 4 * 64 * 33 * 128 * 129
    planner = planner_of(shape_of(windows=(None, 4)))
    assert planner.bytes(0) == 128 * MIB + 2 * 2 * 8 * MIB and planner.bytes(3) == planner.bytes(0) + 3 * 2 * 8 * MIB


@pytest.mark.parametrize(
    ("head_dim", "dtype", "cache", "words"),
    [
        (64, torch.bfloat16, "int8", "--kv-cache-dtype is int8; what would work: --kv-cache-dtype auto, or .*triton"),
        (64, torch.bfloat16, "int4", "--kv-cache-dtype is int4"),
        (64, torch.float32, "auto", "activations are in float32; what would work: --dtype bfloat16, or .*triton"),
        (
            80,
            torch.bfloat16,
            "auto",
            "heads of 64, 128, 256 channels, and this model's have 80; what would work: .*triton",
        ),
    ],
)
def test_what_it_cannot_do_names_the_flag_and_what_works(
    head_dim: int, dtype: torch.dtype, cache: str, words: str
) -> None:
    for call in (
        lambda: backend.token_bytes(2, head_dim, dtype, cache),
        lambda: backend.make_kv(1, 16, 2, head_dim, dtype, cache),
    ):
        with pytest.raises(ConfigError, match=f"--attention-backend is flashinfer, .*{words}"):
            call()
    assert backend.token_bytes(2, 64, torch.bfloat16, "bf16") == 2 * 2 * 64 * 2


def test_it_is_opened_on_a_gpu_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"on a GPU only, and here kernels are interpreted; .* work: triton, torch"):
        open_attention("flashinfer", CPU)
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # as Python has it for what cannot be found
    with pytest.raises(
        ConfigError, match=r"not installed: .*flashinfer.*pip install 'weft\[flashinfer\]', or .*triton"
    ):
        open_attention("flashinfer", gpu)
    assert open_attention("triton", gpu).name == "triton"  # which asks for nothing of it
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    opened = open_attention("flashinfer", gpu)
    assert opened.name == "flashinfer" and opened.capturable
    monkeypatch.delitem(sys.modules, "flashinfer")
    (tmp_path / "flashinfer.py").write_text("raise RuntimeError('CUDA_HOME is not set')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be loaded: RuntimeError: CUDA_HOME is not set; .*triton"):
        open_attention("flashinfer", gpu)
