"""`weft bench serve`: drive an OpenAI-compatible server with a load and report its latencies."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from weft.bench import traffic
from weft.bench.client import Target, first_model
from weft.bench.load import run_load
from weft.bench.plot import plot, require_picture
from weft.bench.report import as_json, output_problems, print_report, write_json
from weft.bench.stats import Record, Slo, summarise
from weft.bench.traces import Size, clip, read_trace, scale_trace
from weft.bench.traffic import Shot
from weft.bench.wire import parse_url
from weft.errors import ConfigError, WeftError
from weft.progress import Bar

SECRETS = ("api_key",)
KEY_VARIABLE = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; names as `vllm bench serve` has them, where it has them."""
    server = parser.add_argument_group("server")
    server.add_argument("--url", "--base-url", default="http://127.0.0.1:8000", help="with or without /v1")
    server.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    server.add_argument("--api-key", metavar="KEY", help=f"default: the variable {KEY_VARIABLE}")
    server.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    server.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for one request (600)")
    _add_load(parser.add_argument_group("load"))
    _add_prompts(parser.add_argument_group("prompts"))
    _add_output(parser.add_argument_group("output"))


def _add_load(load: Any) -> None:
    load.add_argument("--num-prompts", type=int, default=100, metavar="N", help="requests to send (100)")
    load.add_argument("--request-rate", type=float, default=math.inf, metavar="R", help="requests/s (inf: all at once)")
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of the gamma-distributed gaps: 1 is Poisson, less is burstier (1)",
    )
    load.add_argument(
        "--max-concurrency", type=int, metavar="N", help="most requests under way; with rate inf: the closed loop"
    )
    load.add_argument("--num-warmups", type=int, default=2, metavar="N", help="requests sent before, not counted (2)")
    load.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts (0)")


def _add_prompts(prompts: Any) -> None:
    prompts.add_argument(
        "--dataset-name",
        choices=("random", "trace", "custom"),
        default="random",
        help="random: lengths as --random-*. trace: arrivals and lengths of a CSV (or .csv.gz) with the columns "
        "arrival_s, input_tokens, output_tokens, or of Mooncake's .jsonl (or .jsonl.gz), with its shared prefixes. "
        'custom: JSON lines {"prompt": ..., "output_tokens": ...}',
    )
    prompts.add_argument("--dataset-path", type=Path, metavar="FILE", help="of a trace or of custom prompts")
    prompts.add_argument("--random-input-len", type=int, default=128, metavar="N", help="prompt tokens (128)")
    prompts.add_argument("--random-output-len", type=int, default=128, metavar="N", help="tokens to generate (128)")
    prompts.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths within +-R of the mean (0)"
    )
    prompts.add_argument(
        "--random-prefix-len", type=int, default=0, metavar="N", help="tokens that every prompt begins with (0)"
    )
    prompts.add_argument(
        "--prompt-format",
        choices=("ids", "text"),
        help="ids: exact token ids, completions only; text: words. Default: ids for completions, text for chat",
    )
    prompts.add_argument(
        "--random-vocab-size", type=int, default=1000, metavar="N", help="token ids are drawn from [16, N) (1000)"
    )
    prompts.add_argument("--trace-rate-scale", type=float, default=1.0, metavar="X", help="arrivals X times as fast")
    prompts.add_argument("--trace-length-scale", type=float, default=1.0, metavar="X", help="lengths times X")
    prompts.add_argument("--max-input-len", type=int, metavar="N", help="cut longer prompts of a trace")
    prompts.add_argument("--max-output-len", type=int, metavar="N", help="cut longer outputs of a trace")
    prompts.add_argument("--ignore-eos", action="store_true", help="generate to the full length (not in OpenAI's API)")
    prompts.add_argument("--temperature", type=float, default=0.0, help="(0: greedy)")
    prompts.add_argument("--extra-body", metavar="JSON", help="further fields for every request")


def _add_output(output: Any) -> None:
    output.add_argument("--slo-ttft", type=float, metavar="MS", help="goodput counts requests within these targets")
    output.add_argument("--slo-tpot", type=float, metavar="MS")
    output.add_argument("--json", type=Path, metavar="FILE", help="write settings, summary and one row a request")
    output.add_argument("--json-gaps", action="store_true", help="with every request's gaps between tokens")
    output.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    output.add_argument("--disable-progress", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; 0 when a request completed. Raises ConfigError for what cannot be honoured."""
    problems = _problems(arguments)
    if problems:
        raise ConfigError("\n".join(problems))
    if arguments.plot is not None:
        require_picture(arguments.plot)
    planned, notes = plan_shots(arguments)
    slo = _slo(arguments)
    records, target = asyncio.run(_measure(arguments, planned))
    summary = summarise(records, slo)
    console = Console()
    for note in notes:
        console.print(note, markup=False, highlight=False)
    print_report(summary, slo, console, open_loop=any(shot.due > 0 for shot in planned))
    if arguments.json is not None:
        write_json(arguments.json, as_json(_settings(arguments, target), summary, records, arguments.json_gaps))
    if arguments.plot is not None:
        plot(
            records,
            f"{target.model}: {summary.completed} requests, {summary.output_throughput:.0f} tokens/s",
            arguments.plot,
        )
    return 0 if summary.completed else 1


def plan_shots(arguments: argparse.Namespace) -> tuple[list[Shot], list[str]]:
    """Every request of the run, fixed by the seed, and notes for the report."""
    rng = np.random.default_rng(arguments.seed)
    count = arguments.num_prompts
    notes: list[str] = []
    due = traffic.arrivals(count, arguments.request_rate, arguments.burstiness, rng)
    if arguments.dataset_name == "custom":
        made = traffic.read_prompts(arguments.dataset_path, arguments.random_output_len)
        if arguments.endpoint == "chat" and any(not isinstance(shot.prompt, str) for shot in made):
            raise ConfigError(f"{arguments.dataset_path} has prompts of token ids; --endpoint chat takes texts only")
        return traffic.at_times(made, due), notes
    if arguments.dataset_name == "trace":
        due, sizes = scale_trace(
            read_trace(arguments.dataset_path), count, arguments.trace_rate_scale, arguments.trace_length_scale
        )
        if len(due) < count:
            notes.append(f"the trace has {len(due)} rows, fewer than --num-prompts {count}")
        sizes, cut = clip(sizes, arguments.max_input_len, arguments.max_output_len)
        if cut:
            notes.append(f"{cut} of {len(sizes)} requests were cut to --max-input-len or --max-output-len")
    else:
        sizes = traffic.random_sizes(
            count, arguments.random_input_len, arguments.random_output_len, arguments.random_range_ratio, rng
        )
    vocabulary = arguments.random_vocab_size if _prompt_format(arguments) == "ids" else None
    return traffic.shots(due, sizes, vocabulary, arguments.random_prefix_len, rng), notes


async def _measure(arguments: argparse.Namespace, planned: Sequence[Shot]) -> tuple[list[Record], Target]:
    """Warm up, then run. Raises WeftError when a warm-up request fails: the load would fail in the same way."""
    address = parse_url(arguments.url)
    key = arguments.api_key or os.environ.get(KEY_VARIABLE)
    model = arguments.model or await first_model(address, key)
    extra = {"temperature": arguments.temperature, **({"ignore_eos": True} if arguments.ignore_eos else {})}
    extra |= _extra_body(arguments.extra_body)
    target = Target(address, model, arguments.endpoint == "chat", key, arguments.timeout, extra)
    warm = _warm_ups(arguments, planned)
    for record in await run_load(target, warm, 1, lambda _: None):
        if record.error is not None:
            raise WeftError(f"a warm-up request failed: {record.error}")
    ended = tokens = failed = 0
    with Bar(len(planned), not arguments.disable_progress) as bar:

        def show(record: Record) -> None:
            nonlocal ended, tokens, failed
            ended, tokens, failed = ended + 1, tokens + record.output_tokens, failed + (record.error is not None)
            bar.show(ended, f"{ended}/{len(planned)} {tokens} tokens, {failed} failed")

        return await run_load(target, planned, arguments.max_concurrency, show), target


def _warm_ups(arguments: argparse.Namespace, planned: Sequence[Shot]) -> list[Shot]:
    """Requests of the sizes to come, but with other random prompts, so that they warm no prefix cache."""
    if arguments.dataset_name == "custom":
        return traffic.at_times(planned, [0.0] * arguments.num_warmups)
    sizes = [Size(shot.input_tokens, shot.output_tokens) for shot in planned]
    chosen = [sizes[i % len(sizes)] for i in range(arguments.num_warmups)]
    rng = np.random.default_rng([arguments.seed, 1])
    vocabulary = arguments.random_vocab_size if _prompt_format(arguments) == "ids" else None
    return traffic.shots([0.0] * len(chosen), chosen, vocabulary, 0, rng)


def _problems(arguments: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the flags, one sentence each."""
    found = []

    def check(name: str, fits: Callable[[Any], bool], what: str) -> None:
        value = getattr(arguments, name)
        if value is not None and not fits(value):
            found.append(f"--{name.replace('_', '-')} is {value}; it must be {what}")

    for name in ("num_prompts", "max_concurrency", "random_input_len", "random_output_len"):
        check(name, lambda value: 1 <= value <= 10**7, "between 1 and 10000000")
    for name in ("max_input_len", "max_output_len"):
        check(name, lambda value: value >= 1, "at least 1")
    for name in ("num_warmups", "random_prefix_len", "seed"):
        check(name, lambda value: value >= 0, "at least 0")
    check("request_rate", lambda value: value > 0, "more than 0, or inf")
    for name in ("burstiness", "trace_rate_scale", "trace_length_scale", "timeout", "slo_ttft", "slo_tpot"):
        check(name, lambda value: 0 < value < math.inf, "more than 0")
    check("random_range_ratio", lambda value: 0 <= value <= 1, "between 0 and 1")
    check("random_vocab_size", lambda value: value > traffic.FIRST_TOKEN_ID, f"more than {traffic.FIRST_TOKEN_ID}")
    if arguments.dataset_name != "random" and arguments.dataset_path is None:
        found.append(f"--dataset-name {arguments.dataset_name} needs --dataset-path FILE")
    if arguments.dataset_name == "random" and arguments.dataset_path is not None:
        found.append("--dataset-path is of no use without --dataset-name trace or custom")
    if arguments.endpoint == "chat" and arguments.prompt_format == "ids":
        found.append("--prompt-format ids does not go with --endpoint chat, which takes texts")
    return found + output_problems(arguments)


def _prompt_format(arguments: argparse.Namespace) -> str:
    default = "text" if arguments.endpoint == "chat" else "ids"
    return str(arguments.prompt_format or default)


def _slo(arguments: argparse.Namespace) -> Slo | None:
    targets = [None if value is None else value / 1000 for value in (arguments.slo_ttft, arguments.slo_tpot)]
    return None if targets == [None, None] else Slo(*targets)


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        fields: Any = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--extra-body is {text}; it must be a JSON object")
    return fields


def _settings(arguments: argparse.Namespace, target: Target) -> dict[str, Any]:
    """The flags as they were honoured, without secrets."""
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in SECRETS
    }
    return plain | {"model": target.model, "prompt_format": _prompt_format(arguments)}
