"""--batch-invariant with plain bfloat16 weights: the logits of a token are the same bits whatever stands beside it,
however its prompt was cut, and whoever computed the keys and values that it finds. Interpreted where there is no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

pytest.importorskip("triton", reason="triton is not installed")

from weft.core.plan import Slice
from weft.devices.cuda_forward import CudaForward
from weft.devices.cuda_streams import Gpu, open_gpu
from weft.kernels.triton import TritonKernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import Dummy, load_weights, move, tensor_shapes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
BLOCK, SEATS, LONGEST, VOCABULARY = 16, 5, 48, 97
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],  # with biases
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
few = settings(max_examples=3, deadline=None)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return open_gpu()


@pytest.fixture(scope="module")
def decoder(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    shapes = tensor_shapes(read_config(folder))
    save_file({name: 8 * x for name, x in Dummy(shapes, 3).take(list(shapes)).items()}, folder / "model.safetensors")
    kernels = TritonKernels(gpu.device, invariant=True)
    weights = load_weights(folder, read_config(folder), kernels, torch.bfloat16)
    return Decoder(read_config(folder), move(weights, gpu.device), kernels, LONGEST)


class Run:
    """Steps of sequences on a KV of their own. Rows of logits are kept by (sequence, position)."""

    def __init__(self, gpu: Gpu, decoder: Decoder) -> None:
        self.kv: list[Any] = decoder.make_kv(SEATS * LONGEST // BLOCK, BLOCK)
        self.stream = gpu.stream()
        self.forward = CudaForward(gpu, self.stream, decoder, self.kv, BLOCK, max_slices=SEATS, graphs=True)
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    @torch.inference_mode()
    def step(self, slices: Sequence[Slice], *, last: bool = False) -> None:
        """last: only the last row of each slice is computed to its end, as an engine does it."""
        places = [(piece.sequence, at) for piece in slices for at in range(piece.start, piece.end)]
        ends = {(piece.sequence, piece.end - 1) for piece in slices}
        rows = [row for row, place in enumerate(places) if place in ends or not last]
        with self.stream.use():
            found = self.forward.run(slices, rows).clone().cpu()
        self.logits |= {places[row]: logits for row, logits in zip(rows, found, strict=True)}

    def stored(self, table: Sequence[int], length: int) -> list[torch.Tensor]:
        """Keys and values of each layer, in order of positions."""
        parts = [part.codes[list(table)] for one in self.kv for part in (one.keys, one.values)]
        return [part.transpose(1, 2).flatten(0, 1)[:length].cpu() for part in parts]


def tokens_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def blocks_of(sequence: int) -> tuple[int, ...]:
    return tuple(range(sequence * LONGEST // BLOCK, (sequence + 1) * LONGEST // BLOCK))


@few
@given(
    length=st.integers(20, LONGEST),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    beside=st.lists(st.integers(0, 20), max_size=2),
    shared=st.integers(1, 2),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(length=45, cuts=[7, 30], beside=[20, 1], shared=2, last=False, seed=0)
@example(length=33, cuts=[30, 1], beside=[], shared=1, last=True, seed=1)
def test_the_bits_of_a_token_are_its_own(
    gpu: Gpu, decoder: Decoder, length: int, cuts: list[int], beside: list[int], shared: int, last: bool, seed: int
) -> None:
    """A prompt at once and alone; or in chunks, its end by decode, each step beside others that go on; and once more
    behind a part of it that was found, in the blocks that decode and chunks have written."""
    tokens = tokens_of(seed, length)
    truth = Run(gpu, decoder)
    truth.step([Slice(0, 0, tokens, blocks_of(0))])

    run = Run(gpu, decoder)
    begins = [min(sum(cuts[:i]), length - 2) for i in range(len(cuts) + 1)]
    ranges = [(a, b) for a, b in zip(begins, [*begins[1:], length - 2], strict=True) if b > a]
    ranges += [(length - 2, length - 1), (length - 1, length)]
    others = {i: (tokens_of(seed + i, LONGEST), 0) for i in range(1, 1 + len(beside))}
    for begin, end in ranges:
        slices = [Slice(0, begin, tokens[begin:end], blocks_of(0))]
        for i, count in zip(others, beside, strict=True):
            theirs, at = others[i]
            more = 1 if end - begin == 1 else count
            if 0 < more <= LONGEST - at:
                slices.insert(i % 2, Slice(i, at, theirs[at : at + more], blocks_of(i)))
                others[i] = theirs, at + more
        run.step(slices, last=last)
    found = min(shared * BLOCK, (length - 1) // BLOCK * BLOCK)
    table = (*blocks_of(0)[: found // BLOCK], *blocks_of(4)[found // BLOCK :])
    run.step([Slice(4, found, tokens[found:], table)], last=last)

    compared = 0
    for (sequence, position), logits in run.logits.items():
        if sequence in (0, 4):
            assert torch.equal(logits, truth.logits[0, position]), (sequence, position)
            compared += 1
    assert compared >= 3 and truth.logits[0, 0].isfinite().all()
    expected = truth.stored(blocks_of(0), length)
    for where in (blocks_of(0), table):
        assert all(torch.equal(a, b) for a, b in zip(run.stored(where, length), expected, strict=True))


@torch.inference_mode()
def test_the_products_are_the_references(gpu: Gpu, decoder: Decoder) -> None:
    """What the flag computes is what is computed without it, but for roundings."""
    slices = [Slice(0, 0, tokens_of(1, 30), blocks_of(0))]
    found, other = Run(gpu, decoder), Run(gpu, decoder.on(TritonKernels(gpu.device)))
    found.step(slices)
    other.step(slices)
    one, two = (torch.stack(list(run.logits.values())).log_softmax(-1) for run in (found, other))
    assert (one - two).abs().max() < 0.1 < (one[0] - one[1]).abs().max()
