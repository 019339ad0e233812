"""Every setting of weft, as frozen dataclasses. The command-line flags, the WEFT_* variables and the YAML keys come
from the fields (cli/flags.py), so a setting is added here and nowhere else.

Names are vLLM's where vLLM has one. A value that is derived from a setting lives elsewhere: nothing writes back here.
"""

from __future__ import annotations

import re
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weft.errors import ConfigError

BUILTIN_MODEL = "builtin"
MAX_CORE = 4095
MAX_NAME = 256  # characters by which a request may name the model
MAX_RANKS = 64
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")  # as browsers send it: without a path


def setting(default: Any = None, *, help: str, **metadata: Any) -> Any:  # a dataclass field takes the annotated type
    """A field with its help text. metadata: choices, metavar, positional, secret, unit ("bytes": 512MiB is understood),
    parse (checks a text that has a form of its own; raises ValueError with the reason), short (another name of the
    flag, with one dash)."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, slots=True)
class Shares:
    """What --partition asks for: two lanes. policy: "fixed", "turns", "pd", "paper" or "auto".

    prefill, decode: shares to begin with, in parts of `whole`; they may add up to more than that (lanes that overlap).
    "turns": parts of the time instead, of the whole device.
    """

    policy: str
    prefill: int
    decode: int
    whole: int

    def of(self, units: int) -> tuple[int, int]:
        """(prefill, decode) in units of a device that has so many; at least one each. Raises ValueError when lanes that
        do not overlap cannot have one each."""
        if self.policy == "turns":
            return units, units
        wanted = [round(units * part / self.whole) for part in (self.prefill, self.decode)]
        if self.prefill + self.decode > self.whole:
            return max(1, wanted[0]), max(1, wanted[1])
        if units < 2:
            raise ValueError("two lanes that do not overlap need two")
        prefill = min(units - 1, max(1, wanted[0]))
        rest = units - prefill
        return prefill, rest if self.prefill + self.decode == self.whole else min(rest, max(1, wanted[1]))


def parse_partition(text: str) -> Shares | None:
    """The lanes of --partition; None for 'off': one mixed lane. Raises ValueError."""
    if text == "off":
        return None
    if text in ("auto", "paper"):
        return Shares(text, 100, 100, 100)
    policy, found, numbers = text.partition(":")
    if policy in ("turns", "pd") and found:
        text = numbers
    else:
        policy = "fixed"
    prefill, _, decode = text.partition(":")
    if policy == "fixed" and text.count("%") == 2 and prefill[-1:] == decode[-1:] == "%":
        prefill, decode, whole = prefill[:-1], decode[:-1], 100
    else:
        whole = 0
    if not (prefill.isdecimal() and decode.isdecimal() and int(prefill) > 0 and int(decode) > 0):
        raise ValueError(
            "it must be off, auto, paper, two positive numbers P:D such as 1:1, turns:P:D, pd:P:D, or two percentages "
            "such as 80%:100%"
        )
    if whole and max(int(prefill), int(decode)) > whole:
        raise ValueError("a lane cannot have more than 100% of the device")
    return Shares(policy, int(prefill), int(decode), whole or int(prefill) + int(decode))


def disaggregated(partition: str) -> bool:
    """Whether --partition asks for phases with weights and KV pools of their own. Raises ValueError."""
    shares = parse_partition(partition)
    return shares is not None and shares.policy == "pd"


def parse_cores(text: str) -> tuple[int, ...]:
    """The core numbers of a list such as 0-3,8, in order and without repetition. Raises ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isdecimal() and int(end) <= MAX_CORE for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError(f"{part!r} is not a core number up to {MAX_CORE} or a range of them, such as 0-3,8")
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(found))


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of an address such as 10.0.0.1:29500. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("it must be a host and a port, such as 10.0.0.1:29500")
    return host.strip("[]"), int(port)


def parse_meeting_address(text: str) -> tuple[str, int]:
    """Host and port of an address that other hosts shall call. Raises ValueError."""
    host, port = parse_address(text)
    if host in ("0.0.0.0", "::"):
        raise ValueError(f"no host can be called at {host}; it must be host 0's own address, such as 10.0.0.1:29500")
    return host, port


def parse_ray_address(text: str) -> str:
    """The address of a Ray cluster that runs already, as Ray takes it. Raises ValueError, also for one that Ray would
    start (local), or would reach through a proxy (ray://): the engine must be on a node of the cluster."""
    try:
        if text != "auto" and "/" in text:
            raise ValueError
        if text != "auto":
            parse_address(text)
    except ValueError:
        raise ValueError("it must be auto, or host and port of a cluster that runs, such as 10.0.0.1:6379") from None
    return text


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs to know."""

    model: str = setting(
        BUILTIN_MODEL,
        help="a Hugging Face folder, a hub id, or 'builtin' for the model in the package",
        positional=True,
    )
    revision: str | None = setting(None, help="branch, tag or commit of a hub id")
    device: str = setting(
        "auto", help="what executes the model; auto is cpu", choices=("auto", "cpu", "cuda", "simulated")
    )
    dtype: str = setting(
        "auto",
        help="precision of weights and activations; auto takes the checkpoint's",
        choices=("auto", "float32", "bfloat16"),
    )
    load_format: str = setting(
        "auto", help="dummy draws random weights of the config's shapes", choices=("auto", "safetensors", "dummy")
    )
    max_model_len: int | None = setting(
        None, help="longest sequence in tokens, prompt and output; default: the model's own"
    )
    block_size: int = setting(16, help="KV slots in one block", choices=(16, 32, 64, 128))
    kv_cache_memory_bytes: int | None = setting(
        None,
        help="memory for the KV pool (of each rank), such as 2GiB; default: what max_num_seqs sequences of full length "
        "need, within a quarter of free memory",
        unit="bytes",
    )
    kv_cache_dtype: str = setting(
        "auto",
        help="precision of keys and values; auto takes the activations', int4 holds 3.6 times as many tokens as bf16",
        choices=("auto", "bf16", "int8", "int4"),
    )
    num_blocks: int | None = setting(None, help="KV blocks in the pool; overrides kv_cache_memory_bytes")
    max_num_seqs: int = setting(64, help="most sequences in one step")
    max_num_batched_tokens: int = setting(512, help="most tokens in one step; a longer prompt is prefilled in chunks")
    enable_prefix_caching: bool = setting(True, help="reuse the KV of prompt prefixes seen before")
    partition: str = setting(
        "off",
        help="off: one mixed lane. P:D: prefill and decode lanes side by side on P and D parts of the device. P%:D%: "
        "on shares that may overlap. turns:P:D: one after the other, on P and D parts of the time. pd:P:D: as P:D, but "
        "each with weights and a KV pool of its own, for comparison. auto: whatever meets the targets of --slo-ttft "
        "and --slo-tpot best. paper: semi-PD's controller",
        metavar="off|P:D|P%:D%|turns:P:D|pd:P:D|auto|paper",
        parse=parse_partition,
    )
    slo_ttft: float | None = setting(
        None, help="seconds that a first token may take, for --partition auto and paper (0.5 if not given)"
    )
    slo_tpot: float | None = setting(
        None, help="seconds that each later token may take, for --partition auto and paper (0.1 if not given)"
    )
    partition_record: str | None = setting(
        None,
        help="file for what --partition auto or paper sees and decides, one JSON line each, up to 256 MiB; weft doctor "
        "--phases reads it",
        metavar="FILE",
    )
    tensor_parallel_size: int = setting(
        1, help="ranks that share the work of every layer, each a process with its part of the weights", short="-tp"
    )
    weave: str = setting(
        "auto",
        help="how ranks are joined between two stages of a layer: plain (all-reduce, then every rank normalises "
        "everything), one-shot (likewise, with all partial sums sent to all), fused (each rank sums and normalises its "
        "part), woven (fused, in two or three strands of which one computes while others are joined), rejoined (woven, "
        "but for the experts of a mixture, which are computed once for all strands); auto: what was fastest at "
        "start-up, step by step",
        choices=("auto", "plain", "one-shot", "fused", "woven", "rejoined"),
    )
    collective: str = setting(
        "auto",
        help="what ranks exchange rows through; on CPUs shm (shared memory, auto's choice where the C++ extension is "
        "there) or gloo (TCP: by the C++ extension for fused and woven steps, else by the library of that name), on "
        "GPUs nccl (auto's choice) or symmetric (kernels that reach every GPU of this host)",
        choices=("auto", "shm", "gloo", "nccl", "symmetric"),
    )
    nnodes: int = setting(1, help="hosts that the ranks are divided among; weft serve is started on each of them")
    node_rank: int = setting(0, help="number of this host, from 0; 0 has the front end and the engine")
    dist_init_addr: str | None = setting(
        None,
        help="address of host 0, at which it listens for the others and its ranks meet theirs; nothing there asks who "
        "connects",
        metavar="HOST:PORT",
        parse=parse_meeting_address,
    )
    distributed_executor_backend: str = setting(
        "mp",
        help="what starts the ranks: mp, as processes of this host (or of each of --nnodes); ray, as actors of a Ray "
        "cluster that runs already",
        choices=("mp", "ray"),
    )
    ray_address: str | None = setting(
        None,
        help="the Ray cluster; default, and auto: what RAY_ADDRESS says, or else the one that runs on this host",
        metavar="HOST:PORT",
        parse=parse_ray_address,
    )
    ray_cpus: int | None = setting(
        None, help="CPUs of the Ray cluster for each rank; default: as many as each can have"
    )
    rank_timeout: float = setting(30.0, help="seconds that a rank waits for another one before that counts as lost")
    rank_load_timeout: float = setting(
        600.0, help="seconds that ranks wait for one that still loads its part of the model, once another has its own"
    )
    cores: str | None = setting(
        None, help="cores to use, such as 0-3,8; default: all this process may use", metavar="LIST", parse=parse_cores
    )
    kernels: str = setting(
        "auto",
        help="CPU kernels; auto takes the C++ extension at the best level of this CPU, or the reference without it",
        choices=("auto", "avx512", "avx2", "portable", "reference"),
    )
    attention_backend: str = setting(
        "auto",
        help="what computes attention on a GPU; auto is triton, torch is slow and for comparison, flashinfer comes "
        "with pip install 'weft[flashinfer]'",
        choices=("auto", "triton", "torch", "flashinfer"),
    )
    gpu_memory_utilization: float = setting(
        0.9,
        help="part of a GPU's memory that may be taken, by other processes too; the KV pool gets what is left of it",
    )
    exact_a4: bool = setting(
        False,
        help="4-bit activations outside of an fmpq checkpoint's outlier blocks, as in the paper, instead of 8 bits; "
        "for comparison, since a CPU is no faster with them",
    )
    w4a16: bool = setting(
        False,
        help="activations of quantised layers stay in bfloat16 instead of 8 bits, on --device cuda: no rounding, for "
        "fewer operations a second",
    )
    batch_invariant: bool = setting(
        False,
        help="a sequence gives the same bits whatever is beside it and however it was cut, with plain bfloat16 weights "
        "and with --w4a16 too, on --device cuda; products take longer",
    )
    max_num_queued_reqs: int = setting(1024, help="most requests waiting for their first step; one more gets 429")
    max_num_queued_tokens: int | None = setting(
        None, help="most prompt tokens waiting for their first step; default: no limit"
    )
    seed: int = setting(0, help="seed for requests that bring none, and for dummy weights")

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings by themselves, one sentence each."""
        found = _type_problems(self)
        if found:
            return found
        if self.max_model_len is not None and self.max_model_len < 2:
            found.append(f"--max-model-len is {self.max_model_len}; a prompt and its answer need at least 2")
        for name in ("kv_cache_memory_bytes", "num_blocks", "max_num_queued_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs"):
            value = getattr(self, name)
            if value < 1:
                found.append(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            found.append(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}, less than --max-num-seqs "
                f"{self.max_num_seqs}; a step of that many sequences would not fit"
            )
        if self.w4a16 and self.exact_a4:
            found.append("--w4a16 leaves activations in 16 bits, and --exact-a4 rounds them to 4; give one of them")
        if self.batch_invariant and self.attention_backend in ("torch", "flashinfer"):
            found.append(
                f"--batch-invariant needs --attention-backend triton, and that is {self.attention_backend}, whose sums "
                "depend on what is beside a row"
            )
        if self.batch_invariant and self.tensor_parallel_size > 1 and self.weave in ("auto", "plain"):
            found.append(
                f"--batch-invariant with several ranks needs --weave fused, woven, rejoined or one-shot; it is "
                f"{self.weave}, and plain, which auto may choose, leaves the order of a sum to a library that goes by "
                "its size"
            )
        if self.attention_backend == "flashinfer" and self.tensor_parallel_size > 1:
            found.append(
                "--attention-backend is flashinfer, which is told of one batch in a step, and "
                f"--tensor-parallel-size {self.tensor_parallel_size} may cut a step in two; triton works"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            found.append(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization}; it must be more than 0 and at most 1"
            )
        return found + self._target_problems() + self._rank_problems() + _form_problems(self)

    def _target_problems(self) -> list[str]:
        found = []
        targets = (("--slo-ttft", self.slo_ttft), ("--slo-tpot", self.slo_tpot))
        for flag, value in targets:
            if value is not None and not 0 < value < 86400:
                found.append(f"{flag} is {value}; it must be more than 0 and less than 86400 seconds")
        for flag, given in (*targets, ("--partition-record", self.partition_record)):
            if given is not None and self.partition not in ("auto", "paper"):
                found.append(
                    f"{flag} is {given}, and --partition {self.partition} has no use for it; auto and paper do"
                )
        return found

    def _rank_problems(self) -> list[str]:
        found, ranks = [], self.tensor_parallel_size
        if not 1 <= ranks <= MAX_RANKS:
            found.append(f"--tensor-parallel-size is {ranks}; it must be from 1 to {MAX_RANKS}")
        elif ranks > 1 and self.device == "simulated":
            found.append(
                f"--tensor-parallel-size is {ranks}, and --device simulated has one rank; cpu and cuda have several"
            )
        elif ranks > 1 and self.device == "cuda" and self.partition != "off":
            found.append(
                f"--partition is {self.partition}, and ranks on GPUs have one lane; --partition off, or --device cpu"
            )
        fitting = ("nccl", "symmetric") if self.device == "cuda" else ("shm", "gloo")
        if self.collective not in ("auto", *fitting):
            found.append(
                f"--collective is {self.collective}, and --device is {self.device}, which has {' and '.join(fitting)}"
            )
        for flag, value in (("--weave", self.weave), ("--collective", self.collective)):
            if value != "auto" and ranks == 1:
                found.append(f"{flag} is {value}, and one rank has no use for it; --tensor-parallel-size 2 has")
        if self.weave in ("plain", "one-shot") and self.collective in ("shm", "symmetric"):
            found.append(
                f"--weave is {self.weave}, which --collective {self.collective} does not have; "
                f"--collective {'nccl' if self.device == 'cuda' else 'gloo'} does"
            )
        if self.nnodes < 1 or ranks % max(self.nnodes, 1):
            found.append(f"--nnodes is {self.nnodes}; it must divide --tensor-parallel-size, which is {ranks}")
        if not 0 <= self.node_rank < max(self.nnodes, 1):
            found.append(
                f"--node-rank is {self.node_rank}; it must be at least 0 and less than --nnodes, which is {self.nnodes}"
            )
        if self.distributed_executor_backend != "ray" and (self.nnodes > 1) is not (self.dist_init_addr is not None):
            found.append(
                f"--nnodes is {self.nnodes} and --dist-init-addr {self.dist_init_addr or 'not given'}; "
                "several hosts need an address, and one has no use for it"
            )
        if self.nnodes > 1 and self.collective in ("shm", "symmetric"):
            found.append(
                f"--collective is {self.collective}, which is for ranks of one host; "
                f"--collective {'nccl' if self.device == 'cuda' else 'gloo'} is for --nnodes {self.nnodes}"
            )
        for name, seconds in (("rank-timeout", self.rank_timeout), ("rank-load-timeout", self.rank_load_timeout)):
            if not 0 < seconds < 86400:
                found.append(f"--{name} is {seconds}; it must be more than 0 and less than 86400 seconds")
        return found + self._ray_problems()

    def _ray_problems(self) -> list[str]:
        found, flag = [], "--distributed-executor-backend"
        if self.distributed_executor_backend != "ray":
            for other, value in (("--ray-address", self.ray_address), ("--ray-cpus", self.ray_cpus)):
                if value is not None:
                    found.append(f"{other} is {value}, which only {flag} ray has a use for")
            return found
        if self.tensor_parallel_size == 1:
            found.append(f"{flag} is ray, and one rank has no use for it; --tensor-parallel-size 2 has")
        if self.nnodes > 1:
            found.append(f"{flag} is ray, and --nnodes is {self.nnodes}; leave it out: Ray chooses the hosts")
        if self.collective == "symmetric":
            found.append(f"{flag} is ray, which shows each rank one GPU only; --collective nccl works, or {flag} mp")
        if self.ray_cpus is not None and self.ray_cpus < 1:
            found.append(f"--ray-cpus is {self.ray_cpus}; it must be at least 1")
        return found

    def validate(self) -> None:
        """Raise ConfigError naming every problem at once."""
        _raise(self.problems())


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the front-end process needs to know."""

    host: str = setting("127.0.0.1", help="address to listen on")
    port: int = setting(8000, help="port to listen on")
    served_model_name: tuple[str, ...] = setting(
        (), help="names the model answers to; the first is the one in responses; default: the model as given"
    )
    api_key: tuple[str, ...] = setting(
        (), help="keys that clients must send as 'Authorization: Bearer KEY'", secret=True
    )
    api_key_file: Path | None = setting(None, help="file with one key a line")
    chat_template: Path | None = setting(None, help="file with a Jinja chat template, instead of the checkpoint's")
    max_body_bytes: int = setting(8 * 2**20, help="largest request body; a larger one gets 413", unit="bytes")
    shutdown_timeout: float = setting(30.0, help="seconds that running requests get to finish after SIGTERM")
    write_timeout: float = setting(
        60.0, help="seconds that a client may take in nothing of its answer before it is hung up on; 0: for ever"
    )
    sse_keep_alive: float = setting(15.0, help="seconds of silence after which a stream sends a comment line; 0: never")
    allowed_origins: tuple[str, ...] = setting((), help="origins that browsers may call from (CORS); default: none")
    enable_metrics: bool = setting(True, help="serve /metrics")
    engine_restarts: int = setting(
        0, help="times that an engine which dies while it serves is started again; after that the server ends"
    )
    log_level: str = setting("info", help="how much is logged", choices=("debug", "info", "warning", "error"))

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings by themselves, one sentence each."""
        found = []
        if not 0 <= self.port <= 65535:
            found.append(f"--port is {self.port}; it must be between 0 and 65535")
        for name in self.served_model_name:
            if not 1 <= len(name) <= MAX_NAME:
                found.append(f"--served-model-name is {name!r}; it must have 1 to {MAX_NAME} characters")
        for origin in self.allowed_origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                found.append(f"--allowed-origins is {origin!r}; an origin is like https://app.example:8443, or *")
        if self.max_body_bytes < 1024:
            found.append(f"--max-body-bytes is {self.max_body_bytes}; it must be at least 1024")
        if self.engine_restarts < 0:
            found.append(f"--engine-restarts is {self.engine_restarts}; it must be 0 or more")
        for name in ("shutdown_timeout", "write_timeout", "sse_keep_alive"):
            value = getattr(self, name)
            if not 0 <= value < 86400:
                found.append(f"--{name.replace('_', '-')} is {value}; it must be between 0 and 86400 seconds")
        return found + _form_problems(self)

    def validate(self) -> None:
        """Raise ConfigError naming every problem at once."""
        _raise(self.problems())


def _form_problems(config: Any) -> list[str]:
    """Values that are none of the choices, or that the setting's own parser refuses."""
    found = []
    for spec in fields(config):
        flag, value = f"--{spec.name.replace('_', '-')}", getattr(config, spec.name)
        choices, parse = spec.metadata.get("choices"), spec.metadata.get("parse")
        if choices is not None and value not in choices:
            found.append(f"{flag} is {value!r}; it must be one of {', '.join(map(str, choices))}")
        if parse is not None and value is not None:
            try:
                parse(value)
            except ValueError as error:
                found.append(f"{flag} is {value!r}; {error}")
    return found


def _type_problems(config: Any) -> list[str]:
    """Values that are of another type than their setting: only Python can give these, flags are converted."""
    hints, found = typing.get_type_hints(type(config)), []
    for spec in fields(config):
        value, hint = getattr(config, spec.name), hints[spec.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (typing.get_origin(hint) or hint,)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            found.append(f"--{spec.name.replace('_', '-')} is {value!r}; it must be of type {names}")
    return found


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))
