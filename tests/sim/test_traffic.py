"""Streams of requests: rates, shapes, and prompts that share what they name alike."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.bench import traces
from weft.bench.traces import Row, Size
from weft.errors import ConfigError
from weft.sim import traffic
from weft.sim.load import Load, read_rows

ROWS: list[Row] = [(10.0, Size(5, 1)), (11.0, Size(6, 2)), (14.0, Size(7, 3))]


def times(stream: traffic.Iterator[Row], count: int) -> list[float]:
    return [at for at, _ in itertools.islice(stream, count)]


def test_a_trace_is_repeated_with_a_mean_gap_between_and_from_any_place() -> None:
    assert traffic.period(ROWS) == 6.0
    assert times(traffic.repeated(ROWS), 7) == [0.0, 1.0, 4.0, 6.0, 7.0, 10.0, 12.0]
    assert times(traffic.repeated(ROWS, 3.5), 4) == [0.5, 2.5, 3.5, 6.5]
    assert times(traffic.faster(traffic.repeated(ROWS), 2.0), 3) == [0.0, 0.5, 2.0]
    assert [size.input for _, size in traffic.every(iter(ROWS), 2)] == [5, 7]
    assert times(traffic.until(traffic.repeated(ROWS), 4.0), 9) == [0.0, 1.0]


def test_copies_are_as_many_requests_at_other_times() -> None:
    rng = np.random.default_rng(1)
    found = list(traffic.until(traffic.copies(ROWS, 50, rng), 60.0))
    assert [at for at, _ in found] == sorted(at for at, _ in found)
    assert len(found) == pytest.approx(50 * 60 * 3 / 6.0, rel=0.05)
    assert len({round(at % 6.0, 6) for at, _ in found}) > 100


def test_copies_share_prompts_with_themselves_only() -> None:
    rows = [(0.0, Size(40, 2, (7, 8), 16)), (1.0, Size(40, 2, (7, 9), 16)), (2.0, Size(40, 2))]
    found = [size for _, size in traffic.until(traffic.copies(rows, 5, np.random.default_rng(1)), 3.0)]
    names = [size.hashes for size in found if size.hashes]
    assert len(names) == 10 and all(first % 5 == last % 5 for first, last in names), "copy k has names of its own"
    assert Counter(first for first, _ in names) == {7 * 5 + copy: 2 for copy in range(5)}
    assert sum(not size.hashes for size in found) == 5


def test_lengths_are_scaled_and_cut_to_the_context() -> None:
    (row,) = traffic.resized([(0.0, Size(1024, 10, (1, 2), 512))], 0.5, 2.0)
    assert row == (0.0, Size(512, 20, (1, 2), 256))
    cut = [size for _, size in traffic.clipped([(0.0, Size(9, 5)), (1.0, Size(3, 9)), (2.0, Size(2, 2))], 6)]
    assert cut == [Size(5, 1), Size(3, 3), Size(2, 2)]


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 4.0]), min_size=1, max_size=5).filter(any), st.integers(1, 50))
def test_a_shaped_rate_is_its_factor_in_every_part(shape: list[float], length: int) -> None:
    even = ((0.5 + number, Size(1, 1)) for number in itertools.count())
    span = length * len(shape) * 2
    found = times(traffic.until(traffic.shaped(even, shape, float(length)), span), 10**6)
    counts = np.bincount([int(at / length) for at in found], minlength=2 * len(shape))
    for count, factor in zip(counts, [*shape, *shape], strict=True):
        assert abs(count - factor * length) <= 2


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(burstiness: float) -> None:
    rng = np.random.default_rng(2)
    rows = list(itertools.islice(traffic.renewal(8.0, burstiness, traffic.uniform(100, 10, 0.5, rng), rng), 20_000))
    gaps = np.diff([at for at, _ in rows])
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.08)
    assert traffic.burstiness(rows) == pytest.approx(burstiness, rel=0.15)
    assert {size.input for _, size in rows} == set(range(50, 151)) and {size.output for _, size in rows} >= {5, 15}


def test_clients_keep_their_parts_their_lengths_and_their_bursts(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    steady = [(float(second), 7, 1, "a") for second in range(300)]
    bursts = [(float(10 * burst + step / 100), 900, 2, "b") for burst in range(20) for step in range(5)]
    lines = "".join(f"{at},{read},{written},{name}\n" for at, read, written, name in sorted(steady + bursts))
    path = tmp_path / "clients.csv"
    path.write_text("arrival_s,input_tokens,output_tokens,client_id\n" + lines)
    each = traces.read_clients(path)
    assert sorted(map(len, each)) == [100, 300]
    rows = list(traffic.until(traffic.clients(each, 8.0, rng), 2000.0))
    assert [at for at, _ in rows] == sorted(at for at, _ in rows)
    parts = {read: [row for row in rows if row[1].input == read] for read in (7, 900)}
    assert len(parts[7]) / 2000 == pytest.approx(6.0, rel=0.05)
    assert len(parts[900]) / 2000 == pytest.approx(2.0, rel=0.3)
    assert traffic.burstiness(parts[900]) < 0.5 < 20 < traffic.burstiness(parts[7])
    (tmp_path / "plain.csv").write_text("arrival_s,input_tokens,output_tokens\n1,2,3\n")
    with pytest.raises(ConfigError, match="client_id"):
        traces.read_clients(tmp_path / "plain.csv")


def test_azures_own_columns_are_read_from_0_on(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    lines = "2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.4799600,5,6\n"
    path.write_text("\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\r\n" + lines)
    (first, second) = traces.read_trace(path)
    assert first == (0.0, Size(374, 44)) and second == (pytest.approx(0.5), Size(5, 6))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    with pytest.raises(ConfigError, match="line 2"):
        traces.read_trace(path)


def test_prompts_are_alike_where_their_blocks_are_named_alike_and_nowhere_else() -> None:
    first, second = traffic.prompt(Size(10, 1, (3, 4), 4), 0), traffic.prompt(Size(8, 1, (3, 5), 4), 1)
    plain, other = traffic.prompt(Size(4, 1), 0), traffic.prompt(Size(4, 1), 1)
    assert len(first) == 10 and first[:4] == second[:4] and not set(first[4:]) & set(second[4:])
    assert len(plain) == 4 and not set(plain) & set(other) and not set(plain) & set(first[:8])
    assert 0 not in {*first, *second, *plain, *other}, "what the device draws is no prompt"


def test_a_load_is_the_same_each_time_and_says_what_it_is() -> None:
    load = Load(
        dataset="trace", rows=tuple(ROWS), seconds=60.0, copies=3, shape=(1.0, 2.0), shape_seconds=5.0, name="t"
    )
    assert list(load.stream(2.0)) == list(load.stream(2.0)) and max(at for at, _ in load.stream(2.0)) < 60.0
    assert "3 copies" in load.words(2.0)
    repeated = Load(dataset="trace", rows=tuple(ROWS), seconds=60.0, name="t")
    assert repeated.words(1.0) == "t, 1 times its rate for 60 s, repeated 10.00 times"
    assert Load(dataset="trace", rows=tuple(ROWS)).length(2.0) == 3.0
    with pytest.raises(ConfigError, match="needs --dataset-path"):
        read_rows("clients", None)
