"""Ranks that are processes of one host, joined through shared memory by the C++ extension (csrc/seam.h).

The ranks' partial sums cross once, chunk by chunk, and never leave the caches on their way.
"""

from __future__ import annotations

from pathlib import Path

from weft import _native
from weft.errors import DeviceError
from weft.kernels.cpu import CpuKernels
from weft.weave.native import NativeCollective

SLOT_BYTES = 1 << 20  # four for each rank; a row of partial sums for every other rank must fit into one
SPIN = 100e-6  # seconds that a rank looks for the others before it sleeps, where nobody else wants its core
_FOLDER = Path("/dev/shm")


class ShmCollective(NativeCollective):
    """One rank. `start` gives the first chunk (all that is not large), `finish` does the rest."""

    def __init__(
        self,
        name: str,
        rank: int,
        ranks: int,
        kernels: CpuKernels,
        *,
        timeout: float,
        slot_bytes: int = SLOT_BYTES,
        spin: bool = True,
    ) -> None:
        """Meets the other ranks of the group `name`, which have the same ranks and slot_bytes.

        timeout: seconds that a rank waits for another at most, here and at any seam. spin: as `let_spin`.
        Raises DeviceError.
        """
        try:
            self._memory = _native.SeamGroup(str(_FOLDER / name), rank, ranks, slot_bytes, timeout, _seconds(spin))
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"rank {rank} cannot join the ranks of this host: {error}") from error
        super().__init__(self._memory, kernels)

    def let_spin(self, may: bool) -> None:
        self._memory.spin = _seconds(may)


def _seconds(spins: bool) -> float:
    return SPIN if spins else 0.0
