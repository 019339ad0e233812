"""Rank processes for tests: `python ranks.py FD`, a process that has imported everything and forks a rank for each
socket that it is sent. A rank reads commands, one JSON object a line, and answers with one and the bytes of tensors.

The inputs of a case follow from its seed, so that the test has those of all ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from weft.kernels import available
from weft.kernels.cpu import CpuKernels
from weft.kernels.quantised import PreparedRows, unpack_rows
from weft.kernels.wire import FusedRows, W4AxInput
from weft.weave import rows
from weft.weave.background import Background
from weft.weave.collective import Join
from weft.weave.distributed import AllReduceCollective, DistributedCollective, connect
from weft.weave.native import NativeBackground, NativeCollective
from weft.weave.shm import ShmCollective
from weft.weave.sockets import open_sockets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_partial(case: dict[str, Any], rank: int) -> torch.Tensor:
    """[T, H] of one rank; rows of `poison` are NaN on every rank."""
    partial = random(case["seed"] + 1 + rank, case["bounds"][-1], case["size"]) * 3
    partial[case.get("poison", [])] = torch.nan
    return partial.to(DTYPES[case.get("part_dtype", case["dtype"])])


def make_residual(case: dict[str, Any]) -> torch.Tensor:
    """[T, H] of all owners."""
    return random(case["seed"] + 100, case["bounds"][-1], case["size"]).to(DTYPES[case["dtype"]])


def make_weight(case: dict[str, Any]) -> torch.Tensor:
    return (1 + random(case["seed"] + 101, case["size"]) / 8).to(DTYPES[case["dtype"]])


def make_format(case: dict[str, Any], kernels: CpuKernels) -> W4AxInput | None:
    """format: [outlier_blocks, hadamard, exact_a4, permuted], or None."""
    if case.get("format") is None:
        return None
    outlier_blocks, hadamard, exact_a4, permuted = case["format"]
    size = case["size"]
    generator = torch.Generator().manual_seed(case["seed"])
    packed = kernels.pack_w4ax(
        torch.randint(-8, 8, (8, size), generator=generator, dtype=torch.int8),
        torch.rand((8, size // 128), generator=generator),
        permutation=torch.randperm(size, generator=generator) if permuted else None,
        outlier_blocks=outlier_blocks,
        hadamard=hadamard,
        exact_a4=exact_a4,
    )
    return W4AxInput(kernels, packed)


def make_join(case: dict[str, Any], rank: int, owned: tuple[int, int], kernels: CpuKernels) -> Join:
    first, end = owned
    return Join(
        make_partial(case, rank),
        make_residual(case)[first:end].contiguous(),
        make_weight(case),
        1e-5,
        tuple(case["bounds"]),
        make_format(case, kernels),
    )


def flat(hidden: Any) -> list[torch.Tensor]:
    return list(unpack_rows(hidden.data, hidden.rows)) if isinstance(hidden, PreparedRows) else [hidden]


class Rank:
    """One process's state between commands."""

    def __init__(self) -> None:
        self.kernels = CpuKernels(available()[0], (min(os.sched_getaffinity(0)),))
        self.collective: Any = None

    def open(
        self, backend: str, name: str, rank: int, ranks: int, timeout: float, **options: Any
    ) -> list[torch.Tensor]:
        background = options.pop("background", False)
        if backend == "shm":
            self.collective = ShmCollective(name, rank, ranks, self.kernels, timeout=timeout, **options)
        elif backend == "sockets":
            self.collective = open_sockets(dist.FileStore(name, ranks), rank, ranks, self.kernels, timeout=timeout)
        else:
            join_rows = FusedRows(self.kernels) if options.pop("fused", True) else rows.plain(self.kernels.rms_norm)
            messages = connect(dist.FileStore(name, ranks), rank, ranks, timeout=timeout)
            if backend == "all_reduce":
                self.collective = AllReduceCollective(messages, join_rows)
            else:
                self.collective = DistributedCollective(messages, join_rows, capacity=1 << 24, **options)
        if background and isinstance(self.collective, NativeCollective):
            self.collective = NativeBackground(self.collective)
        elif background:
            self.collective = Background(self.collective)
        return [torch.tensor(os.getpid())]

    def join(self, cases: list[dict[str, Any]]) -> list[torch.Tensor]:
        """hidden and residual of each seam, one after the other."""
        found = []
        for case in cases:
            join = make_join(case, self.collective.rank, self.collective.owned(tuple(case["bounds"])), self.kernels)
            delays = case.get("delays", {}).get(str(self.collective.rank), [0, 0])
            before = join.partial.clone()
            time.sleep(delays[0])
            pending = self.collective.start(join)
            time.sleep(delays[1])
            joined = self.collective.finish(pending)
            if not torch.equal(before.nan_to_num(), join.partial.nan_to_num()):
                raise RuntimeError("the partial sums were changed")
            found += [*flat(joined.hidden), joined.residual]
        return found

    def ahead(self, cases: list[dict[str, Any]]) -> list[torch.Tensor]:
        """As `join`, but all seams are started before the first is finished."""
        collective, found, pending = self.collective, [], []
        for case in cases:
            join = make_join(case, collective.rank, collective.owned(tuple(case["bounds"])), self.kernels)
            pending.append(collective.start(join))
        for one in pending:
            joined = collective.finish(one)
            found += [*flat(joined.hidden), joined.residual]
        return found

    def gather(self, seed: int, shape: list[int]) -> list[torch.Tensor]:
        return self.collective.gather(random(seed + self.collective.rank, *shape))

    def close(self) -> list[torch.Tensor]:
        self.collective.close()
        return []


def serve(connection: socket.socket) -> None:
    rank = Rank()
    with connection, connection.makefile("r") as lines:
        for line in lines:
            command = json.loads(line)
            started = time.monotonic()
            try:
                tensors, error = getattr(rank, command.pop("do"))(**command), None
            except Exception as failure:
                tensors, error = [], f"{type(failure).__name__}: {failure}"
            head = {
                "error": error,
                "seconds": time.monotonic() - started,
                "tensors": [[str(one.dtype).removeprefix("torch."), list(one.shape)] for one in tensors],
            }
            data = b"".join(one.contiguous().flatten().view(torch.uint8).numpy().tobytes() for one in tensors)
            connection.sendall(json.dumps(head).encode() + b"\n" + data)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    with socket.socket(fileno=int(sys.argv[1])) as control:
        while True:
            message, files, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            if os.fork() == 0:
                control.close()
                serve(socket.socket(fileno=files[0]))
                os._exit(0)
            os.close(files[0])


if __name__ == "__main__":
    main()
