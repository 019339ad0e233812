"""Rank processes that the tests of the collectives share: forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Failed(Exception):
    """What a rank's command raised."""


@dataclass
class RankProcess:
    """The test's end of one rank process."""

    connection: socket.socket
    pid: int = 0
    seconds: float = 0.0  # of the last command

    def send(self, do: str, **arguments: Any) -> None:
        self.connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def receive(self) -> list[Any]:
        """The tensors of the answer. Raises Failed."""
        import torch

        with self.connection.makefile("rb") as answer:
            head = json.loads(answer.readline())
            self.seconds = head["seconds"]
            found = []
            for name, shape in head["tensors"]:
                dtype = getattr(torch, name)
                size = torch.empty(shape, dtype=dtype).nbytes
                data = torch.frombuffer(bytearray(answer.read(size)) or bytearray(1), dtype=torch.uint8)[:size]
                found.append(data.view(dtype).view(shape))
        if head["error"] is not None:
            raise Failed(head["error"])
        return found

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class RankProcesses:
    """Makes rank processes, and groups of them."""

    def __init__(self, control: socket.socket, folder: Path, script: dict[str, Any]) -> None:
        self.script = script
        self._control = control
        self._folder = folder
        self._made: list[RankProcess] = []
        self._groups = 0

    def fork(self, count: int) -> list[RankProcess]:
        found = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            ours.settimeout(60)
            socket.send_fds(self._control, [b"x"], [theirs.fileno()])
            theirs.close()
            found.append(RankProcess(ours))
        self._made += found
        return found

    def open(self, processes: list[RankProcess], backend: str, timeout: float = 20.0, **options: Any) -> None:
        """Make these processes a group, in this order."""
        self._groups += 1
        name = f"weft-test-{os.getpid()}-{self._groups}" if backend == "shm" else str(self._folder / str(self._groups))
        for rank, process in enumerate(processes):
            process.send(
                "open", backend=backend, name=name, rank=rank, ranks=len(processes), timeout=timeout, **options
            )
        for process in processes:
            process.pid = int(process.receive()[0])

    def close(self) -> None:
        self._control.close()
        for process in self._made:
            process.connection.close()
            if process.pid:
                with contextlib.suppress(ProcessLookupError):
                    process.signal(signal.SIGKILL)
