"""What becomes of a share that a lane is given and cannot have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from weft.core.plan import Lane

logger = logging.getLogger(__name__)

Share = TypeVar("Share", bound=Hashable)
Found = TypeVar("Found")


class Shares(Generic[Share]):
    """The share that a lane was last told to have, and those that it could not have. One thread uses it."""

    def __init__(self) -> None:
        self._told: Share | None = None
        self._refused: set[Share] = set()

    def adopt(self, lane: Lane, share: Share, move: Callable[[Share], Found]) -> Found | None:
        """What `move` gives; None where the lane has been told of that share already, or cannot have it.

        move: what it raises leaves the lane with the share that it has, and its steps go on there. Why is logged, once
        for each share; it is tried again when the lane is told of that share after another.
        """
        if share == self._told:
            return None
        self._told = share
        try:
            return move(share)
        except Exception as error:
            if share not in self._refused:
                self._refused.add(share)
                words = f"{type(error).__name__}: {error}"
                logger.warning("lane %s keeps the share that it has, not %s: %s", lane.value, share, words)
            return None
