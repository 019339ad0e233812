"""Ranks of the cuda device for test_cuda_ranks.py: `python rank_steps.py FOLDER < cases`, a line of JSON for each.

All is imported once; each case forks its ranks, who carry out the same steps. What a rank has found lies in
FOLDER/CASE.RANK afterwards: for each step, (sequence, token, logprob) of what it drew, or the error that ended it."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from weft.config import EngineConfig
from weft.core.plan import Lane, Plan, Result, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices import cuda_ranks
from weft.devices.base import Device
from weft.devices.cuda import open_cuda
from weft.devices.group import STRANDS, Group
from weft.loop.nodes import free_port
from weft.weave.choice import Mode
from weft.weave.split import choose_strands

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import row_products

if row_products.wanted():
    row_products.compute_rows_alone()

GREEDY = SamplingParams(temperature=0.0, logprobs=1, ignore_eos=True)
LENGTHS, STEPS = (21, 3), 3
ROOM = 2  # blocks of each sequence
HOST = "127.0.0.1"

cuda_ranks.TILE = 8, 128  # so that a short prompt can be cut


class Chooser(cuda_ranks.Chooser):
    """Also writes down what it has chosen by which costs: (mode, the least seconds by mode)."""

    chosen: ClassVar[list[tuple[str, dict[str, float]]]] = []

    def __call__(self, slices: Sequence[Slice]) -> tuple[Mode, tuple[int, ...]]:
        mode, strands = super().__call__(slices)
        costs, lengths = self._costs, [len(piece.tokens) for piece in slices]
        if costs is not None:
            seconds = {other.value: costs.seconds(other, (sum(lengths),)) for other in costs.seams}
            for cut in (choose_strands(lengths, self._waves, count) for count in STRANDS):
                if len(cut) > 1:
                    least = seconds.get(Mode.WOVEN.value, math.inf)
                    seconds[Mode.WOVEN.value] = min(least, costs.seconds(Mode.WOVEN, cut))
            self.chosen.append((mode.value, seconds))
        return mode, strands


cuda_ranks.Chooser = Chooser  # type: ignore[misc]


def plan(step: int, starts: tuple[int, ...], tokens: list[tuple[int, ...]]) -> Plan:
    slices = [
        Slice(i, start, own, tuple(range(ROOM * i, ROOM * (i + 1))), Sampling(GREEDY, 0, start + len(own)))
        for i, (start, own) in enumerate(zip(starts, tokens, strict=True))
    ]
    return Plan(step, Lane.MIXED, tuple(slices))


def answer(device: Device, plan: Plan) -> Result:
    device.submit(plan)
    while not (found := device.poll(60.0)):
        pass
    (result,) = found
    assert result.error is None, result.error
    return result


def run(device: Device, dies: int | None) -> list[list[tuple[int, int, float]]]:
    """Two prompts in one step, and what follows them. dies: the step before which this rank ends."""
    tokens, starts = [tuple((7 * i + 11 * at) % 90 for at in range(n)) for i, n in enumerate(LENGTHS)], (0, 0)
    found = []
    for step in range(STEPS):
        if step == dies:
            os._exit(9)
        result = answer(device, plan(step, starts, tokens))
        found.append([(one.sequence, one.token, one.score.logprob) for one in result.sampled if one.score is not None])
        starts = tuple(start + len(own) for start, own in zip(starts, tokens, strict=True))
        tokens = [(one.token,) for one in result.sampled]
    return found


def rank(case: dict[str, Any], number: int, port: int) -> Any:
    config = EngineConfig(**case["config"])
    config.validate()
    ranks = config.tensor_parallel_size
    name, timeout = f"weft-test-{os.getppid()}-{port}", config.rank_timeout
    group = Group(number, ranks, ranks, name, HOST, port, HOST, timeout, False, lambda blocks: blocks)
    device = open_cuda(config, Path(config.model), lambda _: None, None if ranks == 1 else group)
    found: dict[str, Any] = {"blocks": device.capacity().blocks, "notes": device.describe().notes}
    started = time.monotonic()
    try:
        found["steps"] = run(device, case.get("dies") if number == ranks - 1 else None)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.monotonic() - started
    found["chosen"] = Chooser.chosen
    if "error" not in found:
        device.close()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore", RuntimeWarning)  # of the interpreter
    for line in sys.stdin:
        case = json.loads(line)
        port, children = free_port(HOST), []
        for number in range(case["config"].get("tensor_parallel_size", 1)):
            child = os.fork()
            if child == 0:
                try:
                    (folder / f"{case['name']}.{number}").write_text(json.dumps(rank(case, number, port)))
                except BaseException:
                    traceback.print_exc()
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
