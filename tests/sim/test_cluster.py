"""Fleets: replicas that fail, phases on replicas of their own, and what a router that knows prefixes is worth."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.bench.stats import Record, Slo
from weft.bench.traces import Row, Size
from weft.core.plan import Lane, Plan, Slice
from weft.errors import ConfigError
from weft.sim import traffic
from weft.sim.replica import Setup
from weft.sim.router import RoundRobin
from weft.sim.run import Transfer
from weft.sim.study import Failure, Fleet, Outcome, study
from weft.sim.transferred import received

Make = Callable[..., Setup]


def served(fleet: Fleet, load: list[Row]) -> tuple[Outcome, list[Record]]:
    records: list[Record] = []
    return study(fleet, load, Slo(1.0, 0.1), on_end=records.append), records


def even(count: int, gap: float, size: Size) -> list[Row]:
    return [(number * gap, size) for number in range(count)]


def test_replicas_share_the_load(setup: Make) -> None:
    load = even(60, 0.01, Size(60, 10))
    one, _ = served(Fleet(setup(), 1), load)
    four, _ = served(Fleet(setup(), 4, "round-robin"), load)
    assert one.totals.completed == four.totals.completed == 60 and one.step_tokens == four.step_tokens
    assert four.totals.ttft.p90 < 0.5 * one.totals.ttft.p90


@settings(max_examples=20, deadline=None)
@given(
    at=st.floats(0.0, 1.0),
    repair=st.floats(0.01, 2.0),
    router=st.sampled_from(["round-robin", "least-loaded", "prefix-aware"]),
)
def test_when_replicas_fail_their_requests_go_on_elsewhere(setup: Make, at: float, repair: float, router: str) -> None:
    load = even(40, 0.02, Size(50, 20, (1, 2, 3), 16))
    outcome, records = served(Fleet(setup(), 3, router, (Failure(at, 2, repair),)), load)
    assert outcome.totals.completed == 40 and [one.output_tokens for one in records] == [20] * 40
    for one in records:
        assert one.first is not None and one.sent < one.first <= one.ended
    least = 40 * (50 + 20 - 1) * (1.0 - outcome.cached)
    assert outcome.step_tokens >= 0.5 * least, "what was lost was computed, too"


def test_tokens_that_a_client_has_are_not_generated_again(setup: Make) -> None:
    """Its first token stays the first, and the second replica computes prompt and tokens anew, as one prompt."""
    load = [(0.0, Size(60, 40))]
    _, (alone,) = served(Fleet(setup(), 2, "round-robin"), load)
    outcome, (one,) = served(Fleet(setup(), 2, "round-robin", (Failure(0.1, 1, 9.0),)), load)
    assert outcome.retried == 1 and one.first == alone.first and one.output_tokens == 40
    first_try = outcome.step_tokens - (60 + 39)
    assert 60 <= first_try < 60 + 39, "the prompt, and the tokens that it had by then, twice"
    assert alone.ended < one.ended < alone.ended + 0.03


@pytest.mark.parametrize("again", [(Failure(2, 1, 3), Failure(4, 1, 8)), (Failure(2, 1, 10), Failure(4, 1, 1))])
def test_a_replica_that_fails_again_while_it_is_gone_is_back_after_both_repairs(
    setup: Make, again: tuple[Failure, ...]
) -> None:
    chosen: list[int] = []

    class Watched(RoundRobin):
        def choose(self, number: int, size: Size) -> int:
            chosen.append(super().choose(number, size))
            return chosen[-1]

    fleet = Fleet(setup(), 2, lambda indices, _: Watched(indices), again)
    outcome, _ = served(fleet, even(40, 0.5, Size(20, 2)))
    assert outcome.retried == 0 and 0 in chosen[:4]
    assert 0 not in chosen[5:24] and 0 in chosen[24:28], "it is back at 12 s"


def test_prefill_and_decode_on_replicas_of_their_own(setup: Make) -> None:
    """TTFT is that of a prefill alone; KV is on its way for as long as the link takes, one prompt after the other; then
    decode steps follow."""
    link = Transfer(bytes_per_token=1000.0, bandwidth=1e6, latency=0.01)
    cost = setup().cost
    outcome, (one, two) = served(Fleet(setup(), 2, prefill=1, transfer=link), [(0.0, Size(60, 5)), (0.0, Size(30, 5))])
    prompt = cost.seconds(Plan(1, Lane.MIXED, (Slice(0, 0, (0,) * 60, ()),)))
    assert one.ttft == pytest.approx(prompt)
    records = sorted((one, two), key=lambda record: -record.input_tokens)
    steps = [cost.seconds(Plan(1, Lane.MIXED, (Slice(0, 60 + n, (0,), ()),))) for n in range(4)]
    assert records[0].ended == pytest.approx(prompt + 0.07 + sum(steps))
    assert records[1].ended >= prompt + 0.07 + 0.04 + sum(steps[:3])
    assert outcome.totals.output_tokens == 10
    # Prompts once on the one, and of the answers' tokens one step each on the other.
    assert outcome.steps >= 1 + 4


def test_the_router_of_the_documentation_is_asked(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
    (tmp_path / "own.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    found = runpy.run_path(str(tmp_path / "own.py"))
    own, other = (found["outcomes"][router].totals for router in (found["LongApart"], "round-robin"))
    assert own.completed == other.completed > 500 and own.ttft.p99 != other.ttft.p99


def test_what_was_transferred_costs_a_decode_step(setup: Make) -> None:
    own, other = setup(), received(setup())
    arrived = Plan(1, Lane.MIXED, (Slice(0, 0, (0,) * 61, ()), Slice(1, 20, (0,), ())))
    decoded = Plan(1, Lane.MIXED, (Slice(0, 60, (0,), ()), Slice(1, 20, (0,), ())))
    assert other.cost.seconds(arrived, 1.0, 0.0) == own.cost.seconds(decoded, 1.0, 0.0)
    assert other.capacity.max_tokens >= other.capacity.max_slices * other.capacity.max_model_len


def test_a_request_of_one_token_needs_no_decode(setup: Make) -> None:
    link = Transfer(1.0, 1.0)
    _, (one,) = served(Fleet(setup(), 2, prefill=1, transfer=link), [(0.0, Size(60, 1))])
    assert one.ended == one.first


def test_a_router_that_knows_prefixes_finds_more_of_them(setup: Make) -> None:
    rng = np.random.default_rng(4)
    sizes = (
        Size(90, 4, (1 + 10 * int(topic), 2 + 10 * int(topic), 3 + 10 * int(topic)), 32)
        for topic in rng.integers(0, 24, 400)
    )
    load = list(islice(traffic.renewal(40.0, 1.0, sizes, rng), 400))
    found = {name: served(Fleet(setup(blocks=48), 4, name), load)[0] for name in ("round-robin", "prefix-aware")}
    assert found["prefix-aware"].cached > 1.5 * found["round-robin"].cached
    assert found["prefix-aware"].step_tokens < found["round-robin"].step_tokens


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"router": "random"}, "--router is 'random'"),
        ({"count": 2, "prefill": 2}, "--prefill-replicas is 2"),
        ({"count": 2, "failures": (Failure(1.0, 2, 1.0),)}, "2 of 2 replicas fail"),
        ({"count": 2, "prefill": 1, "failures": (Failure(1.0, 1, 1.0),)}, "does not go with --fail"),
    ],
)
def test_fleets_that_cannot_be_are_refused(setup: Make, given_: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        study(Fleet(setup(), **given_), [(0.0, Size(1, 1))], Slo())
