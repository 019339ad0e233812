"""All that the cuda device wants of a GPU, behind one small interface, and the same without a GPU.

`TorchGpu` is torch.cuda. `Interpreted` is for machines without one: tensors lie in host memory, Triton interprets its
kernels (TRITON_INTERPRET=1), all is done when it is asked for, and streams, events and graphs have nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from weft.core.plan import Lane
from weft.devices.cuda_green import GreenSms, load_driver
from weft.devices.memory import free_memory
from weft.errors import DeviceError

Work = Callable[[], None]
cuda: Any = torch.cuda  # some of it has no types
INTERPRETED_SHARES = 8  # what there is to divide between lanes where nothing is real


class Event(Protocol):
    """A point in a stream's work."""

    def wait(self) -> None:
        """Until the device is there; other threads go on. Raises DeviceError when the device has failed."""
        ...

    def reached(self) -> bool: ...

    def seconds_since(self, earlier: Any) -> float:
        """Between two events of one kind that the device has reached."""
        ...


class Stream(Protocol):
    """The ordered work of one lane."""

    def use(self) -> AbstractContextManager[None]:
        """What this thread launches in the `with` block goes to the stream."""
        ...

    def mark(self) -> Event:
        """An event after all that was launched so far."""
        ...

    def follow(self, event: Any) -> None:
        """What is launched from now on begins after the event, which is one of this GPU's; the host does not wait."""
        ...

    def check(self) -> None:
        """Wait for all that was launched. Raises DeviceError when the device has failed, for good."""
        ...

    def capture(self, work: Work) -> Work:
        """Record what `work` launches, all of it on tensors that stay where they are; the result launches it again.
        The recordings of a stream share their memory, so the largest should be made first."""
        ...

    def move(self, share: int) -> None:
        """Have so many of the GPU's units from the next `use` on; nothing where it cannot be divided. Raises
        DeviceError, with nothing changed."""
        ...

    def moved(self) -> float:
        """Seconds of the host that moves have taken since this was last asked, with what was recorded anew for them."""
        ...


class Gpu(Protocol):
    """device: where tensors go. shares: units that a partition divides. undivided: why lanes have all of the device
    whatever their shares; None where they have no more than those. sms: tiles that it computes at a time. captures:
    whether graphs are worth their memory."""

    name: str
    device: torch.device
    shares: int
    undivided: str | None
    sms: int
    captures: bool

    def adopt(self) -> None:
        """To be called by each thread before it works for this GPU."""
        ...

    def stream(self) -> Stream:
        """One that has all of the device."""
        ...

    def lane_stream(self, lane: Lane, share: int, /) -> Stream:
        """One for a lane that has a share."""
        ...

    def staging(self, size: int) -> torch.Tensor:
        """uint8 [size] in host memory that copies to and from the device need not wait for."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device, whoever has the rest."""
        ...

    def peak(self, work: Work) -> int:
        """Bytes that `work` takes at its peak, beyond what is held now."""
        ...

    def settle(self) -> None:
        """Wait for all that was launched, in whatever stream. Streams know nothing of what was made outside of them."""
        ...


def open_gpu(choose: Callable[[int], int] = lambda _count: 0) -> Gpu:
    """The GPU that this process sees first, or the interpreter where it was asked for. Raises DeviceError.

    choose: which one instead, of so many. A rank sees those of the others, too: kernels can reach their memory by it.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own variable, which it reads once
        return Interpreted()
    # Streams share the connections to the GPU, 8 unless it is told otherwise, and what is launched through one of them
    # begins in order: a lane's steps could wait behind the other's, whatever their SMs. CUDA reads it when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if not torch.cuda.is_available():
        built = "no GPU can be used" if torch.version.cuda else "this torch was built without CUDA"
        raise DeviceError(
            f"--device is cuda, and {built}; what would work: --device cpu, a CUDA build of torch on a machine with "
            "a GPU, or TRITON_INTERPRET=1, which interprets a tiny model's kernels on the CPU"
        )
    index = choose(torch.cuda.device_count())
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise DeviceError(
            f"--device is cuda, and {torch.cuda.get_device_name(index)} has compute capability {major}.{minor}; "
            "weft's kernels need 8.0 or more: --device cpu works"
        )
    return TorchGpu(index)


class SharedStream:
    """A stream that moves between shares. One thread uses it.

    make: a stream for a share. What was launched before a move is done before what is launched after it, so whoever
    launches need not know of moves. Graphs are recorded anew for each share on which they are replayed: a graph's
    kernels stay on the SMs that they were recorded on.
    """

    def __init__(self, make: Callable[[int], Stream], share: int) -> None:
        self._make = make
        self._streams: dict[int, Stream] = {share: make(share)}
        self._share = share
        self._moved = 0.0

    @property
    def now(self) -> Stream:
        """The one that is used now."""
        return self._streams[self._share]

    def move(self, share: int) -> None:
        """Have another share from the next `use` on. Raises DeviceError, with nothing changed."""
        if share == self._share:
            return
        with self._moving():
            if share not in self._streams:
                self._streams[share] = self._make(share)
            self._streams[share].follow(self.now.mark())
            self._share = share

    def moved(self) -> float:
        seconds, self._moved = self._moved, 0.0
        return seconds

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield  # what fails is no move
        self._moved += time.perf_counter() - begun

    def use(self) -> AbstractContextManager[None]:
        return self.now.use()

    def mark(self) -> Event:
        return self.now.mark()

    def follow(self, event: Any) -> None:
        self.now.follow(event)

    def check(self) -> None:
        for stream in tuple(self._streams.values()):  # the lane's other thread may be moving
            stream.check()

    def capture(self, work: Work) -> Work:
        graphs = {self._share: self.now.capture(work)}

        def replay() -> None:
            if self._share not in graphs:
                with self._moving():
                    graphs[self._share] = self.now.capture(work)
            graphs[self._share]()

        return replay


# -- torch.cuda --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """CUDA reports what went wrong in a kernel to whoever waits next, and from then on to everybody."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(f"the GPU failed: {error}") from error


class TorchEvent:
    def __init__(self, stream: Any) -> None:
        self.inner = cuda.Event(enable_timing=True, blocking=True)
        self.inner.record(stream)

    def wait(self) -> None:
        with _failures():
            self.inner.synchronize()

    def reached(self) -> bool:
        return bool(self.inner.query())

    def seconds_since(self, earlier: TorchEvent) -> float:
        return float(earlier.inner.elapsed_time(self.inner)) / 1000


class TorchStream:
    """capturing: held while a graph is recorded, which torch does for one thread at a time, and while one is replayed:
    torch then moves on the state of its random numbers, which it refuses during another thread's recording."""

    def __init__(self, stream: Any, capturing: threading.Lock, pool: Any) -> None:
        """pool: where the memory of graphs comes from; for streams that are never used at the same time."""
        self._stream = stream
        self._capturing = capturing
        self._pool = pool

    def use(self) -> AbstractContextManager[None]:
        used: AbstractContextManager[None] = cuda.stream(self._stream)
        return used

    def mark(self) -> Event:
        return TorchEvent(self._stream)

    def follow(self, event: Any) -> None:
        self._stream.wait_event(event.inner)

    def check(self) -> None:
        # Whoever waits for a stream that is being recorded breaks the recording, and is told that the GPU has failed.
        with self._capturing, _failures():
            self._stream.synchronize()

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with self.use():
            work()  # kernels are compiled, and libraries take their memory, outside of the recording
            # Not by torch.cuda.graph, which waits for the whole device before, the other lane's work too, and gives all
            # memory back that torch keeps: the other lane would ask CUDA for it again, in the middle of a step.
            # thread_local: the other lane goes on and may allocate.
            with self._capturing:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()

        def replay() -> None:
            with self._capturing:
                graph.replay()

        return replay

    def move(self, share: int) -> None:
        pass

    def moved(self) -> float:
        return 0.0


class TorchGpu:
    captures = True

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.name = properties.name
        self.sms = properties.multi_processor_count
        self.device = torch.device("cuda", index)
        torch.zeros(1, device=self.device)  # the primary context is there from now on
        self.undivided = None
        try:
            self._green = GreenSms(index, load_driver(), torch.cuda.get_device_capability(index))
            self.shares = self._green.units
        except DeviceError as error:
            self.undivided = error.message
            self.shares = self.sms
        self._capturing = threading.Lock()

    def adopt(self) -> None:
        torch.cuda.set_device(self.device)

    def stream(self) -> Stream:
        return TorchStream(cuda.Stream(self.device), self._capturing, torch.cuda.graph_pool_handle())

    def lane_stream(self, lane: Lane, share: int) -> Stream:
        if self.undivided is not None:
            return self.stream()
        pool = torch.cuda.graph_pool_handle()

        def make(share: int) -> Stream:
            inner = cuda.ExternalStream(self._green.stream(lane, share), device=self.device)
            return TorchStream(inner, self._capturing, pool)

        return SharedStream(make, share)

    def staging(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    def peak(self, work: Work) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_reserved(self.device)
        work()
        torch.cuda.synchronize(self.device)
        most = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.empty_cache()  # what torch keeps for one stream is of no use to another
        return max(0, most - held)

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)


# -- no GPU ------------------------------------------------------------------------------------------------------------


class Moment:
    """An event of a device that is never behind."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        pass

    def reached(self) -> bool:
        return True

    def seconds_since(self, earlier: Moment) -> float:
        return self._at - earlier._at


class Immediate:
    """interpreting: held while kernels run, for the interpreter keeps the program's number in one place."""

    def __init__(self, interpreting: threading.RLock) -> None:
        self._interpreting = interpreting

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        with self._interpreting:
            yield

    def mark(self) -> Event:
        return Moment()

    def follow(self, event: Any) -> None:
        pass

    def check(self) -> None:
        pass

    def capture(self, work: Work) -> Work:
        return work

    def move(self, share: int) -> None:
        pass

    def moved(self) -> float:
        return 0.0


class Interpreted:
    captures = True  # the same path as on a GPU
    sms = 1
    undivided: str | None = "nothing is divided where kernels are interpreted"

    def __init__(self) -> None:
        self.name = "interpreted on this CPU"
        self.device = torch.device("cpu")
        self.shares = INTERPRETED_SHARES
        self._interpreting = threading.RLock()

    def adopt(self) -> None:
        torch.set_num_threads(1)  # tiny models; two threads would wait for each other

    def stream(self) -> Stream:
        return Immediate(self._interpreting)

    def lane_stream(self, _lane: Lane, share: int) -> Stream:
        return SharedStream(lambda _share: self.stream(), share)

    def staging(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def memory(self) -> tuple[int, int]:
        free = free_memory()
        return free, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def peak(self, _work: Work) -> int:
        return 0  # the host's memory, of which a tiny model's activations take next to nothing

    def settle(self) -> None:
        pass
