"""A rank's part of a model: together the parts are the whole, a file is read in part, and what cannot be is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from weft.comet.checkpoint import parse
from weft.comet.linear import QuantisedReferenceKernels
from weft.core.plan import Slice
from weft.errors import ConfigError
from weft.kernels.base import Kernels
from weft.kernels.reference import ReferenceKernels
from weft.models import loader, quantised
from weft.models.batch import make_batch
from weft.models.checkpoint import Checkpoint
from weft.models.decoder import Decoder
from weft.models.families import parse_config, read_config
from weft.models.loader import Dummy, load_weights
from weft.models.shard import WHOLE, Cut, Part, Shard, head_cut, head_rows, output_blocks, output_order, shard_config
from weft.weave.seam import Joined, Seam

BLOCK = 16
PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
}
TOKENS = (5, 90, 17, 130, 2, 64, 7)


@given(st.integers(1, 9), st.integers(0, 200))
@settings(deadline=None)
def test_parts_are_the_whole(ranks: int, count: int) -> None:
    parts = [Part(rank, ranks) for rank in range(ranks)]
    spans = [part.span(count) for part in parts]
    assert [number for first, end in spans for number in range(first, end)] == list(range(count))
    assert sorted(number for part in parts for number in part.dealt(count)) == list(range(count))


@given(st.integers(1, 70), st.integers(1, 8))
@settings(deadline=None)
def test_the_parts_of_the_vocabulary_in_order_and_zeros_at_the_end(vocabulary: int, ranks: int) -> None:
    config = replace(parse_config(PLAIN), vocabulary=vocabulary)
    table = torch.arange(1, vocabulary + 1).unsqueeze(1)
    parts = [head_cut(config, Part(rank, ranks)).read(table, table.shape) for rank in range(ranks)]
    assert {len(part) for part in parts} == {head_rows(vocabulary, ranks)}
    joined = torch.cat(parts).flatten().tolist()
    assert joined == [*range(1, vocabulary + 1)] + [0] * (len(joined) - vocabulary)


def logits_of_ranks(folder: Path, kernels: Kernels, dtype: torch.dtype, ranks: int, seed: int | None) -> torch.Tensor:
    """Of TOKENS, by decoders that take turns: the sums over ranks are made here."""
    config = read_config(folder)
    parts = [Part(rank, ranks) for rank in range(ranks)]
    decoders = [
        Decoder(
            shard_config(config, part),
            load_weights(folder, config, kernels, dtype, dummy_seed=seed, part=part),
            kernels,
            64,
        )
        for part in parts
    ]
    batch = make_batch([Slice(0, 0, TOKENS, (1,))], BLOCK)
    strands = [decoder.strand(batch, decoder.make_kv(2, BLOCK)) for decoder in decoders]
    seams = [next(strand) for strand in strands]
    hidden: list[torch.Tensor] = []
    while not hidden:
        first = seams[0]
        total = first.partial if first.residual is None else sum(seam.partial for seam in seams)
        assert isinstance(total, torch.Tensor)
        joined: Joined = decoders[0].join(Seam(total, first.residual, first.weight, first.eps, first.kept))
        try:
            seams = [strand.send((joined[0].clone(), joined[1].clone())) for strand in strands]
        except StopIteration as end:
            hidden.append(end.value)
    return torch.cat([decoder.logits(hidden[0]) for decoder in decoders], dim=1)[:, : config.vocabulary]


def logits_of_one(folder: Path, kernels: Kernels, dtype: torch.dtype, seed: int | None) -> torch.Tensor:
    config = read_config(folder)
    decoder = Decoder(config, load_weights(folder, config, kernels, dtype, dummy_seed=seed), kernels, 64)
    return decoder.logits(decoder.hidden(make_batch([Slice(0, 0, TOKENS, (1,))], BLOCK), decoder.make_kv(2, BLOCK)))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_together_compute_the_model(tmp_path: Path, ranks: int, tied: bool) -> None:
    config = PLAIN | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    drawn = Dummy(loader.tensor_shapes(parse_config(config)), 3, absent="lm_head.weight" if tied else None)
    save_file(drawn.take([*drawn.shapes]), tmp_path / "model.safetensors")
    kernels = ReferenceKernels((0,))
    wanted = logits_of_one(tmp_path, kernels, torch.float32, None)
    assert torch.equal(wanted, logits_of_one(tmp_path, kernels, torch.float32, 3))  # random weights are cut alike
    for seed in (None, 3):
        torch.testing.assert_close(logits_of_ranks(tmp_path, kernels, torch.float32, ranks, seed), wanted)


@pytest.mark.parametrize("outlier_bits", [4, 8])
def test_ranks_together_compute_a_quantised_model(
    tmp_path: Path, write_fmpq: Callable[..., None], outlier_bits: int
) -> None:
    write_fmpq(tmp_path, outlier_bits)
    kernels = QuantisedReferenceKernels((0,))
    wanted = logits_of_one(tmp_path, kernels, torch.float32, None)
    got = logits_of_ranks(tmp_path, kernels, torch.float32, 2, None)
    assert wanted.std() > 0.1
    # The sums are the same but for their order, which may move a value of the next layer's input by one of 127 steps.
    assert (got - wanted).abs().mean() < 0.01 * wanted.std()


def test_blocks_with_heads_of_several_ranks(tmp_path: Path, write_fmpq: Callable[..., None]) -> None:
    """A rank has zeros in the place of what is not its own; every weight acts on every channel once."""
    heads = torch.arange(512).view(8, 64)[[0, 4, 1, 5, 2, 3, 6, 7]]  # two blocks with heads of both ranks
    draw = torch.Generator().manual_seed(3)
    order = torch.cat([block[torch.randperm(128, generator=draw)] for block in heads.flatten().view(-1, 128)])
    write_fmpq(tmp_path, 8, order)
    config = read_config(tmp_path)
    assert [output_blocks(order, config, Part(rank, 2)) for rank in range(2)] == [(0, 1, 2), (0, 1, 3)]
    kernels = QuantisedReferenceKernels((0,))
    wanted = logits_of_one(tmp_path, kernels, torch.float32, None)
    got = logits_of_ranks(tmp_path, kernels, torch.float32, 2, None)
    # A block with zeros in it has another scale: the input is rounded to other integers, finer ones.
    assert (got - wanted).abs().mean() < 0.05 * wanted.std()


@pytest.mark.parametrize("mixed", [False, True])
def test_an_order_of_a_rank_has_each_of_its_channels_once_and_then_zeros(
    tmp_path: Path, write_fmpq: Callable[..., None], mixed: bool
) -> None:
    write_fmpq(tmp_path, 4)
    config, name = read_config(tmp_path), "model.layers.0.output.permutation"
    order = Checkpoint(tmp_path).take([name])[name]
    order = order.roll(64) if mixed else order
    x = torch.randn(512, generator=torch.Generator().manual_seed(4))
    total = torch.zeros(512)
    for rank in range(2):
        part = Part(rank, 2)
        own, blocks = output_order(order, config, part), output_blocks(order, config, part)
        assert sorted(own.tolist()) == list(range(len(own)))
        padded = torch.cat([x[256 * rank : 256 * rank + 256], torch.zeros(len(own) - 256)])
        for place, block in enumerate(blocks):
            total[128 * block : 128 * block + 128] += padded[own[128 * place : 128 * place + 128]]
    assert torch.equal(total, x[order.long()])


def test_no_more_of_a_file_is_read_than_the_part(tmp_path: Path, write_fmpq: Callable[..., None]) -> None:
    """The bytes of the slices that a rank of two asks for."""
    write_fmpq(tmp_path, 8)
    config = read_config(tmp_path)
    source, asked = Checkpoint(tmp_path), []
    shard, _ = quantised.shard(source, config, parse(config.quantization, config), Part(1, 2))
    whole = sum(entry.file.stat().st_size for entry in list(source.entries.values())[:1])

    class Noted:
        def __getitem__(self, at: tuple[slice, ...]) -> torch.Tensor:
            shape = [len(range(*piece.indices(size))) for piece, size in zip(at, self.shape, strict=False)]
            asked.append(torch.Size([*shape, *self.shape[len(shape) :]]).numel() * self.size)
            return torch.empty([*shape, *self.shape[len(shape) :]])

        def __init__(self, shape: tuple[int, ...], size: int) -> None:
            self.shape, self.size = shape, size

    for name, cut in shard.cuts.items():
        if name in source:
            entry = source.entries[name]
            assert cut.read(Noted(entry.shape, quantised.BYTES[entry.dtype]), entry.shape).shape == cut.shape(
                entry.shape
            )
    assert 0 < sum(asked) < 0.55 * whole


@pytest.mark.parametrize(("ranks", "words"), [(3, "1, 2, 4 would"), (8, "4 key-value heads")])
def test_heads_that_cannot_be_divided(ranks: int, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size is {ranks}.*8 heads, 4 key-value heads.*") as caught:
        shard_config(parse_config(PLAIN), Part(0, ranks))
    assert words in caught.value.message


def test_the_whole_is_left_alone() -> None:
    config = parse_config(PLAIN)
    assert shard_config(config, WHOLE) is config
    source = Dummy({"a": (4, 2)}, 1)
    assert torch.equal(Shard(source, {}).take(["a"])["a"], source.take(["a"])["a"])
    assert Cut(0, (), 3).read(torch.ones(5, 2), (5, 2)).tolist() == [[0.0, 0.0]] * 3
