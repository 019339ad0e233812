"""Messages between ranks over torch.distributed, with time-outs and errors that name the rank."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, NoReturn

import torch

from weft.errors import RankLost
from weft.weave.collective import fingerprint


class Tag(IntEnum):
    """Kinds of messages. Those of one kind arrive in the order in which they were sent."""

    PLAN, PART, ROWS = range(3)


@dataclass(frozen=True, slots=True)
class Message:
    """A tensor on its way to or from a rank; rank None: to and from all."""

    rank: int | None
    tensor: torch.Tensor
    work: Any


class Messages:
    """Messages between the ranks of a group: each has a time-out, and an error that names the rank."""

    def __init__(self, group: Any, rank: int, ranks: int, timeout: float) -> None:
        self.rank, self.ranks = rank, ranks
        self.others = [other for other in range(ranks) if other != rank]
        self._group = group
        self._timeout = timeout
        self._seam = 0
        self._failed: str | None = None

    def begin(self) -> None:
        """The next seam."""
        if self._failed is not None:
            raise RankLost(self._failed)
        self._seam += 1

    def exchange(self, plan: tuple[Any, ...], rows: int) -> tuple[list[Message], list[Message]]:
        """Send the plan to all, and ask for theirs: (asked, sent)."""
        own = torch.tensor([fingerprint(plan), rows])
        asked = [self.receive(torch.empty_like(own), other, Tag.PLAN) for other in self.others]
        return asked, [self.send(own, other, Tag.PLAN) for other in self.others]

    def compare(self, asked: list[Message], sent: list[Message]) -> None:
        """Another plan is said rather than that a rank has left, for it may have left because of a plan."""
        failures = [self._failure(message) for message in asked]
        own = sent[0].tensor.tolist() if sent else []
        for message, failure in zip(asked, failures, strict=True):
            theirs = message.tensor.tolist()
            if failure is None and theirs != own:
                self.fail(f"rank {message.rank} came with another plan: its rows are {theirs[1]}, those here {own[1]}")
        for failure in failures:
            if failure is not None:
                self.fail(*failure)

    def send(self, tensor: torch.Tensor, rank: int, tag: Tag) -> Message:
        return self._post("send", tensor, rank, tag)

    def receive(self, into: torch.Tensor, rank: int, tag: Tag) -> Message:
        return self._post("recv", into, rank, tag)

    def wait(self, message: Message) -> torch.Tensor:
        failure = self._failure(message)
        if failure is not None:
            self.fail(*failure)
        return message.tensor

    def all_reduce(self, tensor: torch.Tensor) -> Message:
        return Message(None, tensor, self._group.allreduce([tensor]))

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """`Collective.gather`."""
        rows = rows.contiguous()
        self.begin()
        self.compare(*self.exchange(("gather", tuple(rows.shape), str(rows.dtype)), len(rows)))
        found = [rows if rank == self.rank else torch.empty_like(rows) for rank in range(self.ranks)]
        if rows.numel():
            asked = [self.receive(found[rank], rank, Tag.ROWS) for rank in self.others]
            for message in (*asked, *[self.send(rows, rank, Tag.ROWS) for rank in self.others]):
                self.wait(message)
        return found

    def fail(self, why: str, cause: Exception | None = None) -> NoReturn:
        self._failed = f"seam {self._seam}: {why}"
        self.close()
        raise RankLost(self._failed) from cause

    def close(self) -> None:
        self._group = None  # closes the connections, which the others notice
        self._failed = self._failed or f"rank {self.rank} has left its group"

    def _failure(self, message: Message) -> tuple[str, Exception] | None:
        """None once the message has come; otherwise what is wrong, and why."""
        try:
            message.work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            from_whom = self.others if message.rank is None else [message.rank]
            who = f"rank {from_whom[0]}" if len(from_whom) == 1 else "another rank"
            late = "timed out" in str(error).lower()  # a message's and an all-reduce's words differ
            return f"{who} {f'did not come within {self._timeout:g} s' if late else 'has ended or left'}", error
        return None

    def _post(self, kind: str, tensor: torch.Tensor, rank: int, tag: Tag) -> Message:
        try:
            return Message(rank, tensor, getattr(self._group, kind)([tensor], rank, tag))
        except RuntimeError as error:
            self.fail(f"rank {rank} has ended or left", error)
