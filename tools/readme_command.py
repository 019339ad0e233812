"""Print the N-th `sh` block of README.md, so that CI runs the very text that a newcomer pastes."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def block(text: str, number: int) -> str:
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    if not 1 <= number <= len(blocks):
        raise SystemExit(f"README.md has {len(blocks)} sh blocks, not {number}")
    return blocks[number - 1]


if __name__ == "__main__":
    sys.stdout.write(block((Path(__file__).parent.parent / "README.md").read_text(), int(sys.argv[1])))
