"""Results that outlive their run: after each row the JSON is written anew, whole, and says which rows are missing.

Standard library only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import common

Row = dict[str, Any]
Claims = Callable[[Mapping[str, Row]], dict[str, float]]


class Results:
    """The rows of a run by name. A row has `error` where it failed, `skipped` where it cannot be had on this device,
    and the commit that it was measured on.

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
        """Take over the rows of the file, of other commits too. Raises ValueError for another device's."""
        path = self._arguments.json
        if not path.exists():
            return
        content = json.loads(path.read_text())
        for key in ("device", "quick"):
            if content[key] != self._about[key]:
                raise ValueError(
                    f"--resume: {path} has rows with {key} = {content[key]!r}, and now it is {self._about[key]!r}; "
                    "give another --json file, or leave --resume out"
                )
        self.rows = {row["name"]: {**row, "commit": row.get("commit", content["commit"])} for row in content["rows"]}

    def todo(self, names: Iterable[str], again: Collection[str]) -> list[str]:
        """Of these names: those to be measured again, then those that are missing, then those that have failed."""

        def turn(name: str) -> int:
            if name in again:
                return 0
            if name not in self.rows:
                return 1
            return 2 if "error" in self.rows[name] else 3

        return sorted((name for name in names if turn(name) < 3), key=turn)

    def add(self, name: str, row: Row) -> None:
        self.rows[name] = {"name": name, "commit": self._about["commit"], **row}
        self.write()

    def missing(self) -> list[str]:
        return [name for name in self._planned if name not in self.rows]

    def older(self) -> list[str]:
        """Those of another commit."""
        return [name for name, row in self.rows.items() if row["commit"] != self._about["commit"]]

    def failed(self) -> list[str]:
        return [name for name, row in self.rows.items() if "error" in row]

    def claims(self) -> dict[str, float]:
        return self._claims(self.rows)

    def write(self) -> None:
        rows, more = list(self.rows.values()), {"missing": self.missing(), **self._about}
        common.write_json(self._arguments, self.claims(), rows, more=more)
