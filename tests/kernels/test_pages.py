"""Bytes on huge pages, from the kernel's own account."""

from __future__ import annotations

from pathlib import Path

from weft.kernels.pages import huge_bytes

SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me ac sd hg
7f0000400000-7f0000c00000 rw-p 00000000 00:00 0                          [anon: x]
AnonHugePages:      8192 kB
7f0000c00000-7f0000d00000 r--p 00000000 08:01 1234                       /usr/lib/libc.so
AnonHugePages:         0 kB
"""


def test_only_the_given_ranges_count(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(SMAPS)
    assert huge_bytes([], smaps) == 0
    assert huge_bytes([(0x7F0000000000, 4 << 20)], smaps) == 2 << 20
    assert huge_bytes([(0x7F0000000000, 1 << 20)], smaps) == 1 << 20
    assert huge_bytes([(0x7F0000300000, 3 << 20)], smaps) == (1 << 20) + (2 << 20)
    assert huge_bytes([(0x7F0000400000, 1 << 20), (0x7F0000600000, 1 << 20)], smaps) == 2 << 20
    assert huge_bytes([(0x7F0000C00000, 1 << 20), (0x1000, 1 << 20)], smaps) == 0


def test_a_system_that_does_not_tell_gives_none(tmp_path: Path) -> None:
    assert huge_bytes([(0, 1)], tmp_path / "smaps") is None


def test_this_process_can_be_asked() -> None:
    assert huge_bytes([(0, 2**47)]) is not None
