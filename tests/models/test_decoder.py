"""The decoder against transformers: tiny random checkpoints of every family, through paged KV in random pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from weft.core.plan import Slice
from weft.errors import ConfigError
from weft.kernels import available, open_kernels
from weft.kernels.base import Kernels
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights
from weft.weave.seam import Seam

BUILTIN = Path(__file__).resolve().parents[2] / "src" / "weft" / "assets" / "builtin"
BLOCK = 16
LENGTHS = (90, 37, 64)
VOCABULARY = 131
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = SHAPE | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, biases everywhere": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, every head its own KV": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama 3.1 beyond its trained length": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama, linear rope": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
    ),
    "llama, dynamic rope": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "mistral, window shorter than the text": lambda: MistralConfig(**SHAPE, sliding_window=21),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2, windows in the upper layers": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=18, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2, yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3, head_dim of its own": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "qwen3, named windows": lambda: Qwen3Config(
        **SHAPE,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=33,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=5),
    "mixtral, window shorter than the text": lambda: MixtralConfig(
        **SHAPE, num_local_experts=3, num_experts_per_tok=1, sliding_window=21, head_dim=32
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=72),
    "qwen2_moe, weights that sum to 1, named windows, no biases": lambda: Qwen2MoeConfig(
        **EXPERTS,
        shared_expert_intermediate_size=8,
        norm_topk_prob=True,
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=18,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS),
    "qwen3_moe, weights that sum to 1, windows, biases": lambda: Qwen3MoeConfig(
        **EXPERTS, head_dim=32, norm_topk_prob=True, use_sliding_window=True, sliding_window=33, attention_bias=True
    ),
}


@dataclass(frozen=True)
class Truth:
    """A checkpoint, some sequences, and transformers' logits for them."""

    folder: Path
    sequences: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]


def randomise(model: torch.nn.Module) -> None:
    """Weights that make every part matter: biases are not 0, norms are not 1, logits are of order 1 to 10."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.3 if parameter.dim() == 1 else 0.15, generator=generator)


def oracle(model: Any, sequences: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return tuple(model(torch.tensor([tokens])).logits[0].float() for tokens in sequences)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    made: dict[str, Truth] = {}

    def make(family: str) -> Truth:
        if family not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()
            randomise(model)
            model.save_pretrained(folder)
            random = np.random.default_rng(3)
            sequences = tuple(tuple(random.integers(0, VOCABULARY, length).tolist()) for length in LENGTHS)
            made[family] = Truth(folder, sequences, oracle(model, sequences))
        return made[family]

    return make


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backend() -> Iterator[Callable[[str], Kernels]]:
    with ExitStack() as stack:

        def open_one(name: str) -> Kernels:
            kernels = open_kernels(name, (0,))
            stack.callback(kernels.close)
            return kernels

        yield open_one


def open_decoder(folder: Path, kernels: Kernels, dtype: torch.dtype = torch.float32) -> Decoder:
    config = read_config(folder)
    return Decoder(config, load_weights(folder, config, kernels, dtype), kernels, config.context)


def drive(
    decoder: Decoder, sequences: Sequence[tuple[int, ...]], chunks: Sequence[int], seed: int = 0
) -> list[torch.Tensor]:
    """Logits of every token, computed together in pieces of random lengths out of `chunks`, through random block
    tables in a pool that other tokens have used before."""
    random = np.random.default_rng(seed)
    needs = [-(-len(tokens) // BLOCK) for tokens in sequences]
    blocks = sum(needs) + 2
    kv = decoder.make_kv(blocks, BLOCK)
    stale = tuple(random.integers(0, VOCABULARY, min(blocks * BLOCK, decoder.max_model_len)).tolist())
    decoder.hidden(make_batch([Slice(99, 0, stale, tuple(range(blocks)))], BLOCK), kv)
    free = random.permutation(blocks).tolist()
    tables = [tuple(free.pop() for _ in range(need)) for need in needs]

    done = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(position < len(tokens) for position, tokens in zip(done, sequences, strict=True)):
        slices = []
        for index, tokens in enumerate(sequences):
            piece = tokens[done[index] : done[index] + int(random.choice(chunks))]
            if piece:
                slices.append(Slice(index, done[index], piece, tables[index]))
        random.shuffle(slices)  # type: ignore[arg-type]
        rows = decoder.logits(decoder.hidden(make_batch(slices, BLOCK), kv))
        for piece, part in zip(slices, rows.split([len(piece.tokens) for piece in slices]), strict=True):
            logits[piece.sequence].append(part)
            done[piece.sequence] = piece.end
    return [torch.cat(parts) for parts in logits]


def assert_close(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_in_any_pieces(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels], family: str, kernels: str
) -> None:
    case = truth(family)
    assert 1 < max(float(rows.abs().max()) for rows in case.logits) < 30
    decoder = open_decoder(case.folder, backend(kernels))
    assert_close(drive(decoder, case.sequences, [10_000]), case.logits)
    assert_close(drive(decoder, case.sequences, [1, 1, 2, 7, 33], seed=1), case.logits)


@pytest.mark.parametrize("kernels", available())
def test_one_token_at_a_time_is_the_same(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels], kernels: str
) -> None:
    case = truth("mistral, window shorter than the text")
    assert_close(drive(open_decoder(case.folder, backend(kernels)), case.sequences, [1]), case.logits)


@pytest.mark.parametrize("kernels", available()[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3, named windows", "qwen2_moe"])
def test_the_pieces_do_not_change_a_bit(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels], family: str, dtype: torch.dtype, kernels: str
) -> None:
    """Not so for the reference: the sums of torch's matrix product depend on the number of rows."""
    case = truth(family)
    decoder = open_decoder(case.folder, backend(kernels), dtype)
    whole = drive(decoder, case.sequences, [10_000])
    for chunks in ([1], [1, 1, 2, 7, 33]):
        pieces = drive(decoder, case.sequences, chunks, seed=len(chunks))
        assert all(part.equal(want) for part, want in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3, head_dim of its own"])
def test_bf16_is_as_close_to_the_truth_as_transformers_in_bf16(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels], family: str, kernels: str
) -> None:
    for got, peer, want in zip(*in_bf16(truth(family), backend(kernels)), strict=True):
        assert (got - want).square().mean() < 1.5 * (peer - want).square().mean()
        assert torch.cosine_similarity(got, want, dim=-1).min() > 0.995
        top = want.topk(2).values
        clear = top[:, 0] - top[:, 1] > 6 * (peer - want).square().mean().sqrt()
        assert clear.any()
        assert got.argmax(-1)[clear].equal(want.argmax(-1)[clear])


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_bf16_of_experts_is_as_close_in_most_rows(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels], family: str, kernels: str
) -> None:
    """In some, ours and theirs, rounding makes the router take an expert in the place of another that is nearly as
    good; these rows, and those that attend to them, differ by more."""
    got, peer, want = (torch.cat(rows) for rows in in_bf16(truth(family), backend(kernels)))
    assert (got - want).square().mean(dim=1).median() < 1.2 * (peer - want).square().mean(dim=1).median()
    assert (torch.cosine_similarity(got, want, dim=-1) > 0.995).float().mean() > 0.9


def in_bf16(case: Truth, kernels: Kernels) -> tuple[Sequence[torch.Tensor], ...]:
    """Logits in bfloat16, ours and transformers', and those of the rounded weights in float32."""
    rounded = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16, attn_implementation="eager")
    theirs = oracle(rounded.eval(), case.sequences)
    exact = oracle(rounded.float(), case.sequences)
    return drive(open_decoder(case.folder, kernels, torch.bfloat16), case.sequences, [1, 5, 40]), theirs, exact


@pytest.mark.parametrize("kernels", available())
def test_the_builtin_model_is_that_of_transformers(backend: Callable[[str], Kernels], kernels: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    random = np.random.default_rng(11)
    sequences = [tuple(random.integers(4, 4096, length).tolist()) for length in (300, 120)]
    decoder = open_decoder(BUILTIN, backend(kernels))
    assert_close(drive(decoder, sequences, [1, 60, 200]), oracle(model, sequences))


def test_two_lanes_share_weights_and_kv(truth: Callable[[str], Truth], backend: Callable[[str], Kernels]) -> None:
    case = truth("llama")
    config = read_config(case.folder)
    lanes = [backend("auto") for _ in range(2)]
    weights = load_weights(case.folder, config, lanes[0], torch.float32)
    prefill, decode = (Decoder(config, weights, kernels, 90) for kernels in lanes)
    kv = prefill.make_kv(6, BLOCK)
    tokens, blocks = case.sequences[0], (5, 0, 2, 1, 4, 3)
    prefill.hidden(make_batch([Slice(0, 0, tokens[:89], blocks)], BLOCK), kv)
    last = decode.logits(decode.hidden(make_batch([Slice(0, 89, tokens[89:], blocks)], BLOCK), kv))
    assert_close([last], [case.logits[0][89:]])


def test_a_strand_stops_at_every_seam_and_its_first_has_no_residual(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels]
) -> None:
    case = truth("llama")
    decoder = open_decoder(case.folder, backend("reference"))
    seams: list[Seam] = []
    strand = decoder.strand(make_batch([Slice(0, 0, case.sequences[1], (0, 1, 2))], BLOCK), decoder.make_kv(3, BLOCK))
    with pytest.raises(StopIteration), torch.inference_mode():
        seams.append(next(strand))
        while True:
            seams.append(strand.send(decoder.join(seams[-1])))
    assert len(seams) == 1 + 2 * 3
    assert [seam.residual is None for seam in seams] == [True] + [False] * 6
    assert all(seam.partial.shape == (37, 64) and seam.weight.shape == (64,) for seam in seams)


def test_two_strands_of_one_prompt_may_be_woven(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels]
) -> None:
    """Strand b, the later part of the prompt, is one stage behind a: it finds a's keys and values of its own layer."""
    case = truth("llama")
    decoder = open_decoder(case.folder, backend("reference"))
    kv, tokens, blocks = decoder.make_kv(6, BLOCK), case.sequences[0], tuple(range(6))
    a = decoder.strand(make_batch([Slice(0, 0, tokens[:50], blocks)], BLOCK), kv)
    b = decoder.strand(make_batch([Slice(0, 50, tokens[50:], blocks)], BLOCK), kv)
    ended = []
    with torch.inference_mode():
        ahead, behind = next(a), next(b)
        while len(ended) < 2:
            for strand in (a, b):
                try:
                    if strand is a:
                        ahead = a.send(decoder.join(ahead))
                    else:
                        behind = b.send(decoder.join(behind))
                except StopIteration as end:
                    ended.append(end.value)
        rows = decoder.logits(torch.cat(ended))
    assert_close([rows], [case.logits[0]])


def test_a_length_beyond_the_context_is_refused(
    truth: Callable[[str], Truth], backend: Callable[[str], Kernels]
) -> None:
    folder = truth("llama").folder
    config = read_config(folder)
    kernels = backend("reference")
    weights = load_weights(folder, config, kernels, torch.float32)
    with pytest.raises(ConfigError, match="--max-model-len is 129; the checkpoint's context is 128"):
        Decoder(config, weights, kernels, 129)
