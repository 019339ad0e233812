"""Keys: which requests pass, and which files and keys are taken at start-up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from weft.config import ServerConfig
from weft.errors import ConfigError
from weft.server.app import create_app
from weft.server.auth import AuthMiddleware, load_keys
from weft.server.gate import guard

KEYS = ("first-key", "second-key")
# The only paths that need no key.
PROBES = ("/health/live", "/health/ready")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that anybody may be let into."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def client(app: Any, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://weft", headers=headers)


def every_route(routes: Iterable[Any]) -> Iterator[tuple[str, set[str]]]:
    """Path and methods, also of routers within."""
    for route in routes:
        inner = getattr(route, "original_router", route)
        if hasattr(inner, "routes"):
            yield from every_route(inner.routes)
        else:
            yield route.path, getattr(route, "methods", None) or {"GET"}


async def test_every_route_of_the_application_needs_a_key_but_the_probes(sites: Callable[..., Any]) -> None:
    site = sites(api_key=KEYS)
    app = create_app(site.context)
    paths = {(method, path) for path, methods in every_route(app.routes) for method in methods}
    assert {"/v1/chat/completions", "/v1/models", "/tokenize", "/metrics", "/openapi.json", "/version"} <= {
        path for _, path in paths
    }
    async with client(guard(app, site.context.config, KEYS)) as http:
        for method, path in sorted(paths):
            response = await http.request(method, path)
            if path in PROBES:
                assert response.status_code == 200, (method, path)
            else:
                assert response.status_code == 401, (method, path)
                assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"
        for path in (
            "/docs",
            "/redoc",
            "/nowhere",
            "/",
            "/health/live/",
            "/health//live",
            "/HEALTH/LIVE",
            "/health/live%2f",
        ):
            assert (await http.get(path)).status_code == 401, path


@pytest.mark.parametrize(
    "header", ["Bearer first-key", "Bearer second-key", "bearer first-key", "BEARER second-key", "Bearer  first-key "]
)
async def test_each_key_opens(header: str) -> None:
    async with client(AuthMiddleware(echo, KEYS), authorization=header) as http:
        assert (await http.get("/v1/models")).text == "inside"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "first-key",
        "Basic first-key",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-keyy",
        "Bearer FIRST-KEY",
        "Bearer first-key,second-key",
        "Bearer first-key second-key",
        "Bearer first-keysecond-key",
    ],
)
async def test_anything_else_gets_401_in_openais_shape(header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with client(AuthMiddleware(echo, KEYS), **headers) as http:
        response = await http.get("/v1/models")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert not any(key in response.text for key in KEYS)


async def test_two_authorization_headers_are_none() -> None:
    async with client(AuthMiddleware(echo, KEYS)) as http:
        headers = [("authorization", "Bearer first-key"), ("authorization", "Bearer wrong")]
        assert (await http.get("/v1/models", headers=headers)).status_code == 401


async def test_bytes_that_are_no_text_are_no_key() -> None:
    async with client(AuthMiddleware(echo, KEYS)) as http:
        response = await http.get("/v1/models", headers=[(b"authorization", b"Bearer \xff\xfe\x80")])
    assert response.status_code == 401


async def test_a_stranger_is_answered_before_his_body_is_read_and_what_he_sends_is_thrown_away() -> None:
    sent: list[Message] = []
    pieces = [True, True, False]

    async def receive() -> Message:
        assert sum(len(message.get("body", b"")) for message in sent) > 0
        return {"type": "http.request", "body": b"x" * 10**6, "more_body": pieces.pop(0)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
    await AuthMiddleware(echo, KEYS)(scope, receive, send)
    assert sent[0]["status"] == 401 and (b"connection", b"close") in sent[0]["headers"]
    assert not pieces and not sent[-1].get("more_body")


async def test_other_kinds_of_connection_are_refused() -> None:
    with pytest.raises(RuntimeError, match="websocket"):
        await AuthMiddleware(echo, KEYS)({"type": "websocket", "path": "/health/live"}, None, None)  # type: ignore[arg-type]


async def test_without_keys_everybody_is_let_in() -> None:
    async with client(guard(echo, ServerConfig(), ())) as http:
        assert (await http.get("/v1/models")).text == "inside"


async def test_a_page_of_an_allowed_origin_may_ask_before_it_sends_its_key() -> None:
    guarded = guard(echo, ServerConfig(allowed_origins=("https://app.example",)), KEYS)
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with client(guarded) as http:
        preflight = await http.options("/v1/completions", headers={"origin": "https://app.example", **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in preflight.headers
        other = await http.options("/v1/completions", headers={"origin": "https://evil.example", **asks})
        assert "access-control-allow-origin" not in other.headers
        unkeyed = await http.post("/v1/completions", headers={"origin": "https://app.example"})
        assert unkeyed.status_code == 401 and "access-control-allow-origin" in unkeyed.headers
    async with client(guard(echo, ServerConfig(), KEYS)) as http:
        closed = await http.options("/v1/completions", headers={"origin": "https://app.example", **asks})
        assert closed.status_code == 401 and "access-control-allow-origin" not in closed.headers


def test_keys_come_from_the_flag_and_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n  second-key \nthird-key\r\n")
    file.chmod(0o600)
    assert load_keys(("first-key",), file) == ("first-key", "second-key", "third-key")
    assert load_keys((), None) == ()


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"# only a comment\n", b"\xff\xfe", b"two words\n", "schlüssel\n".encode()]
)
def test_a_key_file_that_holds_no_usable_key_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="--api-key-file") as caught:
        load_keys((), file)
    assert str(file) in caught.value.message


def test_a_key_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_keys((), path)
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(2**40)  # a hole: it would not fit in memory
    with pytest.raises(ConfigError, match="larger than"):
        load_keys((), large)


@pytest.mark.parametrize("key", ["", " ", "a b", "a\nb", "clé", "a\x00"])
def test_a_key_that_no_client_could_send_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key") as caught:
        load_keys((key,), None)
    assert len(key) < 3 or key not in caught.value.message


def test_a_file_that_everybody_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("key")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load_keys((), file)
    assert "read by every user" in caplog.text
    caplog.clear()
    file.chmod(0o600)
    load_keys((), file)
    assert not caplog.text
