"""Results that outlive their run: after each row the JSON is written anew, whole, and says which rows are missing.

Standard library only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common

Row = dict[str, Any]
Claims = Callable[[Mapping[str, Row]], dict[str, float]]


class Results:
    """The rows of a run by name. A row has `error` where it failed, `skipped` where it cannot be had on this device.

    planned: the names of all rows. about: further keys of the JSON, `device` and `commit` among them. claims: what
    follows from the rows there are.
    """

    def __init__(self, arguments: argparse.Namespace, planned: Sequence[str], about: Row, claims: Claims) -> None:
        self.rows: dict[str, Row] = {}
        self._arguments = arguments
        self._planned = tuple(planned)
        self._about = about
        self._claims = claims

    def resume(self) -> None:
        """Take over the rows of the file that are planned, failed ones too. Raises ValueError for another device's."""
        path = self._arguments.json
        if not path.exists():
            return
        content = json.loads(path.read_text())
        for key in ("device", "commit", "quick"):
            if content[key] != self._about[key]:
                raise ValueError(
                    f"--resume: {path} has rows with {key} = {content[key]!r}, and now it is {self._about[key]!r}; "
                    "give another --json file, or leave --resume out"
                )
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
        rows, more = list(self.rows.values()), {"missing": self.missing(), **self._about}
        common.write_json(self._arguments, self.claims(), rows, more=more)
