"""How much of some memory lies on huge pages. The kernel decides; the start-up notes tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def huge_bytes(ranges: Iterable[tuple[int, int]], smaps: Path = Path("/proc/self/smaps")) -> int | None:
    """Bytes of (address, bytes) ranges on huge pages; None where the system does not tell.

    The kernel counts by memory area, and may have joined a range with its neighbour: then this is the most that can be.
    """
    try:
        text = smaps.read_text()
    except OSError:
        return None
    wanted = sorted((start, start + size) for start, size in ranges if size)
    found = 0
    for start, end, huge in _areas(text):
        inside = sum(max(0, min(end, last) - max(start, first)) for first, last in wanted)
        found += min(huge, inside)
    return found


def _areas(text: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, bytes on huge pages) of the areas that have any."""
    start = end = 0
    for line in text.splitlines():
        if area := _AREA.match(line):
            start, end = int(area[1], 16), int(area[2], 16)
        elif line.startswith("AnonHugePages:") and (kibibytes := int(line.split()[1])):
            yield start, end, kibibytes * 1024
