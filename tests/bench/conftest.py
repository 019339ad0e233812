"""A small server on a real socket that streams completions as it is told to, written apart from the client's parser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Exchange:
    """One POST request and the means to answer it."""

    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        await self._write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def begin(self) -> None:
        await self._write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def event(self, content: Any) -> None:
        data = content if isinstance(content, bytes) else b"data: " + json.dumps(content).encode() + b"\n\n"
        await self._write(b"%x\r\n" % len(data) + data + b"\r\n")

    async def end(self) -> None:
        await self.event(b"data: [DONE]\n\n")
        await self._write(b"0\r\n\r\n")

    async def stream(self) -> None:
        """As many tokens as were asked for, a few milliseconds apart, then the finish and the usage."""
        await self.begin()
        await self.event(b": keep-alive\n\n")
        count = self.body["max_tokens"]
        for number in range(count):
            await asyncio.sleep(0.002)
            finish = "length" if number == count - 1 else None
            await self.event({"choices": [{"index": 0, "text": f" t{number}", "finish_reason": finish}]})
        usage = {"prompt_tokens": len(self.body.get("prompt", "")), "completion_tokens": count}
        await self.event({"choices": [], "usage": usage})
        await self.end()

    async def _write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


Handler = Callable[[Exchange], Awaitable[None]]


@dataclass
class FakeServer:
    """handle: answers POST requests. bodies, paths, headers: what was asked, in order. peak: most at one time."""

    handle: Handler
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    under_way: int = 0
    peak: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            _, path, _ = head[0].split(" ")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
            self.paths.append(path)
            self.headers.append(headers)
            if path.endswith("/models"):
                await Exchange({}, writer).reply(200, {"data": [{"id": "fake"}]})
                return
            self.bodies.append(json.loads(body))
            self.under_way += 1
            self.peak = max(self.peak, self.under_way)
            await self.handle(Exchange(self.bodies[-1], writer))
            self.under_way -= 1
        finally:
            writer.close()


@pytest.fixture
async def start_server() -> AsyncIterator[Callable[..., Awaitable[FakeServer]]]:
    """Start a server with a handler; it ends with the test."""
    running = []

    async def start(handle: Handler = Exchange.stream) -> FakeServer:
        fake = FakeServer(handle)
        server = await asyncio.start_server(fake.on_connection, "127.0.0.1", 0)
        fake.port = server.sockets[0].getsockname()[1]
        running.append(server)
        return fake

    yield start
    for server in running:
        server.close()
        await server.wait_closed()
