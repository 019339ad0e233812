"""The server's state as probes and new requests see it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import weft
from weft.server.gate import ALWAYS, Gate
from weft.server.health import health_router
from weft.server.state import Health, State


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://weft")


def application(health: Health) -> FastAPI:
    app = FastAPI()
    app.include_router(health_router(health))

    @app.get("/v1/models")
    async def models() -> str:
        return "models"

    @app.get("/metrics")
    async def metrics() -> str:
        return "metrics"

    return app


STATES = [
    (State.LOADING, 200, 503, "still loading"),
    (State.READY, 200, 200, ""),
    (State.DRAINING, 200, 503, "shutting down"),
    (State.DEAD, 503, 503, "burnt out"),
]


@pytest.mark.parametrize(
    ("state", "live", "ready", "words", "loaded"),
    [(*row, loaded) for row in STATES for loaded in (False, True) if loaded or row[0] is not State.READY],
)
async def test_probes_and_requests_are_answered_in_every_state(
    state: State, live: int, ready: int, words: str, loaded: bool
) -> None:
    health = Health(state, "burnt out")
    gate = Gate(health)
    if loaded:
        gate.open(application(health))
    async with client(gate) as http:
        assert (await http.get("/health/live")).status_code == live
        if loaded:
            assert [(await http.head(path)).status_code for path in ("/health/live", "/health")] == [live, ready]
        for path in ("/health/ready", "/health", "/v1/models", "/v1/nowhere"):
            response = await http.get(path)
            if path == "/v1/nowhere" and ready == 200:
                assert response.status_code == 404
                continue
            assert response.status_code == ready, path
            if ready == 503:
                assert int(response.headers["retry-after"]) >= 1
                assert words in response.json()["error"]["message"]
                assert response.json()["error"]["type"] == "unavailable_error"
        if loaded:
            assert (await http.get("/metrics")).json() == "metrics"
            assert (await http.get("/version")).json() == {"version": weft.__version__}


def test_the_first_reason_of_death_stays() -> None:
    health = Health()
    health.die("first")
    health.die("second")
    assert (health.state, health.reason) == (State.DEAD, "first")


async def test_requests_are_counted_until_they_are_answered_and_probes_are_not() -> None:
    go = asyncio.Event()
    gate = Gate(Health(State.READY))

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/v1/quick":
            await go.wait()
        if scope["path"] == "/v1/fails":
            raise RuntimeError("a fault")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gate.open(slow)
    assert "/metrics" in ALWAYS
    await asyncio.wait_for(gate.idle(), 1)
    async with client(gate) as http:
        paths = ("/v1/models", "/v1/fails", "/metrics")
        calls = [asyncio.create_task(http.get(path)) for path in paths]
        await asyncio.sleep(0.05)
        assert gate.running == 2
        await http.get("/v1/quick")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gate.idle(), 0.05)
        go.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result).__name__ for result in results] == ["Response", "RuntimeError", "Response"]
    await asyncio.wait_for(gate.idle(), 1)
    assert gate.running == 0


async def test_health_is_vllms_path_for_ready() -> None:
    health = Health(State.READY)
    async with client(application(health)) as http:
        assert (await http.get("/health")).json() == (await http.get("/health/ready")).json() == {"status": "ready"}
        assert (await http.get("/health/live")).json() == {"status": "live"}
