"""Logging of both processes: one line on standard error for each entry."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def set_up(level: str) -> None:
    """level: debug, info, warning or error. The libraries below weft speak up from warning on, or at debug."""
    logging.basicConfig(format=FORMAT, level=logging.DEBUG if level == "debug" else logging.WARNING, force=True)
    logging.getLogger("weft").setLevel(level.upper())
