"""Messages between ranks over torch.distributed, with time-outs and errors that name the rank."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, NoReturn

import torch
import torch.distributed

from weft.errors import RankLost
from weft.weave.collective import fingerprint

GRACE = 1.0  # seconds that the others have to say that they are there, once a sum has not come
LATE = ("timed out", "timeout")  # words of gloo, whose first wait that takes too long ends all others


_dist: Any = torch.distributed  # its types lack much of what it has


def open_gloo(store: Any, rank: int, ranks: int, *, bind: str, timeout: float) -> Any:
    """A process group that no global state of torch knows. bind: this rank's address. timeout: seconds of what is given
    none of its own. Raises RuntimeError."""
    options = _dist.ProcessGroupGloo._Options()
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=bind)]
    options._timeout = timedelta(seconds=timeout)
    return _dist.ProcessGroupGloo(store, rank, ranks, options)


class Tag(IntEnum):
    """Kinds of messages. Those of one kind arrive in the order in which they were sent."""

    PLAN, PART, ROWS = range(3)


@dataclass(frozen=True, slots=True)
class Message:
    """A tensor on its way to or from a rank. work: or why it could not be sent or asked for."""

    rank: int
    tensor: torch.Tensor
    work: Any | RuntimeError


class Messages:
    """Messages between the ranks of a group: each has a time-out, and an error that names the rank."""

    def __init__(self, group: Any, rank: int, ranks: int, timeout: float) -> None:
        self.rank, self.ranks = rank, ranks
        self.others = [other for other in range(ranks) if other != rank]
        self._group = group
        self.timeout = timeout
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

    def compare(
        self, asked: list[Message], sent: list[Message], seconds: float | None = None, words: str | None = None
    ) -> None:
        """Another plan is said rather than that a rank has left, for it may have left because of a plan. seconds: that
        a plan may take, if not the time-out; words: how that is told of one that did not come."""
        failures = [self._failure(message, seconds, words) for message in asked]
        own = sent[0].tensor.tolist() if sent else []
        for message, failure in zip(asked, failures, strict=True):
            theirs = message.tensor.tolist()
            if failure is None and theirs != own:
                self.fail(f"rank {message.rank} came with another plan: its rows are {theirs[1]}, those here {own[1]}")
        self._check(failures)

    def send(self, tensor: torch.Tensor, rank: int, tag: Tag) -> Message:
        return self._post("send", tensor, rank, tag)

    def receive(self, into: torch.Tensor, rank: int, tag: Tag) -> Message:
        return self._post("recv", into, rank, tag)

    def wait(self, messages: Iterable[Message]) -> None:
        self._check([self._failure(message) for message in messages])

    def begin_sum(self, tensor: torch.Tensor) -> Any:
        """All ranks must have compared what they sum: of another size, gloo might end the process."""
        return self._group.allreduce([tensor])

    def wait_sum(self, work: Any, plan: tuple[Any, ...], rows: int) -> None:
        """A sum does not say who is missing. So those who wait for it in vain send one another their plans: who sends
        none is missing, and who waits with another plan has sent that before."""
        begun = time.monotonic()
        error = _error(work, self.timeout)
        if error is None:
            return
        waited = time.monotonic() - begun >= self.timeout
        words = f"{self.timeout:g} s" if waited else f"{GRACE:g} s of a sum that failed"
        self.compare(*self.exchange(plan, rows), GRACE, words)
        self.fail(f"the sum failed, though all ranks are there: {error}", error)

    def gather(self, rows: torch.Tensor, seconds: float | None = None) -> list[torch.Tensor]:
        """`Collective.gather`. seconds: as in `compare`."""
        rows = rows.contiguous()
        self.begin()
        self.compare(*self.exchange(("gather", tuple(rows.shape), str(rows.dtype)), len(rows)), seconds)
        found = [rows if rank == self.rank else torch.empty_like(rows) for rank in range(self.ranks)]
        if rows.numel():
            asked = [self.receive(found[rank], rank, Tag.ROWS) for rank in self.others]
            self.wait([*asked, *[self.send(rows, rank, Tag.ROWS) for rank in self.others]])
        return found

    def fail(self, why: str, cause: Exception | None = None) -> NoReturn:
        self._failed = f"seam {self._seam}: {why}"
        self.close()
        raise RankLost(self._failed) from cause

    def close(self) -> None:
        self._group = None  # closes the connections, which the others notice
        self._failed = self._failed or f"rank {self.rank} has left its group"

    def _check(self, failures: list[tuple[str, Exception] | None]) -> None:
        """All ranks that are missing are named, since one may have left because of another."""
        if missing := dict(failure for failure in failures if failure is not None):
            self.fail("; ".join(missing), next(iter(missing.values())))

    def _failure(
        self, message: Message, seconds: float | None = None, words: str | None = None
    ) -> tuple[str, Exception] | None:
        """None once the message has come; otherwise what is wrong, and why."""
        error = _error(message.work, self.timeout if seconds is None else seconds)
        if error is None:
            return None
        late = any(one in str(error).lower() for one in LATE)
        what = f"did not come within {words or f'{self.timeout:g} s'}" if late else "has ended or left"
        return f"rank {message.rank} {what}", error

    def _post(self, kind: str, tensor: torch.Tensor, rank: int, tag: Tag) -> Message:
        """To a rank that is gone as well: what the others have to say comes first."""
        try:
            return Message(rank, tensor, getattr(self._group, kind)([tensor], rank, tag))
        except RuntimeError as error:
            return Message(rank, tensor, error)


def _error(work: Any | RuntimeError, seconds: float) -> RuntimeError | None:
    """What has become of it after so many seconds at most; None: all is well."""
    if isinstance(work, RuntimeError):
        return work
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:
        return error
    return None
