"""How much memory is free, and how large the KV pool becomes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from weft.config import EngineConfig, parse_partition
from weft.errors import ConfigError

# The default pool takes no more than this part of free memory: the machine is not ours alone.
SHARE = 4
MIB = 2**20
LARGEST_POOL = 2**31 - 1  # block numbers are int32 in the kernels


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV pool and the longest sequence that goes with it. notes: what people should know."""

    blocks: int
    max_model_len: int
    notes: tuple[str, ...] = ()


def size_pool(config: EngineConfig, context: int, token_bytes: int, free: int, share: int = SHARE) -> Pool:
    """The pool for a model with `context` tokens at most and token_bytes of KV per token, in `free` bytes of memory,
    of which it takes one `share`-th at most unless it is told otherwise.

    Raises ConfigError naming the flag, its value and what would fit.
    """
    length = context if config.max_model_len is None else config.max_model_len
    if length > context:
        raise ConfigError(f"--max-model-len is {length}; the checkpoint's context is {context} tokens, so at most that")
    block_bytes = token_bytes * config.block_size
    whole = -(-length // config.block_size)  # blocks of one sequence of full length
    blocks = _blocks(config, whole, block_bytes, free, share)
    room = blocks * config.block_size
    if room >= length:
        return Pool(blocks, length)
    remedy = f"--num-blocks {whole} (or --kv-cache-memory-bytes {whole * block_bytes}) holds one of {length}"
    if config.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len is {length}, and the KV pool of {blocks} blocks holds {room} tokens; "
            f"--max-model-len {room} fits, or {remedy}"
        )
    note = f"the longest sequence is {room} tokens, not the checkpoint's {context}: the KV pool holds no more; {remedy}"
    return Pool(blocks, room, (note,))


def _blocks(config: EngineConfig, whole: int, block_bytes: int, free: int, share: int) -> int:
    most = min(free // block_bytes, LARGEST_POOL)
    if config.num_blocks is not None:
        if config.num_blocks > most:
            raise ConfigError(
                f"--num-blocks is {config.num_blocks}, which takes {_mib(config.num_blocks * block_bytes)}; "
                f"{_mib(free)} of memory are free, so at most {most}"
            )
        return config.num_blocks
    if config.kv_cache_memory_bytes is not None:
        given = config.kv_cache_memory_bytes
        if given < block_bytes:
            raise ConfigError(
                f"--kv-cache-memory-bytes is {given}; one block of {config.block_size} tokens takes {block_bytes}, "
                "so at least that"
            )
        if given > free:
            raise ConfigError(f"--kv-cache-memory-bytes is {given}; {free} bytes of memory are free, so at most that")
        return min(given // block_bytes, LARGEST_POOL)
    blocks = min(config.max_num_seqs * whole, most // share)
    if blocks < 1:
        raise ConfigError(
            f"one KV block of {config.block_size} tokens takes {_mib(block_bytes)}, more than a quarter of the "
            f"{_mib(free)} of free memory; free some, or set --kv-cache-memory-bytes"
        )
    return blocks


def decode_blocks(config: EngineConfig, blocks: int, length: int) -> int:
    """How many of the blocks are the decode phase's own: in proportion, under --partition pd:P:D; 0 for one pool.

    Raises ConfigError when a pool would not hold a sequence of `length` tokens.
    """
    shares = parse_partition(config.partition)
    if shares is None or shares.policy != "pd":
        return 0
    decode = round(blocks * shares.decode / shares.whole)
    least, whole = min(decode, blocks - decode), -(-length // config.block_size)
    if least < whole:
        fits = -(-whole * shares.whole // min(shares.prefill, shares.decode)) + 1
        raise ConfigError(
            f"--partition is {config.partition}: it divides {blocks} KV blocks into {blocks - decode} and {decode}, "
            f"and each pool has to hold a sequence of {length} tokens; --num-blocks {fits} would work, or "
            f"--max-model-len {least * config.block_size}"
        )
    return decode


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of every control group around it.

    Page cache counts as free, since the kernel drops it on demand. root: where /proc and /sys are (for tests).
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(found[1]) * 1024] if found else []
    limits += _group_limits(root)
    if not limits:
        raise ConfigError("free memory is unknown here (no /proc/meminfo); set --num-blocks or --kv-cache-memory-bytes")
    return max(0, min(limits))


def _group_limits(root: Path) -> list[int]:
    """What is left under each memory limit of version 2 control groups, from ours up, and of version 1."""
    limits = []
    named = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    mount = root / "sys/fs/cgroup"
    group = mount / (named[1] if named else "")
    for folder in (group, *group.parents):
        limits += _left(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file")
        if folder == mount:
            break
    old = mount / "memory"
    stat = old / "memory.stat"
    return limits + _left(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", stat, "total_inactive_file")


def _left(limit: Path, used: Path, stat: Path, cache: str) -> list[int]:
    most, now = _read(limit).strip(), _read(used).strip()
    if not (most.isdecimal() and now.isdecimal()):  # "max", or no such file
        return []
    found = re.search(rf"^{cache} (\d+)$", _read(stat), re.MULTILINE)
    return [int(most) - int(now) + (int(found[1]) if found else 0)]


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty where this system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
