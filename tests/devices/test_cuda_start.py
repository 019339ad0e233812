"""The cuda device on a GPU that has too little memory for what was asked, or cannot be divided; what a trial leaves
behind; graphs of lanes.

There is no GPU here: torch's error is raised by hand, and torch's graphs, its GPU and the driver are stood in for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from weft.config import EngineConfig
from weft.core.plan import Lane, Slice
from weft.devices import cuda, cuda_streams, open_device
from weft.devices.cuda_forward import CudaForward
from weft.devices.cuda_streams import Interpreted, SharedStream, TorchGpu, TorchStream, Work
from weft.devices.cuda_trial import peaks_of, try_out
from weft.errors import ConfigError
from weft.kernels.triton import TritonKernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
Steps = list[tuple[int, int]]


class Trying(Interpreted):
    """Runs what it is asked to measure."""

    def peak(self, work: Work) -> int:
        work()
        return 0


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Steps]:
    """Gives a GPU that has room for so many tokens and slices in a step, and the steps that were made there."""

    def given(tokens: int, slices: int) -> Steps:
        made: Steps = []

        def run(self: CudaForward, plan: Sequence[Slice], rows: Sequence[int], feeds: Any = None) -> torch.Tensor:
            made.append((sum(len(piece.tokens) for piece in plan), len(plan)))
            if made[-1][0] > tokens or made[-1][1] > slices:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
            return torch.zeros(len(rows), 4096)

        monkeypatch.setattr(cuda, "open_gpu", Trying)
        monkeypatch.setattr(CudaForward, "run", run)
        return made

    return given


def config_of(tokens: int, seats: int) -> EngineConfig:
    return EngineConfig(device="cuda", num_blocks=64, max_num_batched_tokens=tokens, max_num_seqs=seats)


def open_and_close(config: EngineConfig, folder: Path) -> None:
    open_device(config, folder, lambda phase: None).close()


@pytest.mark.parametrize(("tokens", "slices"), [(40, 100), (1000, 3)], ids=["tokens", "slices"])
def test_a_step_that_does_not_fit_names_the_flags_and_values_that_fit(
    room: Callable[[int, int], Steps], tiny_model: Path, tokens: int, slices: int
) -> None:
    room(tokens, slices)
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens is 120 and --max-num-seqs is 8: .* GiB") as caught:
        open_and_close(config_of(120, 8), tiny_model)
    found = re.search(r"--max-num-batched-tokens (\d+) and --max-num-seqs (\d+) fit$", str(caught.value))
    assert found is not None
    open_and_close(config_of(int(found[1]), int(found[2])), tiny_model)


def test_where_no_step_fits_the_error_says_what_would_help(room: Callable[[int, int], Steps], tiny_model: Path) -> None:
    room(0, 0)
    with pytest.raises(ConfigError, match=r"--max-num-seqs is 8: .*other processes that end.* would help"):
        open_and_close(config_of(120, 8), tiny_model)


def trial(folder: Path) -> tuple[Any, ...]:
    model, kernels = read_config(folder), TritonKernels(torch.device("cpu"))
    return Trying(), config_of(120, 8), model, kernels, load_weights(folder, model, kernels, torch.float32)


def test_a_rank_tries_no_smaller_steps_alone(room: Callable[[int, int], Steps], tiny_model: Path) -> None:
    made, ranks = room(0, 0), Any
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens is 120"):
        peaks_of(*trial(tiny_model), ranks)
    assert len(made) == 1


def test_weights_and_a_pool_that_do_not_fit_say_so(
    room: Callable[[int, int], Steps], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_given: Any, **_more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore words.")

    room(1000, 1000)
    make_kv = Decoder.make_kv
    with monkeypatch.context() as changed:
        changed.setattr(Decoder, "make_kv", lambda *given: none_left() if given[1] == 64 else make_kv(*given))
        with pytest.raises(
            ConfigError, match=r"KV pool of 64 blocks, .* --num-blocks 57 leaves .*\(torch: CUDA out of"
        ):
            open_and_close(config_of(120, 8), tiny_model)
    monkeypatch.setattr(cuda, "load_weights", none_left)
    with pytest.raises(ConfigError, match=r"the weights do not fit in .* GiB, .*`weft quantize`.*out of memory\.\)$"):
        open_and_close(config_of(120, 8), tiny_model)


def test_nothing_keeps_what_was_tried_out(
    room: Callable[[int, int], Steps], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A circle of references would, and the table would have its keys and values among other processes' memory."""
    kept: list[Any] = []
    make_kv = Decoder.make_kv

    def watched(self: Decoder, *given: Any) -> list[Any]:
        found = make_kv(self, *given)
        kept.extend(weakref.ref(kv.keys.codes) for kv in found)
        return found

    room(1000, 1000)
    monkeypatch.setattr(Decoder, "make_kv", watched)
    given = trial(tiny_model)
    gc.disable()
    try:
        try_out(*given)
        assert len(kept) == read_config(tiny_model).layers and not any(one() is not None for one in kept)
    finally:
        gc.enable()


def test_no_graph_is_replayed_while_another_lane_records_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses it: the state of its random numbers is one for all graphs."""
    recording, refused, replayed = threading.Event(), [], []
    threads: list[threading.Thread] = []

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"
            recording.set()
            for thread in threads:
                thread.start()
                thread.join(0.1)

        def capture_end(self) -> None:
            recording.clear()

        def replay(self) -> None:
            refused.append(recording.is_set())
            replayed.append(self)

    monkeypatch.setattr(cuda_streams.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda_streams.cuda, "stream", lambda _stream: contextlib.nullcontext())
    lock = threading.Lock()
    one, other = (TorchStream(None, lock, None) for _ in range(2))
    replay = one.capture(lambda: None)
    threads.append(threading.Thread(target=replay))
    other.capture(lambda: None)()
    threads[0].join(10.0)
    assert len(replayed) == 2 and refused == [False, False]


def test_nobody_waits_for_a_stream_while_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes that for an error, of the recording too, and the device would be given up."""
    recording, waited = threading.Event(), []
    threads: list[threading.Thread] = []

    class Inner:
        def synchronize(self) -> None:
            waited.append(recording.is_set())

    class Graph:
        def capture_begin(self, **_given: Any) -> None:
            recording.set()
            threads[0].start()
            threads[0].join(0.1)

        def capture_end(self) -> None:
            recording.clear()

    monkeypatch.setattr(cuda_streams.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda_streams.cuda, "stream", lambda _stream: contextlib.nullcontext())
    stream = TorchStream(Inner(), threading.Lock(), None)
    threads.append(threading.Thread(target=stream.check))
    stream.capture(lambda: None)
    threads[0].join(10.0)
    assert waited == [False]


class Lacking:
    """A driver from before green contexts."""

    cuDeviceGetDevResource = None


def stood_in(monkeypatch: pytest.MonkeyPatch, library: Any) -> TorchGpu:
    """A GPU of 132 SMs with that driver."""
    properties = SimpleNamespace(name="a GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: "plain")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: pointer)
    monkeypatch.setattr(torch, "zeros", lambda *_size, device: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    return TorchGpu(0)


def test_where_the_driver_has_no_green_contexts_lanes_have_plain_streams_and_the_gpu_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = stood_in(monkeypatch, Lacking())
    assert gpu.undivided == (
        "this CUDA driver has no green contexts (cuDevSmResourceSplitByCount is missing); they came with 12.4"
    )
    assert gpu.shares == 132
    streams = [gpu.lane_stream(lane, share) for lane, share in ((Lane.PREFILL, 66), (Lane.DECODE, 1))]
    assert [(type(stream), stream._stream) for stream in streams] == [(TorchStream, "plain")] * 2  # type: ignore[attr-defined]
    streams[0].move(5)
    assert streams[0].moved() == 0.0 and streams[0]._stream == "plain"  # type: ignore[attr-defined]


def test_where_it_has_them_lanes_have_their_shares(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    gpu = stood_in(monkeypatch, driver)
    assert gpu.undivided is None and gpu.shares == 16
    assert isinstance(gpu.lane_stream(Lane.PREFILL, 3), SharedStream)


@pytest.mark.parametrize("partition", ["1:1", "off"])
@pytest.mark.parametrize("reason", ["this driver is too old", None])
def test_the_start_up_table_says_where_shares_are_not_enforced(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, partition: str, reason: str | None
) -> None:
    class Driven(Interpreted):
        undivided = reason

    monkeypatch.setattr(cuda, "open_gpu", Driven)
    config = EngineConfig(device="cuda", partition=partition, num_blocks=64, max_model_len=128)
    device = open_device(config, tiny_model, lambda phase: None)
    notes = device.describe().notes
    device.close()
    wanted = "the lanes' shares are not enforced, each lane may use the whole GPU: this driver is too old"
    told = partition == "1:1" and reason is not None
    assert [note for note in notes if "shares" in note] == ([wanted] if told else [])
