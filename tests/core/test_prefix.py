from __future__ import annotations

from typing import Any

from weft.core.prefix import DIGEST_BYTES, Entry, PrefixCache

TOKENS = tuple(range(100, 113))  # three full blocks of four, and one token


def filled(key: bytes = b"secret", salt: str = "") -> tuple[PrefixCache, list[bytes]]:
    cache, digests = PrefixCache(4, key), []
    cache.extend(digests, TOKENS, salt)
    for index, block in enumerate((7, 8, 9)):
        assert cache.insert(digests, index, TOKENS, block)
    return cache, digests


def found(cache: PrefixCache, tokens: Any, salt: str = "") -> list[int]:
    digests: list[bytes] = []
    cache.extend(digests, tokens, salt)
    return cache.match(digests, tokens)


def test_the_longest_cached_prefix_is_found() -> None:
    cache, digests = filled()
    assert len(digests) == 4 and all(len(digest) * 8 >= 128 for digest in digests) and DIGEST_BYTES >= 16
    assert found(cache, TOKENS) == [7, 8, 9]
    assert found(cache, (*TOKENS[:9], 1, 2, 3, 4)) == [7, 8]
    assert found(cache, (*TOKENS[:3], 1, *TOKENS[4:])) == []
    assert found(cache, TOKENS[4:]) == []


def test_a_hit_never_covers_the_last_token() -> None:
    cache, _ = filled()
    assert found(cache, TOKENS[:12]) == [7, 8]
    assert found(cache, TOKENS[:4]) == []
    assert found(cache, TOKENS[:5]) == [7]


def test_another_salt_shares_nothing() -> None:
    cache, _ = filled(salt="tenant a")
    assert found(cache, TOKENS, "tenant a") == [7, 8, 9]
    assert found(cache, TOKENS, "tenant b") == found(cache, TOKENS) == []


def test_any_text_that_json_can_carry_is_a_salt() -> None:
    cache, _ = filled(salt="\ud800")
    assert found(cache, TOKENS, "\ud800") == [7, 8, 9] and found(cache, TOKENS, "\ud801") == []


def test_digests_depend_on_the_secret_key() -> None:
    assert filled(b"one")[1] != filled(b"two")[1]


def test_tokens_are_compared_on_a_hit() -> None:
    cache, digests = filled()
    collided = Entry(8, digests[1], (1, 2, 3, 4))
    cache._entries[digests[2]] = collided
    assert found(cache, TOKENS) == [7]
    cache._entries[digests[2]] = Entry(8, b"another parent", TOKENS[4:8])
    assert found(cache, TOKENS) == [7]


def test_the_same_content_is_kept_once() -> None:
    cache, digests = filled()
    assert not cache.insert(digests, 0, TOKENS, 11)
    assert found(cache, TOKENS) == [7, 8, 9] and len(cache) == 3


def test_an_evicted_block_is_not_found_and_can_be_entered_again() -> None:
    cache, digests = filled()
    cache.forget(8)
    assert found(cache, TOKENS) == [7]
    assert cache.insert(digests, 1, TOKENS, 3)
    assert found(cache, TOKENS) == [7, 3, 9]
    cache.clear()
    assert found(cache, TOKENS) == [] and len(cache) == 0


def test_digests_grow_with_the_sequence() -> None:
    cache, whole = filled()
    grown: list[bytes] = []
    for length in range(len(TOKENS) + 1):
        cache.extend(grown, TOKENS[:length], "")
    assert grown == whole
