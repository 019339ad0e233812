"""The seam's kernel over peer pointers: several ranks in one memory, one after the other, against the sum by hand.

The interpreter runs one rank at a time, so all of them have been announced before; what a wait does is tested by those
that are not. That ranks meet is for tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.kernels.reference import ReferenceKernels

pytest.importorskip("triton", reason="triton is not installed")

from weft.kernels.triton_seam import Reach, gather_rows, join_parts, join_rows, signals_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = 2
EPS = 1e-5
NEVER = 1 << 20  # an epoch that no seam reaches


@dataclass
class Ranks:
    """All ranks' buffers."""

    partials: list[torch.Tensor]
    outs: list[torch.Tensor]
    signals: list[torch.Tensor]
    reach: list[Reach]


def ranks(count: int, tokens: int, size: int, dtype: torch.dtype, *, announced: bool = True) -> Ranks:
    torch.manual_seed(count * 1000 + tokens)
    partials = [torch.randn(tokens, size).to(dtype).to(DEVICE) for _ in range(count)]
    outs = [torch.full((tokens, size), float("nan"), dtype=dtype, device=DEVICE) for _ in range(count)]
    epoch = NEVER if announced else 0
    signals = [torch.full((signals_of(count, BLOCKS),), epoch, dtype=torch.int32, device=DEVICE) for _ in range(count)]
    addresses = [
        torch.tensor([tensor.data_ptr() for tensor in tensors], device=DEVICE) for tensors in (partials, outs, signals)
    ]
    counts = [[torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (BLOCKS, 1)] for _ in range(count)]
    reach = [Reach(rank, *addresses, *counts[rank]) for rank in range(count)]
    return Ranks(partials, outs, signals, reach)


def cut(tokens: int, count: int) -> list[int]:
    return [tokens * rank // count for rank in range(count + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "tokens", "size"), [(2, 5, 48), (3, 7, 64), (4, 2, 33)])
def test_all_ranks_get_the_normalised_sum_and_keep_their_own_rows(
    count: int, tokens: int, size: int, dtype: torch.dtype
) -> None:
    made, bounds = ranks(count, tokens, size, dtype), cut(tokens, count)
    weight = torch.randn(size).to(dtype).to(DEVICE)
    before = torch.randn(tokens, size).to(dtype).to(DEVICE)
    kept = [before[first:end].clone() for first, end in pairwise(bounds)]
    given = [partial.clone() for partial in made.partials]
    for rank, reach in enumerate(made.reach):
        join_rows(reach, kept[rank], weight, EPS, (bounds[rank], bounds[rank + 1]))
    total = torch.zeros(tokens, size, device=DEVICE)
    for partial in given:
        total += partial.float()
    summed = (total + before.float()).to(dtype)
    hidden = ReferenceKernels((0,)).rms_norm(summed.cpu(), weight.cpu(), EPS)
    assert torch.equal(torch.cat(kept), summed), "each owner's residual is the sum in float32, rounded once"
    for out, partial, copy in zip(made.outs, made.partials, given, strict=True):
        assert torch.equal(out, made.outs[0]) and torch.equal(partial, copy)
        torch.testing.assert_close(out.cpu(), hidden, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert [int(reach.failed) for reach in made.reach] == [0] * count


def test_the_compiled_kernel_has_the_switchs_instructions_and_spills_nothing() -> None:
    tool = Path(__file__).parents[2] / "tools" / "check_seam.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(tool), "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "multicast" in done.stdout


def test_rows_of_others_are_left_to_them() -> None:
    made = ranks(2, 4, 32, torch.float32)
    weight = torch.ones(32, device=DEVICE)
    join_rows(made.reach[1], torch.zeros(1, 32, device=DEVICE), weight, EPS, (3, 4))
    for out in made.outs:
        assert out[:3].isnan().all() and not out[3].isnan().any()
    join_rows(made.reach[0], torch.zeros(0, 32, device=DEVICE), weight, EPS, (0, 0))  # none to own


def test_a_rank_that_does_not_come_is_named_after_a_while() -> None:
    made = ranks(3, 3, 32, torch.float32, announced=False)
    for rank in (0, 1):  # but not 2
        made.signals[0].view(2, 3, BLOCKS)[:, rank] = NEVER
    weight = torch.ones(32, device=DEVICE)
    join_rows(made.reach[0], torch.zeros(1, 32, device=DEVICE), weight, EPS, (0, 1), spins=3)
    assert int(made.reach[0].failed) == 2 + 1
    for other in (0, 1, 2):  # it has announced itself at each of them, at both ends
        assert (made.signals[other].view(2, 3, BLOCKS)[:, 0] == 1).all()
    made.signals[0].fill_(NEVER)
    made.reach[0].failed.zero_()
    join_rows(made.reach[0], torch.zeros(1, 32, device=DEVICE), weight, EPS, (0, 1))
    assert int(made.reach[0].failed) == 0 and (made.signals[2].view(2, 3, BLOCKS)[:, 0] == 2).all(), "the next seam"


def test_the_count_of_seams_goes_on_after_the_largest_number() -> None:
    made, most = ranks(2, 2, 32, torch.float32, announced=False), 2**31 - 1
    for reach, signals in zip(made.reach, made.signals, strict=True):
        reach.epochs.fill_(most - 1)
        signals.fill_(most - 1)
    weight, kept = torch.ones(32, device=DEVICE), torch.zeros(1, 32, device=DEVICE)
    for seam, count in enumerate((most, -(2**31), 1 - 2**31)):
        join_rows(made.reach[0], kept, weight, EPS, (0, 1), spins=3)
        assert int(made.reach[0].failed) == 1 + 1, "rank 1 is not there yet"
        made.reach[0].failed.zero_()
        made.signals[0].view(2, 2, BLOCKS)[:, 1] = count
        made.reach[0].epochs.sub_(1)
        join_rows(made.reach[0], kept, weight, EPS, (0, 1), spins=3)
        assert int(made.reach[0].failed) == 0, seam
        assert (made.signals[1].view(2, 2, BLOCKS)[:, 0] == count).all()


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_what_all_ranks_give_comes_to_all_in_their_order(count: int) -> None:
    made, room = ranks(3, 1, 32, torch.float32), 5003
    given = [torch.randint(-(2**31), 2**31, (count,), device=DEVICE).int() for _ in range(3)]
    places = [torch.full((3, room), 7, dtype=torch.int32, device=DEVICE) for _ in range(3)]
    table = torch.tensor([place.data_ptr() for place in places], device=DEVICE)
    for reach, numbers in zip(made.reach, given, strict=True):
        gather_rows(reach, table, numbers, room)
    for place in places:
        assert torch.equal(place[:, :count], torch.stack(given)) and (place[:, count:] == 7).all()
    assert [reach.epochs.tolist() for reach in made.reach] == [[1] * BLOCKS] * 3, "it counts as a seam"
    with pytest.raises(ValueError, match="there is room for 2"):
        gather_rows(made.reach[0], table, torch.zeros(3, dtype=torch.int32, device=DEVICE), 2)
    with pytest.raises(TypeError, match="contiguous int32"):
        gather_rows(made.reach[0], table, torch.zeros(3, device=DEVICE), room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_owner_alone_joins_parts_like_the_seam(dtype: torch.dtype) -> None:
    made = ranks(3, 4, 48, dtype)
    weight = torch.randn(48).to(dtype).to(DEVICE)
    kept = torch.randn(4, 48).to(dtype).to(DEVICE)
    parts, own = torch.stack(made.partials), kept.clone()
    hidden, residual = join_parts(parts, own, weight, EPS)
    assert residual is own
    join_rows(made.reach[0], kept, weight, EPS, (0, 4))
    assert torch.equal(hidden, made.outs[1]) and torch.equal(own, kept)
    assert join_parts(parts[:, :0], kept[:0], weight, EPS)[0].shape == (0, 48)
    with pytest.raises(TypeError, match="contiguous floats"):
        join_parts(parts[:, :, :24], torch.zeros(4, 24, dtype=dtype, device=DEVICE), weight[:24], EPS)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"residual": torch.zeros(2, 32)}, "the residual is"),
        ({"weight": torch.ones(32, dtype=torch.bfloat16)}, "must be one float"),
    ],
)
def test_what_cannot_be_joined_is_refused(change: dict[str, Any], error: str) -> None:
    made = ranks(2, 2, 32, torch.float32)
    given = {"residual": torch.zeros(1, 32), "weight": torch.ones(32)} | change
    with pytest.raises((TypeError, ValueError), match=error):
        join_rows(made.reach[0], given["residual"], given["weight"], EPS, (0, 1))
