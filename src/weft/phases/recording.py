"""What a controller saw and decided, on disk: JSON lines that `replay` and `weft doctor --phases` read.

The first line has the policy, all of its constants, and what the latency models have to know of the device, so that a
file is enough to decide again and to be looked at. Each other line is one question to it: what
was observed since the last one, where the engine stood, and what was decided. Numbers are written so that they are read
back bit by bit, and a policy is a pure function: the same decisions must come out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.core.plan import Lane, Partition, Regime, Sharing, StepLaw
from weft.errors import ConfigError
from weft.phases.auto import AutoPolicy
from weft.phases.controller import Asked
from weft.phases.forecast import Limits
from weft.phases.observations import Arrived, Decision, Finished, FirstToken, Observation, Queue, Stepped, Targets
from weft.phases.paper import PaperPolicy

logger = logging.getLogger("weft.partition")

VERSION = 6
# Bytes of a file at most: some hours of serving.
MOST = 256 * 2**20
KINDS = {"arrived": Arrived, "stepped": Stepped, "first": FirstToken, "finished": Finished}
# Of a decision, what is as it is in JSON.
TOLD = ("reason", "hold", "within", "back", "shed", "ttft", "tpot")
NAMES = {kind: name for name, kind in KINDS.items()}
NAMED = {AutoPolicy: "auto", PaperPolicy: "paper"}


class Recorder:
    """Writes what it is told to a file, up to `most` bytes; then it says so, in the log, and writes no more.

    device: that of the run, which not every policy knows.
    Raises ConfigError when the file cannot be written.
    """

    def __init__(self, path: Path, policy: AutoPolicy | PaperPolicy, device: Limits, most: int = MOST) -> None:
        self._path = path
        self._left = most
        try:
            path.write_text("")
        except OSError as error:
            raise ConfigError(f"--partition-record {path}: {error.strerror}") from error
        self._write({"weft_phases": VERSION, "policy": _policy_row(policy), "device": asdict(device)})

    def __call__(self, asked: Asked) -> None:
        decision = asked.decision
        self._write(
            {
                "now": asked.now,
                "seen": [_observation_row(one) for one in asked.seen],
                "queue": {
                    "waiting": asked.queue.waiting,
                    "decoding": asked.queue.decoding,
                    "context": asked.queue.context,
                    "answers": asked.queue.answers,
                },
                "decision": None if decision is None else _decision_row(decision),
            }
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self._left <= 0:
            return
        line = json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"
        self._left -= len(line)
        if self._left <= 0:
            logger.warning("%s is full: what the controller sees is recorded no more", self._path)
            return
        try:
            # Opened for each line, some in a second: so it is whole whenever the engine ends.
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:  # a full disk must not end the service
            self._left = 0
            logger.error("%s cannot be written any more: %s", self._path, error.strerror)


@dataclass(frozen=True, slots=True)
class Recording:
    """A run that was recorded. policy: what decided, as it was at its start. device: what it decided for."""

    policy: AutoPolicy | PaperPolicy
    device: Limits
    run: tuple[Asked, ...]


def read(path: Path) -> Recording:
    """A recorded run. A last line that was cut off is left out. Raises ConfigError that names file and line."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()
    rows = _parsed(path, lines)
    try:
        _, head = next(rows)
        if head.get("weft_phases") != VERSION:
            raise ValueError(f"this is no recording of version {VERSION}")
        policy, device = _policy(head["policy"]), Limits(**head["device"])
    except StopIteration:
        raise ConfigError(f"{path} is empty") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}, line 1: {error}") from error
    run = []
    for number, row in rows:
        try:
            run.append(_asked(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}, line {number}: {error!r}") from error
    return Recording(policy, device, tuple(run))


def _parsed(path: Path, lines: list[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error


# -- rows of JSON, and back ------------------------------------------------------------------------------------------


def _observation_row(one: Observation) -> list[Any]:
    values = [getattr(one, name) for name in type(one).__slots__]
    return [NAMES[type(one)], *(value.value if isinstance(value, Lane) else value for value in values)]


def _observation(row: list[Any]) -> Observation:
    kind, *values = row
    if kind == "stepped":
        values[1] = Lane(values[1])
    made: Observation = KINDS[kind](*values)
    return made


def _decision_row(decision: Decision) -> dict[str, Any]:
    sharing = decision.sharing
    shares = [sharing.partition.prefill, sharing.partition.decode]
    cost = decision.cost
    return {
        "sharing": [sharing.regime.value, shares, sharing.chunk, sharing.size_weight, sharing.tpot],
        **{name: getattr(decision, name) for name in TOLD},
        "cost": None if cost is None else [cost.fixed, cost.token, cost.slot, cost.read, cost.pair],
    }


def _asked(row: dict[str, Any]) -> Asked:
    queue, decision = row["queue"], row["decision"]
    waiting, answers = (tuple((first, second) for first, second in queue[name]) for name in ("waiting", "answers"))
    found = None
    if decision is not None:
        regime, shares, *rest = decision["sharing"]
        sharing = Sharing(Regime(regime), Partition(*shares), *rest)
        cost = None if decision["cost"] is None else StepLaw(*decision["cost"])
        told = {name: decision[name] for name in TOLD}
        found = Decision(row["now"], sharing, cost=cost, **told)
    seen = tuple(_observation(one) for one in row["seen"])
    return Asked(seen, Queue(waiting, queue["decoding"], queue["context"], answers), row["now"], found)


def _policy_row(policy: AutoPolicy | PaperPolicy) -> dict[str, Any]:
    """All fields: any of them may be the reason for a decision."""
    return {"name": NAMED[type(policy)], **asdict(policy)}


def _policy(row: dict[str, Any]) -> AutoPolicy | PaperPolicy:
    name, fields = row["name"], {key: value for key, value in row.items() if key != "name"}
    fields["targets"] = Targets(**fields["targets"])
    if name == NAMED[PaperPolicy]:
        return PaperPolicy(**fields)
    if name == NAMED[AutoPolicy]:
        return AutoPolicy(**{**fields, "device": Limits(**fields["device"])})
    raise ValueError(f"the policy {name!r} is not known here")


def observer(recording: Recording) -> AutoPolicy:
    """A policy that learns from what another one has recorded: the latency models are auto's."""
    policy = recording.policy
    return policy if isinstance(policy, AutoPolicy) else AutoPolicy(policy.targets, recording.device)
