"""The seam's kernel on a real GPU: several ranks on one of them, each on a stream of its own, who have to meet."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from weft.kernels.triton_seam import Reach, join_rows, signals_of

BLOCKS, SIZE, EPS, SEAMS = 4, 4096, 1e-5, 20


def expected(partials: list[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = torch.zeros_like(residual, dtype=torch.float32)
    for partial in partials:
        total += partial.float()
    summed = (total + residual.float()).bfloat16()
    wide = summed.float()
    return summed, wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()


def recorded(launch: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch()
    return graph.replay


@pytest.mark.parametrize("graph", [False, True], ids=["launched", "graph"])
@pytest.mark.parametrize(("count", "tokens"), [(2, 64), (3, 65), (4, 512)])
def test_ranks_meet_whatever_their_delays(count: int, tokens: int, graph: bool) -> None:
    torch.manual_seed(count)
    new = {"device": "cuda", "dtype": torch.int32}
    partials = [torch.empty(tokens, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    outs = [torch.empty_like(partials[0]) for _ in range(count)]
    signals = [torch.zeros(signals_of(count, BLOCKS), **new) for _ in range(count)]
    tables = [torch.tensor([one.data_ptr() for one in many], device="cuda") for many in (partials, outs, signals)]
    reach = [Reach(rank, *tables, torch.zeros(BLOCKS, **new), torch.zeros(1, **new)) for rank in range(count)]
    bounds = list(pairwise(tokens * rank // count for rank in range(count + 1)))
    weight = torch.randn(SIZE, device="cuda").bfloat16()
    residual = torch.randn(tokens, SIZE, device="cuda").bfloat16()
    kept = [residual[first:end].clone() for first, end in bounds]
    streams = [torch.cuda.Stream() for _ in range(count)]
    launches = [
        lambda rank=rank: join_rows(reach[rank], kept[rank], weight, EPS, bounds[rank]) for rank in range(count)
    ]
    for seam in range(SEAMS):
        for partial in partials:
            partial.normal_()
        torch.cuda.synchronize()
        for turn in range(count):
            rank = (turn + seam) % count
            with torch.cuda.stream(streams[rank]):
                torch.cuda._sleep(100_000 * ((rank * 7 + seam * 3) % 5))
                launches[rank]()
        torch.cuda.synchronize()
        residual, hidden = expected(partials, residual, weight)
        assert [int(one.failed) for one in reach] == [0] * count
        assert torch.equal(torch.cat(kept), residual)
        if graph and seam == 0:  # compiled now
            launches = [recorded(launch, stream) for launch, stream in zip(launches, streams, strict=True)]
        for out in outs:
            assert torch.equal(out, outs[0])
            torch.testing.assert_close(out.float(), hidden, rtol=2**-7, atol=1e-5)


def test_a_rank_that_does_not_come_is_named() -> None:
    new = {"device": "cuda", "dtype": torch.int32}
    partials = [torch.zeros(4, SIZE, device="cuda") for _ in range(2)]
    signals = [torch.zeros(signals_of(2, BLOCKS), **new) for _ in range(2)]
    tables = [torch.tensor([one.data_ptr() for one in many], device="cuda") for many in (partials, partials, signals)]
    reach = Reach(0, *tables, torch.zeros(BLOCKS, **new), torch.zeros(1, **new))
    join_rows(reach, torch.zeros(2, SIZE, device="cuda"), torch.ones(SIZE, device="cuda"), EPS, (0, 2), spins=1000)
    assert int(reach.failed) == 1 + 1
