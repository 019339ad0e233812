"""Embedding and output layer: how well they are kept, what is written of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weft.comet import reference
from weft.comet.calibrate import Model, Settings, Text, quantise_model, quantised_linears, through
from weft.comet.checkpoint import FmpqConfig, QuantisedSite, read_layer
from weft.comet.layer import Method
from weft.comet.outer import (
    EMBEDDING,
    HEAD,
    NORM,
    as_it_was,
    embedding_shapes,
    head_shapes,
    outer_tensors,
    quantise_embedding,
    read_embedding,
    read_head,
)
from weft.comet.reference import QuantisedLinear
from weft.comet.report import Summary, decibels
from weft.comet.weights import Rounding
from weft.comet.work import shard
from weft.errors import CheckpointError

ModelOf = Callable[..., Model]
TEXT = Text(
    torch.randint(0, 50, (6, 32), generator=torch.Generator().manual_seed(5)),
    torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(6)),
)


def quantised(
    model: Model, folder: Path, head: int, embedding: int, budget: float = 0.3, method: str = "fmpq"
) -> tuple[FmpqConfig, Summary, dict[str, torch.Tensor]]:
    """The config, the report, and the tensors beside the layers."""
    settings = Settings(Method(method, budget), Rounding(), head, embedding)
    folder.mkdir()
    config, summary = quantise_model(model, TEXT, settings, folder, lambda _: None)
    return config, summary, load_file(shard(folder, model.shapes.layers, model.shapes.layers))


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 18, 24), (8, 40, 48)])
def test_an_embedding_is_kept_to_its_bits(bits: int, least: float, most: float) -> None:
    weight = torch.randn(300, 256) * torch.rand(300, 1)
    found = quantise_embedding(weight, bits)
    assert isinstance(found, QuantisedLinear)
    assert least < decibels(weight, found.dequantised()) < most
    outer = replace(as_it_was({EMBEDDING: weight, NORM: torch.ones(256)}), embedding=found)
    tokens = torch.tensor([[5, 299, 0]])
    assert torch.equal(outer.embed(tokens), found.dequantised()[tokens])
    assert quantise_embedding(weight, 16) is weight


@pytest.mark.parametrize("method", ["fmpq", "paper"])
@pytest.mark.parametrize("bits", [4, 8])
def test_head_and_embedding_come_back_as_they_were_written(
    tmp_path: Path, model_of: ModelOf, bits: int, method: str
) -> None:
    model = model_of()
    rest = dict(model.rest())
    rest[NORM] = rest[NORM].clone()
    rest[NORM][5::50] *= 20  # outliers, which the balance moves into the norm's gain
    model = replace(model, rest=lambda: rest)
    config, summary, tensors = quantised(model, tmp_path / "q", bits, bits, method=method)
    assert set(tensors) == {NORM, *head_shapes(config, model.shapes), *embedding_shapes(config, model.shapes)}
    embedding = read_embedding(tensors, config, model.shapes, Path("file"))
    assert decibels(rest[EMBEDDING], embedding.dequantised()) > (18 if bits == 4 else 40)
    head = read_head(tensors, config, model.shapes, Path("file"))
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    exact = as_it_was(rest).logits(model.shapes.eps)(x)
    norm = tensors[NORM].float()
    rows = torch.nn.functional.rms_norm(x, norm.shape, norm, model.shapes.eps)
    found = reference.linear(rows, head.form, head.linear)
    assert decibels(exact, found) > (14 if bits == 4 else 25)
    assert summary.head is not None and summary.head.bits_per_weight == bits + 0.125
    again = outer_tensors(replace(as_it_was(rest), embedding=embedding, norm=norm, head=head), config, tied=True)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_heads_blocks_come_out_of_the_one_budget(tmp_path: Path, model_of: ModelOf) -> None:
    shares = {}
    for budget in (0.0, 0.3, 1.0):
        config, summary, _ = quantised(model_of(), tmp_path / f"{budget}", 4, 16, budget)
        assert config.head is not None and summary.head is not None
        assert config.head.outlier_blocks == summary.head.outlier_blocks
        rows = [*(row for layer in summary.layers for row in layer.sites), summary.head]
        eight = sum(row.work * row.outlier_blocks / row.blocks for row in rows)
        shares[budget] = eight / sum(row.work for row in rows)
        assert summary.outlier_share == pytest.approx(shares[budget])
    assert shares[0.0] == 0 and 0 < shares[0.3] <= 0.3 and shares[1.0] == 1


def test_a_head_of_8_bits_is_outside_of_the_budget(tmp_path: Path, model_of: ModelOf) -> None:
    _, summary, _ = quantised(model_of(), tmp_path / "q", 8, 16, 0.0)
    assert summary.outlier_share == 0
    assert summary.head is not None and summary.head.outlier_blocks == summary.head.blocks


def test_the_report_measures_the_model_with_its_quantised_head_and_embedding(tmp_path: Path, model_of: ModelOf) -> None:
    model = model_of()
    config, summary, tensors = quantised(model, tmp_path / "q", 4, 4)
    values = read_embedding(tensors, config, model.shapes, Path("file"))
    head: QuantisedSite = read_head(tensors, config, model.shapes, Path("file"))
    hidden = values.dequantised()[TEXT.held_out]
    for index in range(model.shapes.layers):
        path = shard(tmp_path / "q", index, model.shapes.layers)
        named = {name.removeprefix(f"model.layers.{index}."): one for name, one in load_file(path).items()}
        layer = read_layer(named, config, model.shapes, index, path)
        hidden = through(hidden, layer.norms, model, index, quantised_linears(layer))
    norm = tensors[NORM].float()
    rows = torch.nn.functional.rms_norm(hidden, norm.shape, norm, model.shapes.eps)[:, :-1].flatten(0, 1)
    logits = reference.linear(rows, head.form, head.linear, exact_a4=True)
    nats = torch.nn.functional.cross_entropy(logits, TEXT.held_out[:, 1:].flatten())
    assert summary.quality.nats == pytest.approx(float(nats), rel=1e-4)


def test_an_untied_head_is_the_one_that_is_kept(tmp_path: Path, model_of: ModelOf) -> None:
    model = model_of()
    head = torch.randn(50, 128, generator=torch.Generator().manual_seed(3))
    untied = replace(model, rest=lambda: dict(model.rest()) | {HEAD: head})
    config, _, tensors = quantised(untied, tmp_path / "q", 8, 16)
    found = read_head(tensors, config, model.shapes, Path("file"))
    assert decibels(head, found.linear.dequantised()) > 40
    assert torch.equal(tensors[EMBEDDING], model.rest()[EMBEDDING])


def test_broken_tables_are_refused_by_file_and_name(tmp_path: Path, model_of: ModelOf) -> None:
    model = model_of()
    config, _, tensors = quantised(model, tmp_path / "q", 4, 4)
    shapes = model.shapes

    def refused(name: str, tensor: torch.Tensor) -> str:
        with pytest.raises(CheckpointError) as caught:
            reader = read_head if name.startswith("lm_head") else read_embedding
            reader(tensors | {name: tensor}, config, shapes, Path("part.safetensors"))
        assert "part.safetensors" in caught.value.message and name in caught.value.message
        return caught.value.message

    assert "is no permutation" in refused("lm_head.permutation", torch.zeros(128, dtype=torch.int32))
    assert "asks for I32 [50, 16]" in refused("lm_head.weight_packed", torch.zeros(50, 15, dtype=torch.int32))
    assert "not finite" in refused("lm_head.weight_scale", torch.full((50, 1), torch.inf, dtype=torch.bfloat16))
    assert "float32 [50, 1]" in refused("model.embed_tokens.weight_scale", torch.zeros(50, 1))
