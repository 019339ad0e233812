"""How long until the first token, and what an idle server costs.

    python benchmarks/startup.py [--quick] [--json FILE]

* first_token_s: from the exec of `weft serve` (built-in model) to the first streamed token of a completion that a
  client sends as soon as it is let in; median of five, after one run that is not counted.
* idle_cpu_percent: CPU time of all of the server's processes while nothing is asked, in percent of one core; the
  greater of two spells of 30 s, one after start-up and one after a request.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import common
from serving import POLL_SECONDS, READY_SECONDS, Server, ServerError

from weft.bench.client import Target, send
from weft.bench.stats import Record
from weft.bench.traffic import Shot

RUNS = 5
IDLE_SECONDS = 30.0
QUICK_IDLE_SECONDS = 8.0
SETTLE_SECONDS = 2.0
SHOT = Shot(0.0, "import os\n", 4, 4)


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0]).parse_args()
    watch = common.LoadWatch()
    runs = [_first_token() for _ in range(1 + (3 if arguments.quick else RUNS))][1:]
    first = common.Figure.of([seconds for seconds, _ in runs])
    spells = _idle(QUICK_IDLE_SECONDS if arguments.quick else IDLE_SECONDS)
    print("What the last server printed:\n")
    print("\n".join(f"    {line}" for line in runs[-1][1].strip().splitlines()))
    print()
    rows: list[dict[str, Any]] = [
        {"what": "first token", "unit": "s", "value": first, "server_log": [log.splitlines() for _, log in runs]},
        *({"what": f"idle, {when}", "unit": "% of one core", "value": share} for when, share in spells.items()),
    ]
    print(common.table(["", "value"], [(f"{row['what']} ({row['unit']})", _shown(row["value"])) for row in rows]))
    print()
    if arguments.plot is not None:
        _plot(arguments, [seconds for seconds, _ in runs])
    claims = {"first_token_s": first.median, "idle_cpu_percent": max(spells.values())}
    note = common.load_note(watch)
    common.report(arguments, claims, rows, [note] if note else [])


def _first_token() -> tuple[float, str]:
    """Seconds from the server's exec to the first token, and the server's log."""
    with Server() as server:
        record = asyncio.run(_ask_until_answered(server))
        server.check_alive()
        if record.first is None:
            raise ServerError("the completion had no token")
        return record.first, server.log


async def _ask_until_answered(server: Server) -> Record:
    """The first request that the server answers; its times count from the server's exec."""
    target = Target(server.address, "builtin", extra={"temperature": 0.0, "ignore_eos": True})
    record = None
    while time.perf_counter() - server.started < READY_SECONDS:
        server.check_alive()
        record = await send(target, SHOT, lambda: time.perf_counter() - server.started)
        if record.error is None:
            return record
        await asyncio.sleep(POLL_SECONDS)
    raise ServerError(f"no completion after {READY_SECONDS:g} s: {record and record.error}\n{server.log}")


def _idle(seconds: float) -> dict[str, float]:
    """Percent of one core that an idle server takes, before and after its first request."""
    with Server() as server:
        asyncio.run(server.wait_ready())
        fresh = _spell(server, seconds)
        asyncio.run(_ask_until_answered(server))
        return {"after start-up": fresh, "after a request": _spell(server, seconds)}


def _spell(server: Server, seconds: float) -> float:
    time.sleep(SETTLE_SECONDS)
    start, before = time.monotonic(), common.cpu_seconds(server.pid)
    time.sleep(seconds)
    server.check_alive()
    return 100 * (common.cpu_seconds(server.pid) - before) / (time.monotonic() - start)


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _plot(arguments: argparse.Namespace, seconds: list[float]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(layout="constrained")
    axes = picture.subplots()
    axes.bar(range(1, len(seconds) + 1), seconds)
    axes.set(xlabel="run", ylabel="s to the first token")
    picture.savefig(arguments.plot)


if __name__ == "__main__":
    main()
