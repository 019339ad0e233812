"""What all ranks must have in common, compared once in the store in which they meet: for ranks that cannot compare what
they are about to do at each seam, since their seams run on devices."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from weft.errors import DeviceError


def compare(store: Any, rank: int, ranks: int, common: tuple[Any, ...], *, timeout: float) -> None:
    """store: of torch.distributed. timeout: seconds that ranks may be apart. Raises DeviceError, on all ranks, which
    names one that has something else, or does not come."""
    own, keys = repr(common), [f"rank {other} has" for other in range(ranks)]
    try:
        store.set(keys[rank], own)
        for other, key in enumerate(keys):
            store.wait([key], timedelta(seconds=timeout))
            theirs = store.get(key).decode()
            if theirs != own:
                raise DeviceError(f"rank {other} would launch other work than rank {rank}: {theirs}, not {own}")
    except RuntimeError as error:
        raise DeviceError(f"rank {rank} waits for the others, to compare what they would launch: {error}") from error
