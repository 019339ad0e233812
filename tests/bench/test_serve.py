"""`weft bench serve` from its flags to its table, JSON and picture."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from weft.bench import plot, serve
from weft.bench.stats import Record, summarise
from weft.errors import ConfigError, WeftError

Start = Callable[..., Awaitable[Any]]


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


async def run(fake: Any, *arguments: str) -> int:
    """The command runs an event loop of its own, so it runs in a thread of its own."""
    return await asyncio.to_thread(serve.run, flags("--url", fake.url, *arguments))


async def test_a_run_writes_its_table_json_and_picture(
    start_server: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = await start_server()
    report, picture = tmp_path / "out.json", tmp_path / "out.png"
    code = await run(
        fake,
        *("--num-prompts", "6", "--request-rate", "200", "--random-input-len", "5", "--random-output-len", "3"),
        *("--slo-ttft", "60000", "--slo-tpot", "60000", "--json", str(report), "--plot", str(picture)),
        *("--num-warmups", "2", "--ignore-eos", "--extra-body", '{"top_k": 1}', "--api-key", "secret"),
    )
    assert code == 0
    assert len(fake.bodies) == 8
    assert all(body["ignore_eos"] and body["top_k"] == 1 and len(body["prompt"]) == 5 for body in fake.bodies)
    written = report.read_text()
    content = json.loads(written)
    assert "secret" not in written
    assert content["settings"]["model"] == "fake" and content["settings"]["seed"] == 0
    assert len(content["requests"]) == content["summary"]["completed"] == 6
    assert content["summary"]["output_tokens"] == 18 and content["summary"]["attainment"] == 1.0
    assert "gaps" not in content["requests"][0]
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for word in ("TTFT", "TPOT", "ITL", "E2E", "p50", "p90", "p99", "goodput (TTFT <= 60000 ms, TPOT <= 60000 ms)"):
        assert word in printed


async def test_a_run_whose_files_could_not_be_written_does_not_begin(start_server: Start, tmp_path: Path) -> None:
    fake = await start_server()
    with pytest.raises(ConfigError) as refused:
        await run(fake, "--json", str(tmp_path / "none" / "out.json"), "--plot", str(tmp_path))
    assert refused.value.message.splitlines() == [
        f"--json is {tmp_path}/none/out.json; there is no folder {tmp_path}/none",
        f"--plot is {tmp_path}, a folder; give a file",
    ]
    assert not fake.bodies


async def test_failures_are_reported_with_their_number(start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    async def refuse(exchange: Any) -> None:
        await exchange.reply(429, {"error": {"message": "queue is full"}})

    code = await run(await start_server(refuse), "--num-prompts", "3", "--num-warmups", "0")
    assert code == 1
    assert "failed, 3 times: HTTP 429: queue is full" in capsys.readouterr().out


async def test_a_failed_warm_up_ends_the_run_with_the_servers_words(start_server: Start) -> None:
    async def refuse(exchange: Any) -> None:
        await exchange.reply(400, {"error": {"message": "no such model"}})

    with pytest.raises(WeftError, match="warm-up request failed: HTTP 400: no such model"):
        await run(await start_server(refuse))


async def test_chat_sends_words(start_server: Start) -> None:
    fake = await start_server()
    arguments = ("--endpoint", "chat", "--num-prompts", "2", "--num-warmups", "0", "--random-input-len", "7")
    assert await run(fake, *arguments, "--random-output-len", "2") == 0
    assert all(len(body["messages"][0]["content"].split()) == 7 for body in fake.bodies)


def test_a_seed_fixes_the_run() -> None:
    arguments = ("--num-prompts", "20", "--request-rate", "3", "--burstiness", "0.5", "--random-range-ratio", "0.5")
    first, second, other = (serve.plan_shots(flags(*arguments, "--seed", seed))[0] for seed in ("1", "1", "2"))
    assert first == second != other


def test_a_trace_drives_arrivals_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n10,8,40\n12,600,2\n")
    planned, notes = serve.plan_shots(
        flags(
            *("--dataset-name", "trace", "--dataset-path", str(path), "--num-prompts", "5"),
            *("--trace-rate-scale", "2", "--max-input-len", "100"),
        )
    )
    assert [(shot.due, shot.input_tokens, shot.output_tokens) for shot in planned] == [(0.0, 8, 40), (1.0, 100, 2)]
    assert len(notes) == 2 and "2 rows" in notes[0] and "1 of 2" in notes[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--request-rate", "-1"], "--request-rate is -1.0"),
        (["--request-rate", "nan"], "--request-rate is nan"),
        (["--burstiness", "inf"], "--burstiness is inf"),
        (["--random-range-ratio", "2"], "--random-range-ratio is 2.0"),
        (["--random-vocab-size", "3"], "--random-vocab-size is 3"),
        (["--dataset-name", "trace"], "needs --dataset-path"),
        (["--dataset-path", "x"], "of no use"),
        (["--endpoint", "chat", "--prompt-format", "ids"], "takes texts"),
        (["--extra-body", "[]", "--model", "m"], "must be a JSON object"),
        (["--extra-body", "{", "--model", "m"], "is not JSON"),
        (["--url", "ftp://x"], "--url is"),
    ],
)
def test_flags_that_cannot_be_honoured_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        serve.run(flags(*arguments))


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        serve.run(flags("--num-prompts", "0", "--timeout", "0"))
    assert "--num-prompts" in caught.value.message and "--timeout" in caught.value.message


def test_without_matplotlib_the_plot_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'weft\[plot\]'"):
        serve.run(flags("--plot", "x.png"))


def test_a_picture_of_nothing_but_failures_can_be_drawn(tmp_path: Path) -> None:
    records = [Record(0.0, 0.0, None, None, 1.0, 1, 0, (), "broken")]
    plot.plot(records, "title", tmp_path / "x.svg")
    assert summarise(records).failed == 1
    with pytest.raises(ConfigError, match="--plot"):
        plot.plot(records, "title", tmp_path / "x.nonsense")
