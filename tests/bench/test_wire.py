"""The HTTP and event parsers: any cut of the same bytes gives the same answer, and broken bytes give an error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.bench.wire import EventParser, ResponseParser, WireError, error_words, parse_url, request_bytes
from weft.errors import ConfigError

EVENTS = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=6)


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[i:j] for i, j in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.data(), EVENTS, st.sampled_from(["\n", "\r\n"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_chunked_event_stream_reads_the_same_however_it_is_cut(
    data: st.DataObject, texts: list[str], newline: str, comments: bool
) -> None:
    payload = "".join(
        (f": ping{newline}{newline}" if comments else "") + f"event: x{newline}data: {text}{newline}{newline}"
        for text in texts
    ).encode()
    chunks = [part for part in data.draw(cut(payload)) if part]
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in chunks) + b"0\r\n\r\n"
    parser, events, found = ResponseParser(), EventParser(), []
    for part in data.draw(cut(raw)):
        parser.feed(part)
        found += events.feed(parser.take())
    parser.close()
    assert parser.done and parser.status == 200
    assert [event.decode() for event in found] == texts


@given(st.data(), st.binary(max_size=40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_plain_body_reads_the_same_however_it_is_cut(data: st.DataObject, body: bytes, with_length: bool) -> None:
    length = f"Content-Length: {len(body)}\r\n" if with_length else ""
    raw = f"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 404 Not Found\r\n{length}\r\n".encode() + body
    parser = ResponseParser()
    for part in data.draw(cut(raw)):
        parser.feed(part)
    parser.close()
    assert (parser.status, parser.take(), parser.done) == (404, body, True)


@given(st.binary(max_size=80))
@settings(max_examples=100, deadline=None)
def test_garbage_is_an_error_and_nothing_else(raw: bytes) -> None:
    parser = ResponseParser()
    with pytest.raises(WireError):
        parser.feed(raw)
        parser.close()


@pytest.mark.parametrize("size", [b"-5", b"0x10", b"1_0", b"", b"zz", b"f" * 17])
def test_impossible_chunk_sizes_are_refused(size: bytes) -> None:
    parser = ResponseParser()
    with pytest.raises(WireError, match="chunk size"):
        parser.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n")


@pytest.mark.parametrize("raw", [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b"HTTP/1.1 200 OK\r\n", b""])
def test_an_answer_that_breaks_off_is_an_error(raw: bytes) -> None:
    parser = ResponseParser()
    parser.feed(raw)
    with pytest.raises(WireError, match="closed before"):
        parser.close()


def test_endless_headers_are_refused() -> None:
    with pytest.raises(WireError, match="headers"):
        ResponseParser().feed(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20000)


@pytest.mark.parametrize(
    ("url", "netloc", "base"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", ""),
        ("localhost:80/v1/", "localhost:80", ""),
        ("https://example.org/models/v1", "example.org:443", "/models"),
        ("http://[::1]:9", "[::1]:9", ""),
    ],
)
def test_urls(url: str, netloc: str, base: str) -> None:
    address = parse_url(url)
    assert (address.netloc, address.base) == (netloc, base)
    assert request_bytes(address, "GET", "/v1/models", b"", {}).startswith(f"GET {base}/v1/models ".encode())


URLS = ["ftp://x", "http://", "http://x:99999", "http://x:y", "http://a b", "http://[::1", "http://a..b", "x/é"]


@pytest.mark.parametrize("url", URLS)
def test_impossible_urls_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        parse_url(url)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "queue is full", "code": "queue_full"}}', "queue is full"),
        (b'{"error": "plain"}', "plain"),
        (b"<html>no</html>", "<html>no</html>"),
        (b"{}", "no reason given"),
        (b"[1]", "[1]"),
    ],
)
def test_error_words(body: bytes, words: str) -> None:
    assert error_words(body) == words
