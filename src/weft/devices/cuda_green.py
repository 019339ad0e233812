"""Parts of a GPU's SMs, and streams that have no more: green contexts, through the CUDA driver (12.4 and later).

The SMs are numbered once by the driver's split. The prefill lane has the first ones, the decode lane the last ones, as
with the cores of a CPU; so two shares that add up to no more than the whole never overlap, and each lane's contexts can
be made without knowing the other's. A context is made when a lane first has that share, and kept.

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
        self.units = self.sms // self.unit
        if self.units < 2:
            raise DeviceError(f"this GPU has {self.sms} SMs, which cannot be divided in units of {self.unit}")

    def count(self, lane: Lane, share: int) -> int:
        """The SMs of a share of so many units. What is left over by the units is the decode lane's."""
        if share == self.units:
            return self.sms
        first = self.unit * (share if lane is Lane.PREFILL else self.units - share)
        return first if lane is Lane.PREFILL else self.sms - first

    def stream(self, lane: Lane, share: int) -> int:
        """A new stream on the SMs of that share: a CUstream. Raises DeviceError."""
        if not 1 <= share <= self.units:
            raise DeviceError(f"a share of {share} units of SMs; there are {self.units}")
        part = self._whole if share == self.units else self._part(lane, share)
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
        first = self.unit * (share if lane is Lane.PREFILL else self.units - share)
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
        found = part if lane is Lane.PREFILL else rest
        if groups.value != 1 or found.words[0] != self.count(lane, share):
            raise DeviceError(
                f"the CUDA driver gave {found.words[0]} SMs for {share} of {self.units} units "
                f"of the {lane.value} lane, which should be {self.count(lane, share)}"
            )
        return found

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            word = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(word))
            raise DeviceError(f"{name} failed: {(word.value or b'error').decode()} ({code})")
