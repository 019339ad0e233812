"""Results that outlive their run: after each row the JSON is written anew, whole, and says which rows are missing.

Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

Row = dict[str, Any]
Claims = Callable[[Mapping[str, Row]], dict[str, float]]


class Results:
    """The rows of a run by name. A row has `error` where it failed, `skipped` where it cannot be had on this device.

    planned: the names of all rows. about: what the figures were taken on. claims: what follows from the rows there are.
    """

    def __init__(self, path: Path | None, planned: Sequence[str], about: Row, claims: Claims) -> None:
        self.rows: dict[str, Row] = {}
        self.notes: list[str] = []
        self._path = path
        self._planned = tuple(planned)
        self._about = about
        self._claims = claims

    def resume(self) -> None:
        """Take over the rows of the file that are planned, failed ones too. Raises ValueError for another device's."""
        if self._path is None or not self._path.exists():
            return
        content = json.loads(self._path.read_text())
        for key in ("device", "commit"):
            if content[key] != self._about[key]:
                raise ValueError(
                    f"--resume: {self._path} has rows of {key} {content[key]!r}, and this is {self._about[key]!r}; "
                    "give another --json file, or leave --resume out"
                )
        self.notes = content["notes"]
        self.rows = {row["name"]: row for row in content["rows"] if row["name"] in self._planned}

    def add(self, name: str, row: Row) -> None:
        self.rows[name] = {"name": name, **row}
        self.write()

    def missing(self) -> list[str]:
        return [name for name in self._planned if name not in self.rows]

    def failed(self) -> list[str]:
        return [name for name, row in self.rows.items() if "error" in row]

    def claims(self) -> dict[str, float]:
        return self._claims(self.rows)

    def write(self) -> None:
        """Replace the file: whoever is killed meanwhile leaves the old one or the new one."""
        if self._path is None:
            return
        content = {
            "claims": self.claims(),
            "rows": list(self.rows.values()),
            "missing": self.missing(),
            "notes": self.notes,
            **self._about,
            "machine": common.machine(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        }
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        beside.replace(self._path)
