"""What has killed other engines: oversized, impossible and malformed requests, and clients that go away.

Against a real server on the simulated device with a pool of 16 blocks. After each test the server still serves, and
every block is back within a second. The last test does some of it to the cuda device, which is interpreted where there
is no GPU, and gets longer.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from weft.devices.simulated import continuation
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

Served = Callable[..., AbstractContextManager[str]]
TOKENIZER = Tokenizer.from_folder(resolve_model("builtin"))
TEXT = "/v1/completions"
BLOCKS, BLOCK_SIZE = 16, 16
POOL = BLOCKS * BLOCK_SIZE
HELD = re.compile(r'^weft:kv_blocks\{.*state="(held|pinned)".*\} ([0-9.]+)$', re.MULTILINE)
BUSY = re.compile(r"^weft:num_requests_(running|waiting)\{.*\} ([0-9.]+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    flags = ["--device", "simulated", "--num-blocks", str(BLOCKS), "--block-size", str(BLOCK_SIZE)]
    with served(*flags, "--max-num-queued-reqs", "200", "--log-level", "error") as address:
        yield address


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
        back_at_baseline(client)
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}
        answer = client.post(TEXT, json=body)
        assert answer.json()["choices"][0]["token_ids"] == list(continuation([1, 2, 3], 4, TOKENIZER.vocabulary))


def back_at_baseline(client: httpx.Client, seconds: float = 1.0) -> None:
    end = time.monotonic() + seconds
    while True:
        text = client.get("/metrics").text
        found = HELD.findall(text) + BUSY.findall(text)
        assert len(found) == 4, text
        if all(float(value) == 0 for _, value in found):
            return
        assert time.monotonic() < end, found
        time.sleep(0.02)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_larger_than_the_pool(http: httpx.Client, stream: bool) -> None:
    error = error_of(http.post(TEXT, json={"prompt": [5] * POOL, "max_tokens": 1, "stream": stream}), 400)
    assert error["code"] == "request_too_large" and str(POOL) in error["message"]
    assert str(BLOCKS) in error["message"] and "--num-blocks" in error["message"]


def test_a_sequence_that_outgrows_the_pool(http: httpx.Client) -> None:
    body = {"prompt": [5] * (POOL - 20), "max_tokens": 100, "ignore_eos": True}
    error = error_of(http.post(TEXT, json=body), 400)
    assert error["code"] == "request_too_large" and "max_tokens" in error["message"]
    response = http.post(TEXT, json={**body, "stream": True})
    *_, last, end = response.text.split("\n\n")
    assert response.status_code == 200 and end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_too_large"


def test_an_impossible_request(http: httpx.Client) -> None:
    for fields in ({"max_tokens": 2**63}, {"n": 10**9}, {"max_tokens": 2047}, {"prompt": [5] * 5000}):
        error_of(http.post(TEXT, json={"prompt": [5] * 10, **fields}), 400)


def test_more_than_fits_at_one_time(http: httpx.Client) -> None:
    """Eight times the pool: preemption all the time, and every token is the oracle's."""
    prompts = [[number, 7, 9] for number in range(40)]
    body = {"prompt": prompts, "max_tokens": 50, "ignore_eos": True, "return_token_ids": True}
    choices = http.post(TEXT, json=body).json()["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        assert choice["token_ids"] == list(continuation(prompt, 50, TOKENIZER.vocabulary))
    preemptions = re.search(r"^weft:num_preemptions_total\{.*\} ([0-9.]+)$", http.get("/metrics").text, re.MULTILINE)
    assert preemptions is not None and float(preemptions[1]) > 0


def go_away(url: str, count: int, body: dict[str, Any], *, stream: bool, reset: bool) -> None:
    """So many clients ask, and hang up before they have their answer."""
    parts = urlsplit(url)
    data = json.dumps({**body, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    clients = [socket.create_connection((parts.hostname, parts.port)) for _ in range(count)]
    for client in clients:
        client.sendall(head.encode() + data)
    if stream:
        assert clients[0].recv(15).startswith(b"HTTP/1.1 200")
    time.sleep(0.1)
    for client in clients:
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_go_away(http: httpx.Client, url: str, stream: bool, reset: bool) -> None:
    go_away(url, 20, {"prompt": [3, 4], "max_tokens": 200}, stream=stream, reset=reset)
    back_at_baseline(http)


def test_half_characters_in_the_stream(http: httpx.Client) -> None:
    """The simulated device draws bytes that are no UTF-8 as often as those that are."""
    body = {"prompt": [11, 12], "max_tokens": 200, "ignore_eos": True, "return_token_ids": True}
    whole = http.post(TEXT, json=body).json()["choices"][0]
    assert "\ufffd" in whole["text"]
    events = http.post(TEXT, json={**body, "stream": True}).content.decode("utf-8", errors="strict").split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == whole["token_ids"]


BAD: list[Any] = [
    {"messages": []},
    {"prompt": "x", "stop": ["a"] * 10_000},
    b'{"prompt": "x", "temperature": NaN}',
    {"prompt": ["x"] * 10**6},
    {"prompt": "x", "logit_bias": {"cat": 1}},
    b'{"a":' * 50_000,
    b'{"prompt": "\xc3\x28"}',
    b'{"prompt": "\\udfff"}',
]


@pytest.mark.parametrize("body", BAD, ids=lambda body: str(body)[:40])
def test_malformed_bodies(http: httpx.Client, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for path in (TEXT, "/v1/chat/completions", "/tokenize"):
        error_of(http.post(path, content=data, headers={"content-type": "application/json"}), 400)


def test_a_hundred_megabytes(http: httpx.Client) -> None:
    body = b'{"prompt": "' + b"x" * (100 * 2**20) + b'"}'
    error_of(http.post(TEXT, content=body, headers={"content-type": "application/json"}), 413)


def test_a_queue_that_is_full(http: httpx.Client) -> None:
    response = http.post(TEXT, json={"prompt": [[5, 6]] * 1000, "max_tokens": 100, "ignore_eos": True})
    assert error_of(response, 429)["code"] == "queue_full" and int(response.headers["retry-after"]) > 0


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_cuda_device_outlives_them(served: Served, tiny_model: Path, tmp_path: Path) -> None:
    builtin = resolve_model("builtin")
    for path in (*tiny_model.iterdir(), builtin / "tokenizer.json", builtin / "tokenizer_config.json"):
        shutil.copy(path, tmp_path)
    flags = ["--device", "cuda", "--num-blocks", "4", "--max-num-seqs", "4", "--max-model-len", "64"]
    body = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with (
        served(str(tmp_path), *flags, "--max-num-queued-reqs", "20", "--log-level", "error") as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        first = client.post(TEXT, json=body).json()["choices"][0]["token_ids"]
        error_of(client.post(TEXT, json={"prompt": [5] * 64, "max_tokens": 1}), 400)
        error_of(client.post(TEXT, json={**body, "max_tokens": 2**63}), 400)
        error_of(client.post(TEXT, json={**body, "logit_bias": {"4096": 1}}), 400)
        error_of(client.post(TEXT, json={**body, "prompt": [[5, 6]] * 50}), 429)
        together = client.post(TEXT, json={**body, "prompt": [[5, 6, 7]] * 6, "max_tokens": 14}).json()["choices"]
        assert {tuple(choice["token_ids"][:3]) for choice in together} == {tuple(first)}  # preempted or not
        go_away(address, 6, {"prompt": [3, 4], "max_tokens": 40, "temperature": 1}, stream=True, reset=True)
        back_at_baseline(client, 30.0)
        assert client.post(TEXT, json=body).json()["choices"][0]["token_ids"] == first
