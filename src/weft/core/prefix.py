"""The prefix cache: finds the blocks that hold the KV of a prompt's beginning.

Each full block has a digest over its tokens and the digest before it, so a digest stands for the whole prefix. The
first link is the request's `cache_salt`: other salts share nothing. The hash is keyed with a random key of this
process, and a hit is believed only after its tokens were compared, so no client can make prompts collide.

Only blocks whose writing ticket is complete are inserted (rule 1); the pool says when a block is evicted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Entry:
    block: int
    parent: bytes
    tokens: tuple[int, ...]


class PrefixCache:
    """digest -> block, for full blocks of `block_size` tokens. key: at most 64 secret bytes."""

    def __init__(self, block_size: int, key: bytes) -> None:
        self.block_size = block_size
        self._key = key
        self._entries: dict[bytes, Entry] = {}
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def extend(self, digests: list[bytes], tokens: Tokens[int], salt: str) -> None:
        """Bring the digests of a sequence up to its tokens: digests[0] is the salt's, digests[i + 1] full block i's."""
        size = self.block_size
        if not digests:
            first = salt.encode(errors="surrogatepass")  # JSON can carry half of a surrogate pair
            digests.append(blake2b(first, digest_size=DIGEST_BYTES, key=self._key).digest())
        for i in range(len(digests) - 1, len(tokens) // size):
            words = array("Q", tokens[i * size : (i + 1) * size]).tobytes()
            digests.append(blake2b(digests[i] + words, digest_size=DIGEST_BYTES, key=self._key).digest())

    def match(self, digests: list[bytes], tokens: Tokens[int]) -> list[int]:
        """The blocks that hold the longest cached prefix of the tokens, but never their last one: whoever asks needs
        the logits that follow it, so it must be computed."""
        size, found = self.block_size, []
        for i in range(min(len(digests) - 1, (len(tokens) - 1) // size)):
            entry = self._entries.get(digests[i + 1])
            if entry is None or entry.parent != digests[i] or entry.tokens != tuple(tokens[i * size : (i + 1) * size]):
                break
            found.append(entry.block)
        return found

    def insert(self, digests: list[bytes], index: int, tokens: Tokens[int], block: int) -> bool:
        """Make full block `index` of a sequence findable. False when another block with the same content already is."""
        digest = digests[index + 1]
        if digest in self._entries:
            return False
        size = self.block_size
        self._entries[digest] = Entry(block, digests[index], tuple(tokens[index * size : (index + 1) * size]))
        self._digests[block] = digest
        return True

    def forget(self, block: int) -> None:
        """The block is evicted. Blocks after it in the chain can no longer be reached, and age out by themselves."""
        del self._entries[self._digests.pop(block)]

    def clear(self) -> None:
        self._entries.clear()
        self._digests.clear()
