"""A step as one program is, bit for bit, the step call by call: every kind of layer, any batch, any number of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.core.plan import Slice
from weft.kernels import LEVELS, available, open_kernels
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.forward import Plain, open_forward
from weft.models.loader import Weights, load_weights

BLOCK, BLOCKS, MAX_TOKENS, MAX_SLICES = 16, 24, 100, 6
VOCABULARY = 150
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64}
MODELS = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "every head its own KV": LLAMA | {"num_key_value_heads": 4},
    "norms of q and k": QWEN3,
    "windows": QWEN3
    | {
        "use_sliding_window": True,
        "sliding_window": 19,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
pytestmark = pytest.mark.skipif(not set(LEVELS) & set(available()), reason="the C++ extension is not built")


@pytest.fixture(params=[name for name in available() if name in LEVELS])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    opened = open_kernels(request.param, (0, 0))
    yield opened
    opened.close()


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def open_decoder(folder: Path, shape: dict[str, Any], kernels: Kernels, dtype: torch.dtype) -> Decoder:
    (folder / "config.json").write_text(json.dumps(shape))
    config = read_config(folder)
    weights = load_weights(folder, config, kernels, dtype, dummy_seed=3)
    return Decoder(config, weights, kernels, 128)


def quantised(weights: Weights, kernels: Kernels) -> Weights:
    """The same shapes with 4-bit linears, a 4-bit embedding and an 8-bit output layer, in every form of input."""
    forms = {
        "qkv": {"permutation": True, "outlier_blocks": 0, "hadamard": False},
        "output": {"permutation": False, "outlier_blocks": 1, "hadamard": True},
        "gate_up": {"permutation": True, "outlier_blocks": 0, "hadamard": True},
        "down": {"permutation": False, "outlier_blocks": 1, "hadamard": False},
    }

    def pack(packed: Any, seed: int, permutation: bool = False, **form: Any) -> Any:
        shape, generator = (packed.outputs, packed.inputs), random(seed)
        values = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
        scales = torch.rand(shape[0], shape[1] // 128, generator=generator) * 0.02
        order = torch.randperm(shape[1], generator=generator) if permutation else None
        return kernels.pack_w4ax(values, scales, permutation=order, **form)

    layers = tuple(
        replace(layer, **{name: pack(getattr(layer, name), number, **form) for name, form in forms.items()})
        for number, layer in enumerate(weights.layers)
    )
    embedding = torch.randint(-8, 8, (VOCABULARY, 128), generator=random(9), dtype=torch.int8)
    table = kernels.pack_embedding(embedding, torch.full((VOCABULARY, 1), 0.01))
    return replace(weights, layers=layers, embedding=table, head=pack(weights.head, 8, outlier_blocks=1))


def steps(seed: int) -> list[tuple[list[Slice], list[int]]]:
    """Some prompts in chunks, decode steps between them: slices, and the rows that are sampled after."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(20, 60, 5).tolist()
    free = draw.permutation(BLOCKS).tolist()
    tables = [tuple(free.pop() for _ in range(-(-length // BLOCK))) for length in lengths]
    done, made = [0] * 5, []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        slices, rows, end = [], [], 0
        for index in draw.permutation(5).tolist():
            count = min(int(draw.choice([1, 1, 2, 7, 19])), lengths[index] - done[index], MAX_TOKENS - end)
            if count:
                tokens = tuple(draw.integers(0, VOCABULARY, count).tolist())
                slices.append(Slice(index, done[index], tokens, tables[index]))
                done[index], end = done[index] + count, end + count
                if draw.random() < 0.6:
                    rows.append(end - 1)
        made.append((slices, rows))
    return made


def assert_the_same(decoder: Decoder, kernels: Kernels, seed: int, cache: str = "auto") -> None:
    stores = [decoder.make_kv(BLOCKS, BLOCK, cache) for _ in range(2)]
    plain = Plain(decoder, stores[0], BLOCK)
    program = open_forward(decoder, kernels, stores[1], BLOCK, max_tokens=MAX_TOKENS, max_slices=MAX_SLICES)
    assert not isinstance(program, Plain)
    for slices, rows in steps(seed):
        best = plain.run(slices, rows)
        assert list(program.run(slices, rows)) == list(best)
        want, got = plain.logits(), program.logits()
        assert np.isfinite(want).all() and got.shape == (len(rows), VOCABULARY)
        assert np.array_equal(got, want)
        # The same step with all of its rows computed to the end.
        assert list(program.run(slices, rows, whole=True)) == list(best)
        assert np.array_equal(program.logits(), want)
        assert len(program.hidden()) == sum(len(piece.tokens) for piece in slices)
        assert np.array_equal(decoder.logits(program.hidden()[rows]).numpy(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_a_program_is_the_decoder(tmp_path: Path, kernels: Kernels, model: str, dtype: torch.dtype) -> None:
    assert_the_same(open_decoder(tmp_path, MODELS[model], kernels, dtype), kernels, seed=len(model))


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_a_program_writes_and_reads_kv_in_few_bits(tmp_path: Path, kernels: Kernels, cache: str) -> None:
    assert_the_same(open_decoder(tmp_path, QWEN3, kernels, torch.bfloat16), kernels, 5, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_of_quantised_layers_is_the_decoder(tmp_path: Path, kernels: Kernels, dtype: torch.dtype) -> None:
    plain = open_decoder(tmp_path, LLAMA, kernels, dtype)
    weights = quantised(plain._weights, kernels)
    assert_the_same(Decoder(plain.config, weights, kernels, 128), kernels, seed=1)


def test_what_feeds_a_quantised_layer_is_quantised_with_it(tmp_path: Path, kernels: Kernels) -> None:
    from weft.kernels.record import MakeAndQuantise, Norm, Quantise, SiluMul

    plain = open_decoder(tmp_path, LLAMA, kernels, torch.bfloat16)
    decoder = Decoder(plain.config, quantised(plain._weights, kernels), kernels, 128)
    forward: Any = open_forward(decoder, kernels, decoder.make_kv(2, BLOCK), BLOCK, max_tokens=8, max_slices=2)
    kinds = [type(one) for one in forward.program._operations]
    # Of each layer: both norms and the activation; and the final norm. Attention's output is quantised by itself.
    assert kinds.count(MakeAndQuantise) == 10 and kinds.count(Quantise) == 3
    assert Norm not in kinds and SiluMul not in kinds


def run_one(program: Any, pieces: Sequence[Slice], rows: Sequence[int] = (0,)) -> Any:
    program.run(pieces, rows)
    return program.logits()


def test_a_step_that_does_not_fit_is_refused_and_the_next_is_right(tmp_path: Path, kernels: Kernels) -> None:
    decoder = open_decoder(tmp_path, LLAMA, kernels, torch.float32)
    kv = decoder.make_kv(BLOCKS, BLOCK)
    program = open_forward(decoder, kernels, kv, BLOCK, max_tokens=20, max_slices=2)
    good = Slice(0, 0, tuple(range(5)), (3,))
    want = run_one(program, [good], [4]).copy()
    for wrong, rows, message in (
        (Slice(0, 0, (1,) * 21, (3, 4)), [0], "a step of 21 rows"),
        (good, [0, 1, 2], "3 of them sampled; the program was made for 20 and 2"),
        (good, [5], "there is no row 5 to sample after"),
        (good, [-1], "there is no row -1"),
        (Slice(0, 0, (VOCABULARY,), (3,)), [0], f"no token {VOCABULARY} for row 0"),
        (Slice(0, 0, (1,), (BLOCKS,)), [0], f"no block {BLOCKS}"),
        (Slice(0, 128, (1,), (0,) * 9), [0], "position 128"),
        (Slice(0, 0, (), (3,)), [], "each of them tokens"),
        (Slice(0, 15, (1, 1), (3,)), [], "too short"),
        (Slice(0, -1, (1,), (3,)), [], "too short"),
    ):
        with pytest.raises(ValueError, match=message):
            run_one(program, [wrong], rows)
    assert np.array_equal(run_one(program, [good], [4]), want)
    assert run_one(program, [good], []).shape == (0, VOCABULARY)


def test_values_in_use_do_not_overlap_and_places_are_used_again(tmp_path: Path, kernels: Kernels) -> None:
    from weft.kernels.program import arrange
    from weft.kernels.record import Recorder

    decoder = open_decoder(tmp_path, LLAMA, kernels, torch.bfloat16)
    kv = decoder.make_kv(BLOCKS, BLOCK)
    recorder: Any = Recorder()
    recording = decoder.on(recorder)
    logits: Any = recording.logits(recording.hidden(make_batch([Slice(0, 0, (0,), (0,))], BLOCK), kv))
    operations = recorder.operations
    places, widths = arrange(operations, (logits,))
    first = {value: number for number, one in reversed(list(enumerate(operations))) for value in one.uses()}
    last = {value: number for number, one in enumerate(operations) for value in one.uses()}
    last |= {logits: len(operations)}
    for value in places:
        assert places[value] % 64 == 0 and places[value] + value.row_bytes <= widths[value.domain]
        for other in places:
            if other is not value and other.domain is value.domain:
                apart_in_time = last[value] < first[other] or last[other] < first[value]
                below, above = sorted((value, other), key=lambda one: places[one])
                assert apart_in_time or places[below] + below.row_bytes <= places[above]
    assert widths[0] < sum(value.row_bytes for value in places) / 4


def test_what_does_not_fit_together_is_refused_while_recording(kernels: Kernels) -> None:
    from weft.kernels.record import Domain, Recorder, Value

    recorder, x = Recorder(), Value(Domain.TOKENS, 64, torch.float32)
    with pytest.raises(ValueError, match="x has 64 columns; it must have 8"):
        recorder.linear(x, kernels.pack_linear(torch.ones(3, 8)))
    with pytest.raises(TypeError, match="x is"):
        recorder.linear(x, kernels.pack_linear(torch.ones(3, 64).bfloat16()))
    with pytest.raises(ValueError, match="weight must be contiguous"):
        recorder.rms_norm(x, torch.ones(63), 1e-5)
    with pytest.raises(ValueError, match="63 columns"):
        recorder.silu_mul(Value(Domain.TOKENS, 63, torch.float32))
    kv: Any = kernels.make_kv(4, 16, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="q has 64 columns; it must have 32"):
        recorder.attention(x, kv, None, 2, 2, 1.0)  # type: ignore[arg-type]


def test_a_table_that_has_changed_is_read_again(tmp_path: Path, kernels: Kernels) -> None:
    """A program remembers the tables of its last step; the next ones may lie where they lay in memory."""
    decoder = open_decoder(tmp_path, LLAMA, kernels, torch.float32)
    stores = [decoder.make_kv(BLOCKS, BLOCK) for _ in range(2)]
    plain = Plain(decoder, stores[0], BLOCK)
    program = open_forward(decoder, kernels, stores[1], BLOCK, max_tokens=MAX_TOKENS, max_slices=MAX_SLICES)

    def logits(start: int, tokens: tuple[int, ...], block: int) -> Any:
        pieces = [Slice(0, start, tokens, (block,))]  # a tuple that nobody else keeps
        assert list(program.run(pieces, [0])) == list(plain.run(pieces, [0]))
        assert np.array_equal(program.logits(), plain.logits())
        return program.logits().copy()

    for block in range(3):
        logits(0, (block, 6), block)
    assert len({logits(2, (1,), block).tobytes() for block in (0, 1, 2, 2, 0)}) == 3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_step_in_parts_is_the_step(tmp_path: Path, kernels: Kernels, parts: int, whole: bool) -> None:
    decoder = open_decoder(tmp_path, QWEN3, kernels, torch.bfloat16)
    stored, *cut = (decoder.make_kv(BLOCKS, BLOCK) for _ in range(3))
    wanted = Plain(decoder, stored, BLOCK)
    program = open_forward(decoder, kernels, cut[0], BLOCK, max_tokens=MAX_TOKENS, max_slices=MAX_SLICES)
    for slices, rows in steps(parts):
        best = list(wanted.run(slices, rows, whole=whole))
        for forward in (Plain(decoder, cut[1], BLOCK), program):
            for part in range(parts - 1):
                assert list(forward.run(slices, rows, whole=whole, part=part, parts=parts)) == []
            assert list(forward.run(slices, rows, whole=whole, part=parts - 1, parts=parts)) == best
            assert np.array_equal(forward.logits(), wanted.logits())
            if whole:
                assert torch.equal(forward.hidden(), wanted.hidden())


def test_each_part_runs_operations_of_its_own(tmp_path: Path, kernels: Kernels) -> None:
    decoder = open_decoder(tmp_path, LLAMA, kernels, torch.float32)
    recorded: Any = open_forward(decoder, kernels, decoder.make_kv(2, BLOCK), BLOCK, max_tokens=8, max_slices=2)
    program = recorded.program
    program.timed, before = True, set()
    for part in range(4):
        program.run([Slice(0, 0, (1, 2, 3), (0,))], [2], part, 4)
        run = {number for number, seconds in enumerate(program._native.seconds) if seconds > 0}
        count = len(program._operations)
        assert run - before == set(range(count * part // 4, count * (part + 1) // 4))
        before = run
    with pytest.raises(ValueError, match="the program has"):
        program._native.run(kernels.native, [Slice(0, 0, (1,), (0,))], program._tables, BLOCK, [0], 0, count + 1)  # type: ignore[attr-defined]


def test_the_middle_of_a_step_that_was_not_begun_is_refused(tmp_path: Path, kernels: Kernels) -> None:
    decoder = open_decoder(tmp_path, LLAMA, kernels, torch.float32)
    plain = Plain(decoder, decoder.make_kv(2, BLOCK), BLOCK)
    with pytest.raises(ValueError, match="part 1 of a step that was not begun"):
        plain.run([Slice(0, 0, (1, 2, 3), (0,))], [2], part=1, parts=2)
