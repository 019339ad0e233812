"""What the devices without a model have in common: all but how time passes."""

from __future__ import annotations

from weft.core.plan import Capacity, Lane, Partition
from weft.devices.base import Description
from weft.devices.oracle import Executor, Faults, Lengths
from weft.errors import DeviceError

DESCRIPTION = Description("simulated", "none", "none", ("no model: each token is a hash of those before it",))


class Modelless:
    """Half of a Device (see base.py). partition: the shares of each lane; None for one mixed lane. executor: what
    computes tokens; None for the oracle, with faults."""

    def __init__(
        self,
        capacity: Capacity,
        partition: Partition | None,
        faults: Faults | None,
        executor: Lengths | None = None,
    ) -> None:
        self._executor = executor or Executor(capacity, faults or Faults())
        self._partition = partition
        self._lanes: tuple[Lane, ...] = (Lane.MIXED,) if partition is None else (Lane.PREFILL, Lane.DECODE)

    def capacity(self) -> Capacity:
        return self._executor.capacity

    def describe(self) -> Description:
        return DESCRIPTION

    def lanes(self) -> tuple[Lane, ...]:
        return self._lanes

    def partition(self) -> Partition | None:
        return self._partition

    def set_partition(self, partition: Partition) -> None:
        """The lanes may overlap: each share has its own limit, the sum has none."""
        if self._partition is None:
            raise DeviceError("the simulated device has one mixed lane; there is nothing to divide")
        shares = self.capacity().shares
        if min(partition.prefill, partition.decode) < 1 or max(partition.prefill, partition.decode) > shares:
            raise DeviceError(
                f"partition {partition.prefill}:{partition.decode} is impossible; each lane needs at least 1 share, "
                f"and there are {shares}"
            )
        self._partition = partition

    def memory(self) -> tuple[tuple[str, int], ...]:
        return (("KV pool (simulated)", self._executor.nbytes),)

    def _share(self, lane: Lane) -> float:
        """The part of the device that the lane has, in (0, 1]."""
        partition = self._partition
        if partition is None:
            return 1.0
        return (partition.prefill if lane is Lane.PREFILL else partition.decode) / self.capacity().shares
