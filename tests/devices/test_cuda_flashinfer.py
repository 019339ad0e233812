"""The cuda device with FlashInfer's attention, or rather a stand-in for its package: steps, graphs, waits, memory."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="triton is not installed")

from weft.config import EngineConfig
from weft.core.plan import Slice
from weft.devices.cuda_forward import CudaForward, buckets, planner_of
from weft.devices.cuda_streams import Event, Immediate, open_gpu
from weft.devices.cuda_trial import try_out
from weft.kernels.flashinfer_attention import FlashInferAttention
from weft.kernels.triton import TritonKernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import Dummy, load_weights, tensor_shapes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_flashinfer.py has the package itself", allow_module_level=True)
STAND_IN = Path(__file__).parents[1] / "kernels" / "flashinfer_stand_in.py"
BLOCK, LONGEST = 16, 64
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "use_sliding_window": True,
    "sliding_window": 20,
    "max_window_layers": 1,  # the second layer has one
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("windows")
    (made / "config.json").write_text(json.dumps(SHAPE))
    shapes = tensor_shapes(read_config(made))
    save_file({name: 8 * x for name, x in Dummy(shapes, 3).take(list(shapes)).items()}, made / "model.safetensors")
    return made


def kernels_of(backend: str) -> TritonKernels:
    kernels = TritonKernels(torch.device("cpu"), "torch" if backend == "torch" else "triton")
    if backend == "flashinfer":
        kernels.attend = FlashInferAttention(torch.device("cpu"), SimpleNamespace(**runpy.run_path(str(STAND_IN))))
    return kernels


def decoder_of(folder: Path, kernels: TritonKernels) -> Decoder:
    model = read_config(folder)
    assert model.windows == (None, 20)
    return Decoder(model, load_weights(folder, model, kernels, torch.bfloat16), kernels, LONGEST)


def forward_of(folder: Path, backend: str) -> CudaForward:
    gpu, kernels = open_gpu(), kernels_of(backend)
    decoder = decoder_of(folder, kernels)
    planner = planner_of(gpu, kernels.attend, decoder, BLOCK, 4)
    assert (planner is not None) == (backend == "flashinfer")
    graphs = kernels.attend.capturable
    kv = decoder.make_kv(16, BLOCK)
    return CudaForward(gpu, gpu.stream(), decoder, kv, BLOCK, max_slices=4, graphs=graphs, planner=planner)


def piece(sequence: int, begin: int, end: int) -> Slice:
    tokens = tuple((7 * at + 13 * sequence) % 97 for at in range(begin, end))
    return Slice(sequence, begin, tokens, tuple(range(4 * sequence, 4 * sequence + 4)))


STEPS = (
    [piece(0, 0, 25)],
    [piece(0, 25, 26), piece(1, 0, 16), piece(2, 0, 3)],
    [piece(0, 26, 27), piece(1, 16, 17), piece(2, 3, 4)],  # decode, in a graph of four rows
    [piece(2, 4, 5), piece(0, 27, 28)],
    [piece(1, 17, 18), piece(0, 28, 29), piece(2, 5, 6)],
)


def test_steps_say_what_they_say_on_the_slow_backend(folder: Path) -> None:
    """Prompts behind prior keys and values, mixed steps, and decode from graphs; a layer with a window, one without."""
    found, truth = forward_of(folder, "flashinfer"), forward_of(folder, "torch")
    with torch.inference_mode():
        for slices in STEPS:
            count = sum(len(one.tokens) for one in slices)
            one, two = (forward.run(slices, range(count)).log_softmax(-1) for forward in (found, truth))
            assert (one - two).abs().max() < 0.05 < (two[0] - two[1:]).abs().max()
    assert sorted(found._graphs) == [2, 4]


class Recorded(Immediate):
    """Writes down what a planner does and what it waits for."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(open_gpu().stream()._interpreting)  # type: ignore[attr-defined]
        self.notes = notes

    def mark(self) -> Event:
        mark, notes = super().mark(), self.notes
        notes.append("mark")

        class Noted:
            def wait(self) -> None:
                notes.append("wait")
                mark.wait()

        return Noted()  # type: ignore[return-value]


def test_who_plans_again_waits_until_the_device_has_what_was_planned(folder: Path) -> None:
    notes: list[str] = []
    forward = forward_of(folder, "flashinfer")
    forward._stream, plan = Recorded(notes), forward._planner.plan  # type: ignore[union-attr]

    def noted(batch: Any, *, captured: bool = False) -> Any:
        notes.append("plan")
        return plan(batch, captured=captured)

    forward._planner = SimpleNamespace(plan=noted)  # type: ignore[assignment]
    with torch.inference_mode():
        for slices in STEPS[:3]:
            forward.run(slices, range(sum(len(one.tokens) for one in slices)))
    assert notes == ["plan", "mark"] + 3 * ["wait", "plan", "mark"]  # the graph is recorded with a plan of its own


def test_what_a_lane_holds_for_plans_is_in_the_table(folder: Path) -> None:
    gpu, config = open_gpu(), EngineConfig(max_num_seqs=4, max_num_batched_tokens=16)
    held = {}
    for backend in ("flashinfer", "triton"):
        kernels = kernels_of(backend)
        model = read_config(folder)
        weights = load_weights(folder, model, kernels, torch.bfloat16)
        held[backend] = try_out(gpu, config, model, kernels, weights).prefill  # nothing else is measured here
    assert held == {"flashinfer": (128 + (2 + len(buckets(4))) * 2 * 8) * 2**20, "triton": 0}
