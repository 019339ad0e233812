"""What `weft simulate` and `weft plan` share: flags of model, traffic and engine, their checks, and how a run is
shown."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from weft.bench.report import output_problems
from weft.cli.flags import Parser
from weft.config import EngineConfig, disaggregated, parse_partition
from weft.errors import ConfigError
from weft.sim.estimate import KV_BITS
from weft.sim.load import DATASETS, Load, read_rows
from weft.sim.models import model_names

T = TypeVar("T")

# Of a GPU server, where weft serve's own defaults are for a CPU.
SEATS, TOKENS, BLOCK = 256, 2048, 64
# Beyond these a run never ends, or virtual time has too few digits.
RATES, BURSTINESS, SECONDS = (1e-6, 1e6), (0.01, 1e4), 1e9


def read(
    parser: Parser, arguments: Sequence[str], own: Callable[[argparse.Namespace], Sequence[str]]
) -> tuple[argparse.Namespace, Load]:
    """The flags, all of them good, and the load that they name. own: what is wrong with the command's own flags, one
    sentence each. Raises ConfigError with everything that is wrong."""
    given = parser.read(arguments)
    found = [*_problems(given), *own(given)]
    if found:
        raise ConfigError("\n".join(found))
    return given, _load(given)


def add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default="llama-3-8b",
        metavar="NAME|FOLDER",
        help=f"{', '.join(model_names())}, or a folder with a config.json (llama-3-8b)",
    )
    group.add_argument(
        "--weave", action="store_true", help="fuse the seams between ranks, and hide them where that is quicker"
    )


def add_output(group: argparse._ArgumentGroup, written: str) -> None:
    """written: what the JSON has."""
    group.add_argument("--json", type=Path, metavar="FILE", help=f"write {written}")
    group.add_argument("--disable-progress", action="store_true", help="no progress bar")


def add_traffic(parser: argparse.ArgumentParser, seconds: str) -> None:
    """seconds: what is said of the default of --seconds."""
    load = parser.add_argument_group("traffic")
    load.add_argument(
        "--dataset-name",
        choices=DATASETS,
        default="random",
        help="random: lengths as --random-*. trace: a CSV (or .csv.gz) with arrival_s, input_tokens, output_tokens or "
        "with Azure's columns, or Mooncake's .jsonl (or .jsonl.gz), with its shared prefixes. clients: a CSV that has "
        "client_id, too; each client's rate, burstiness and lengths are drawn anew",
    )
    load.add_argument("--dataset-path", type=Path, metavar="FILE", help="of a trace")
    load.add_argument("--seconds", type=float, metavar="S", help=f"of virtual time; a trace is repeated ({seconds})")
    load.add_argument("--trace-length-scale", type=float, default=1.0, metavar="X", help="prompts times X")
    load.add_argument("--trace-output-scale", type=float, metavar="X", help="answers times X (as the prompts)")
    load.add_argument(
        "--trace-copies", type=int, default=1, metavar="N", help="the trace N times at once, shifted against itself (1)"
    )
    load.add_argument("--burstiness", type=float, default=1.0, metavar="B", help="of random: 1 is Poisson (1)")
    load.add_argument("--random-input-len", type=int, default=1024, metavar="N", help="prompt tokens (1024)")
    load.add_argument("--random-output-len", type=int, default=128, metavar="N", help="tokens to generate (128)")
    load.add_argument("--random-range-ratio", type=float, default=0.5, metavar="R", help="lengths within +-R (0.5)")
    load.add_argument(
        "--day-shape",
        type=factors,
        default=(),
        metavar="X,X,...",
        help="factors of the rate, one after the other and round, such as 0.4,1,1.6,1 for a day in four parts",
    )
    load.add_argument("--day-part", type=float, default=3600.0, metavar="S", help="seconds of each factor (3600)")
    load.add_argument("--max-model-len", type=int, metavar="N", help="longest sequence; longer ones are cut to it")
    load.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")


def add_engine(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine, as in weft serve")
    engine.add_argument("--max-num-seqs", type=int, default=SEATS, metavar="N", help=f"most in one step ({SEATS})")
    engine.add_argument(
        "--max-num-batched-tokens", type=int, default=TOKENS, metavar="N", help=f"most tokens in one step ({TOKENS})"
    )
    engine.add_argument("--block-size", type=int, default=BLOCK, metavar="N", help=f"KV slots in one block ({BLOCK})")
    engine.add_argument("--kv-cache-dtype", choices=tuple(KV_BITS), default="auto", help="auto: 16 bits")
    engine.add_argument("--max-num-queued-reqs", type=int, default=1024, metavar="N", help="most that wait (1024)")
    engine.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="default: where a trace names blocks"
    )


def _load(arguments: argparse.Namespace) -> Load:
    """Raises ConfigError."""
    rows, clients = read_rows(arguments.dataset_name, arguments.dataset_path)
    longer = arguments.trace_output_scale
    return Load(
        dataset=arguments.dataset_name,
        rows=rows,
        clients=clients,
        seconds=arguments.seconds,
        copies=arguments.trace_copies,
        input_scale=arguments.trace_length_scale,
        output_scale=arguments.trace_length_scale if longer is None else longer,
        input_len=arguments.random_input_len,
        output_len=arguments.random_output_len,
        range_ratio=arguments.random_range_ratio,
        burstiness=arguments.burstiness,
        shape=arguments.day_shape,
        shape_seconds=arguments.day_part,
        longest=arguments.max_model_len,
        seed=arguments.seed,
        name=arguments.dataset_name if arguments.dataset_path is None else arguments.dataset_path.name,
    )


def config_of(arguments: argparse.Namespace, partition: str, load: Load) -> EngineConfig:
    """The settings that the simulated engines run by. Raises ConfigError that names every bad one."""
    shares = parse_partition(partition)
    moving = shares is not None and shares.policy in ("auto", "paper")  # the others have no use for targets
    caching = arguments.enable_prefix_caching
    config = EngineConfig(
        partition=partition,
        slo_ttft=arguments.slo_ttft if moving else None,
        slo_tpot=arguments.slo_tpot if moving else None,
        max_model_len=arguments.max_model_len,
        block_size=arguments.block_size,
        kv_cache_dtype=arguments.kv_cache_dtype,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_num_queued_reqs=arguments.max_num_queued_reqs,
        enable_prefix_caching=any(size.hashes for _, size in load.rows) if caching is None else caching,
        seed=arguments.seed,
    )
    config.validate()
    return config


def _problems(arguments: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the shared flags, one sentence each."""
    found = []

    def must(name: str, fits: Callable[[Any], bool], what: str) -> None:
        value = getattr(arguments, name)
        if value is not None and not fits(value):
            found.append(f"--{name.replace('_', '-')} is {value}; it must be {what}")

    for name in ("trace_length_scale", "trace_output_scale", "day_part"):
        must(name, lambda value: 0 < value < math.inf, "more than 0")
    must("seconds", lambda value: 0 < value <= SECONDS, f"more than 0 and at most {SECONDS:g}")
    low, high = BURSTINESS
    must("burstiness", lambda value: low <= value <= high, f"between {low:g} and {high:g}")
    for name in ("slo_ttft", "slo_tpot"):
        must(name, lambda value: 0 < value < 86400, "more than 0 and less than 86400 seconds")
    for name in ("trace_copies", "random_input_len", "random_output_len"):
        must(name, lambda value: 1 <= value <= 10**7, "between 1 and 10000000")
    must("max_model_len", lambda value: value >= 2, "at least 2")
    must("random_range_ratio", lambda value: 0 <= value <= 1, "between 0 and 1")
    must("seed", lambda value: value >= 0, "at least 0")
    if arguments.dataset_name != "trace" and arguments.trace_copies > 1:
        found.append(
            f"--trace-copies is {arguments.trace_copies}, and --dataset-name {arguments.dataset_name} is no trace"
        )
    if arguments.dataset_name == "random" and arguments.dataset_path is not None:
        found.append("--dataset-path is of no use without --dataset-name trace or clients")
    return found + output_problems(arguments)


def rate_problem(flag: str, rate: float) -> str | None:
    """What is wrong with a rate, if anything."""
    low, high = RATES
    return None if low <= rate <= high else f"{flag} has {rate:g}; it must be between {low:g} and {high:g}"


def partition_problem(flag: str, text: str) -> str | None:
    """What is wrong with a partition, if anything."""
    try:
        apart = disaggregated(text)
    except ValueError as error:
        return f"{flag} is {text!r}; {error}"
    if apart:
        return f"{flag} is {text!r}; simulated phases on devices of their own are --prefill-replicas of weft simulate"
    return None


def factors(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, none below 0 and not all 0, for argparse."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value < math.inf for value in values) or not any(values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of factors such as 0.5,1,2")
    return values


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags as they were honoured, for the JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, str | int | float | bool | None):
            return value
        return [plain(one) for one in value] if isinstance(value, Sequence) else str(value)

    return {name: plain(value) for name, value in vars(arguments).items()}


def named(flag: str, find: Callable[[str], T], name: str) -> T:
    """What `find` finds; its error names the flag."""
    try:
        return find(name)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error.message}") from error
