"""Fail when the line coverage of a package is under its floor. Usage: check_coverage.py coverage.json core=90"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def share(report: dict[str, dict[str, dict[str, dict[str, int]]]], package: str) -> float:
    """Percent of the package's statements that ran."""
    rows = [row["summary"] for name, row in report["files"].items() if f"weft/{package}/" in name]
    statements = sum(row["num_statements"] for row in rows)
    if not statements:
        raise SystemExit(f"the coverage report has no file of weft/{package}")
    return 100 * sum(row["covered_lines"] for row in rows) / statements


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    low = False
    for argument in sys.argv[2:]:
        package, floor = argument.split("=")
        percent = share(report, package)
        low |= percent < float(floor)
        print(f"coverage of weft/{package}: {percent:.1f} % (floor {floor} %)")
    sys.exit(low)


if __name__ == "__main__":
    main()
