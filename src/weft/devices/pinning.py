"""Where a lane's thread runs, and how many threads torch has there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weft.devices.cores import Cores
from weft.kernels import REFERENCE


def pin(kernels: str, cores: Cores) -> None:
    """Put the calling thread where these kernels expect it: it is the one on the first of their cores."""
    alone = kernels != REFERENCE
    os.sched_setaffinity(0, cores[:1] if alone else cores)
    torch.set_num_threads(1 if alone else len(cores))


@contextmanager
def pinned(kernels: str, cores: Cores) -> Iterator[None]:
    """The same for a while."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    pin(kernels, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
