"""Traces: what is read, scaled and cut; prompts that began alike begin alike."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from weft.bench import traces
from weft.bench.traces import Size
from weft.bench.traffic import shots
from weft.errors import ConfigError


@pytest.mark.parametrize("compressed", [False, True])
def test_a_trace_is_read_sorted_and_scaled(tmp_path: Path, compressed: bool) -> None:
    text = "client,arrival_s,input_tokens,output_tokens\na,3.0,100,9\nb,1.0,7,0\nc,11.0,1,50\n"
    path = tmp_path / ("trace.csv.gz" if compressed else "trace.csv")
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    rows = traces.read_trace(path)
    assert rows == [(1.0, Size(7, 0)), (3.0, Size(100, 9)), (11.0, Size(1, 50))]
    due, sizes = traces.scale_trace(rows, 2, 4.0, 0.5)
    assert due == [0.0, 0.5]
    assert sizes == [Size(4, 1), Size(50, 4)]
    assert traces.clip(sizes, 10, None) == ([Size(4, 1), Size(10, 4)], 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrival_s,input_tokens\n1,2\n", "no output_tokens"),
        ("", "must name the columns"),
        ("arrival_s,input_tokens,output_tokens\n", "no rows"),
        ("arrival_s,input_tokens,output_tokens\n1,2,3\n1,x,3\n", "line 3"),
        ("arrival_s,input_tokens,output_tokens\n1,2\n", "line 2"),
        ("arrival_s,input_tokens,output_tokens\nnan,2,3\n", "line 2"),
        ("arrival_s,input_tokens,output_tokens\n1,-2,3\n", "negative"),
        ("arrival_s,input_tokens,output_tokens\n1e308,2,3\n", r"line 2: the arrival is 1e\+308 s; it must be at most"),
        ("arrival_s,input_tokens,output_tokens\n1,99999999999,3\n", "more than"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        traces.read_trace(path)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8bno")
    for name in ("absent.csv", "broken.gz"):
        with pytest.raises(ConfigError, match=name):
            traces.read_trace(tmp_path / name)


def mooncake(path: Path, rows: list[tuple[int, int, int, list[int]]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    lines = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_prompts_of_a_mooncake_trace_share_the_blocks_that_they_name_alike(tmp_path: Path, name: str) -> None:
    rows = [(0, 1300, 5, [0, 1, 2]), (1000, 1100, 0, [0, 1, 7]), (2000, 600, 9, [3, 1])]
    read = traces.read_trace(mooncake(tmp_path / name, rows))
    assert [arrival for arrival, _ in read] == [0.0, 1.0, 2.0]
    assert [(size.input, size.output) for _, size in read] == [(1300, 5), (1100, 0), (600, 9)]
    due, sizes = traces.scale_trace(read, 3, 2.0, 0.25)
    assert due == [0.0, 0.5, 1.0] and [size.input for size in sizes] == [325, 275, 150]
    for vocabulary in (1000, None):
        made = shots(due, sizes, vocabulary, 0, np.random.default_rng(3))
        assert made == shots(due, sizes, vocabulary, 0, np.random.default_rng(3))
        first, second, third = (one.prompt.split() if isinstance(one.prompt, str) else one.prompt for one in made)
        assert [len(first), len(second), len(third)] == [325, 275, 150]
        assert first[:256] == second[:256] and first[256:275] != second[256:275]
        assert third[:128] != first[:128], "the same name further back is no common prefix, but the same tokens"
        assert third[128:150] == first[128:150]


def test_arrivals_that_were_rounded_to_one_time_are_spread_up_to_the_next(tmp_path: Path) -> None:
    rows = [(0, 10, 1, [0])] * 40 + [(3000, 10, 1, [0])] + [(6000, 10, 1, [0])] * 5
    path = mooncake(tmp_path / "trace.jsonl", rows)
    when = [arrival for arrival, _ in traces.read_trace(path)]
    assert when == sorted(when) == [arrival for arrival, _ in traces.read_trace(path)]
    assert len(set(when[:40])) == 40 and when[0] >= 0 and when[39] < 3.0
    assert when[40] == 3.0 and when[41:] == [6.0] * 5, "after the last time there is none to spread up to"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}', "no 'hash_ids'"),
        ('{"timestamp": "x", "input_length": 1, "output_length": 1, "hash_ids": []}', "line 2"),
        ('{"timestamp": 1, "input_length": -1, "output_length": 1, "hash_ids": []}', "negative"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1.5]}', "whole numbers"),
        (
            '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 4}',
            "line 2: hash_ids must be .* not 4",
        ),
    ],
)
def test_a_broken_mooncake_trace_is_refused_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = mooncake(tmp_path / "trace.jsonl", [(0, 10, 1, [0])])
    path.write_text(path.read_text() + line)
    with pytest.raises(ConfigError, match=words):
        traces.read_trace(path)


def test_a_part_of_a_trace_begins_at_0_and_one_without_requests_is_refused() -> None:
    rows = [(float(second), Size(1, 1)) for second in range(10)]
    assert [arrival for arrival, _ in traces.between(rows, 4.0, 7.0)] == [0.0, 1.0, 2.0]
    with pytest.raises(ConfigError, match="between 20 and 30 s"):
        traces.between(rows, 20.0, 30.0)
