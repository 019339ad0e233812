"""Parts of a GPU's SMs, and streams that have no more: green contexts, through the CUDA driver (12.4 and later).

The driver splits the SMs once for each place where they can be cut: the prefill lane has what lies before a cut, the
decode lane the rest, as with the cores of a CPU. So two shares that add up to the whole are two results of one split,
which the driver promises to be disjoint, and each lane's contexts can be made without knowing the other's. All cuts are
made when the GPU is opened: one that the driver refuses is a reason not to divide it, and not an error in a step. A
context is made when a lane first has that share, and kept.

torch makes green contexts too (torch.cuda.GreenContext), but each from the whole device: two of them share SMs.
"""

from __future__ import annotations

import ctypes
from typing import Any

from weft.core.plan import Lane
from weft.errors import DeviceError

# cuda.h: struct CUdevResource has 144 bytes in its first version; a newer driver may write more.
SM, RESOURCE_BYTES, SM_COUNT_AT = 1, 256, 96
DEFAULT_STREAM, NON_BLOCKING = 1, 1
NEEDED = (
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxStreamCreate",
    "cuGetErrorName",
)

Pointer = ctypes.c_void_p
Library = Any


class Resource(ctypes.Structure):
    """A set of SMs, as the driver describes it."""

    _fields_ = (("bytes", ctypes.c_ubyte * RESOURCE_BYTES),)

    @property
    def words(self) -> tuple[int, int, int]:
        """(SMs, the smallest part that can be split off, what its size must be a multiple of); the last two are 0
        where the driver is older than these fields."""
        found = (ctypes.c_uint * 3).from_buffer_copy(self, SM_COUNT_AT)
        return found[0], found[1], found[2]


def load_driver() -> Library:
    """Raises DeviceError where the driver has no green contexts."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"the CUDA driver cannot be opened: {error}") from error
    missing = [name for name in NEEDED if not hasattr(library, name)]
    if missing:
        raise DeviceError(f"this CUDA driver has no green contexts ({missing[0]} is missing); they came with 12.4")
    return library


class GreenSms:
    """The SMs of one GPU, to be shared out in equal units. units: how many; sms: of the whole device."""

    def __init__(self, device: int, library: Library, capability: tuple[int, int]) -> None:
        """device: its CUDA ordinal. Its primary context must be there. Raises DeviceError."""
        self._device = device
        self._library = library
        self._whole = Resource()
        self._call("cuDeviceGetDevResource", ctypes.c_int(device), ctypes.byref(self._whole), ctypes.c_int(SM))
        self.sms, least, multiple = self._whole.words
        # The driver's guide, where it does not say itself: 8 from Hopper on, 4 before.
        self.unit = max(least, multiple) or (8 if capability >= (9, 0) else 4)
        if not 1 <= self.unit <= self.sms // 2:
            raise DeviceError(f"this GPU has {self.sms} SMs, which cannot be divided in units of {self.unit}")
        # The SMs of a unit are neighbours, and not all fit into one: an H100 of 132 SMs may have 15 units of 8.
        self.units = min(self.sms // self.unit, self._groups() + 1)
        self._cuts = [self._cut(self.unit * units) for units in range(1, self.units)]

    def count(self, lane: Lane, share: int) -> int:
        """The SMs of a share of so many units. What is left over by the units is the decode lane's."""
        return self._part(lane, share).words[0]

    def stream(self, lane: Lane, share: int) -> int:
        """A new stream on the SMs of that share: a CUstream. Raises DeviceError."""
        if not 1 <= share <= self.units:
            raise DeviceError(f"a share of {share} units of SMs; there are {self.units}")
        part = self._part(lane, share)
        description, context, stream = Pointer(), Pointer(), Pointer()
        self._call("cuDevResourceGenerateDesc", ctypes.byref(description), ctypes.byref(part), ctypes.c_uint(1))
        self._call(
            "cuGreenCtxCreate",
            ctypes.byref(context),
            description,
            ctypes.c_int(self._device),
            ctypes.c_uint(DEFAULT_STREAM),
        )
        self._call(
            "cuGreenCtxStreamCreate", ctypes.byref(stream), context, ctypes.c_uint(NON_BLOCKING), ctypes.c_int(0)
        )
        if stream.value is None:
            raise DeviceError("the CUDA driver made no stream for a green context")
        return stream.value

    def _part(self, lane: Lane, share: int) -> Resource:
        if share == self.units:
            return self._whole
        if lane is Lane.PREFILL:
            return self._cuts[share - 1][0]
        return self._cuts[self.units - share - 1][1]

    def _groups(self) -> int:
        """Units that the driver would make of the device."""
        groups = ctypes.c_uint(0)
        self._call(
            "cuDevSmResourceSplitByCount",
            None,
            ctypes.byref(groups),
            ctypes.byref(self._whole),
            None,
            ctypes.c_uint(0),
            ctypes.c_uint(self.unit),
        )
        return groups.value

    def _cut(self, first: int) -> tuple[Resource, Resource]:
        """So many SMs or, where the driver rounds up, a few more; and the rest. Raises DeviceError."""
        part, rest, groups = Resource(), Resource(), ctypes.c_uint(1)
        self._call(
            "cuDevSmResourceSplitByCount",
            ctypes.byref(part),
            ctypes.byref(groups),
            ctypes.byref(self._whole),
            ctypes.byref(rest),
            ctypes.c_uint(0),
            ctypes.c_uint(first),
        )
        found = part.words[0], rest.words[0]
        if groups.value != 1 or found[0] < first or not 0 < found[1] <= self.sms - found[0]:
            raise DeviceError(f"the CUDA driver cut {self.sms} SMs after {first} into {found[0]} and {found[1]}")
        return part, rest

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            word = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(word))
            raise DeviceError(f"{name} failed: {(word.value or b'error').decode()} ({code})")
