"""Calibration from end to end on tiny models: what it writes, that it goes on where it was stopped, what it refuses."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import weft.comet.calibrate
from weft.comet import reference
from weft.comet.calibrate import (
    Model,
    Progress,
    Settings,
    Text,
    quantise_model,
    quantised_linears,
    through,
)
from weft.comet.checkpoint import FmpqConfig, QuantisedLayer, read_layer
from weft.comet.forward import plain_linears
from weft.comet.layer import Method, PreparedLayer
from weft.comet.outer import as_it_was
from weft.comet.report import Summary, as_text
from weft.comet.weights import Rounding
from weft.comet.work import INDEX_FILE, load_plan, shard
from weft.errors import CheckpointError

ModelOf = Callable[..., Model]
TEXT = Text(
    torch.randint(0, 50, (6, 32), generator=torch.Generator().manual_seed(5)),
    torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(6)),
)


def quantise(
    model: Model, folder: Path, method: Method | None = None, rounding: Rounding | None = None, text: Text = TEXT
) -> tuple[FmpqConfig, Summary, list[Progress]]:
    told: list[Progress] = []
    settings = Settings(method or Method(budget=0.3), rounding or Rounding())
    folder.mkdir(exist_ok=True)
    config, summary = quantise_model(model, text, settings, folder, told.append)
    return config, summary, told


def layers_of(folder: Path, config: FmpqConfig, model: Model) -> list[QuantisedLayer]:
    count = model.shapes.layers
    paths = [shard(folder, index, count) for index in range(count)]
    layers = []
    for index, path in enumerate(paths):
        named = load_file(path)
        tensors = {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in named.items()}
        layers.append(read_layer(tensors, config, model.shapes, index, path))
    return layers


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", ["llama", "biased llama", "qwen3"])
def test_the_stored_layers_come_near_the_float_ones(tmp_path: Path, model_of: ModelOf, family: str) -> None:
    model = model_of(family)
    config, summary, _ = quantise(model, tmp_path / "q")
    hidden = coarse = as_it_was(model.rest()).embed(TEXT.held_out)
    for index, layer in enumerate(layers_of(tmp_path / "q", config, model)):
        tensors = model.layer(index)
        hidden = through(hidden, tensors, model, index, plain_linears(tensors))
        coarse = through(coarse, layer.norms, model, index, quantised_linears(layer))
    error = (hidden - coarse).square().mean() / hidden.square().mean()
    assert error < 0.1
    assert summary.layers[-1].held_out_decibels == pytest.approx(-10 * float(error.log10()), abs=0.1)
    assert all(row.decibels > 13 for one in summary.layers for row in one.sites)
    assert summary.quality.kl < 0.2


def test_fake_linears_compute_what_the_integer_reference_does(tmp_path: Path, model_of: ModelOf) -> None:
    model = model_of("biased llama")
    config, _, _ = quantise(model, tmp_path / "q")
    layer = layers_of(tmp_path / "q", config, model)[0]
    for exact_a4 in (True, False):
        fake = quantised_linears(layer, exact_a4=exact_a4)
        for site, one in layer.sites.items():
            x = torch.randn(5, one.form.channels)
            expected = reference.linear(x, one.form, one.linear, exact_a4=exact_a4)
            assert torch.allclose(fake(site, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["fmpq", "paper"])
def test_a_layers_weights_are_gone_before_the_next_layer_is_read(
    tmp_path: Path, model_of: ModelOf, method: str
) -> None:
    model = model_of(num_hidden_layers=3)
    alive: list[weakref.ref[Any]] = []
    reads = 0

    def layer(index: int) -> dict[str, torch.Tensor]:
        nonlocal reads
        reads += 1
        assert not any(reference() is not None for reference in alive), f"read {reads} is of layer {index}"
        arrays = {name: tensor.numpy().copy() for name, tensor in model.layer(index).items()}
        alive[:] = [weakref.ref(array) for array in arrays.values()]  # a tensor and its views hold the array
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    quantise(dataclasses.replace(model, layer=layer), tmp_path / "q", Method(name=method))
    assert reads == (9 if method == "fmpq" else 6)


def test_the_budget_bounds_the_share_of_8_bits_over_the_model(tmp_path: Path, model_of: ModelOf) -> None:
    shares = []
    for budget in (0.0, 0.3, 1.0):
        config, summary, _ = quantise(model_of(), tmp_path / f"{budget}", Method(budget=budget), Rounding(8))
        shares.append(summary.outlier_share)
        blocks = sum(map(sum, config.outlier_blocks.values()))
        assert (blocks == 0) == (budget == 0)
        assert summary.bits_per_weight == pytest.approx(4.125 + 4 * summary.outlier_share)
    assert shares[0] == 0
    assert 0 < shares[1] <= 0.3
    assert shares[2] == 1


def test_more_8_bit_blocks_lose_less(tmp_path: Path, model_of: ModelOf) -> None:
    kl = [quantise(model_of(), tmp_path / f"{budget}", Method(budget=budget))[1].quality.kl for budget in (0.0, 1.0)]
    assert kl[1] < 0.7 * kl[0]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "stop_at", [("looking at the layers", 1), ("weighing the blocks", 1), ("quantising", 0), ("quantising", 1)]
)
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, model_of: ModelOf, stop_at: tuple[str, int]
) -> None:
    model = model_of()
    _, whole, _ = quantise(model, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if (progress.phase, progress.done) == stop_at:
            raise Stopped

    again = tmp_path / "again"
    again.mkdir()
    settings = Settings(Method(budget=0.3), Rounding())
    with pytest.raises(Stopped):
        quantise_model(model, TEXT, settings, again, stop)
    kept = {path: path.stat().st_mtime_ns for path in again.glob("model-*.safetensors")}
    assert len(kept) == (stop_at[1] if stop_at[0] == "quantising" else 0)
    _, summary, _ = quantise(model, again)
    assert contents(again) == contents(tmp_path / "whole")
    assert summary == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_plans_come_back_from_their_files(tmp_path: Path, model_of: ModelOf) -> None:
    def stop(progress: Progress) -> None:
        if progress.phase == "quantising":
            raise Stopped

    with pytest.raises(Stopped):
        quantise_model(model_of(), TEXT, Settings(Method(), Rounding()), tmp_path, stop)
    plan = load_plan(tmp_path / "plan-00000.safetensors")
    assert plan.sites["down"].order.sort().values.tolist() == list(range(256))
    assert plan.value_transform


def test_what_is_left_is_a_folder_of_shards_and_their_index(tmp_path: Path, model_of: ModelOf) -> None:
    import json

    model = model_of(dtype=torch.bfloat16)
    quantise(model, tmp_path / "q")
    names = sorted(path.name for path in (tmp_path / "q").iterdir())
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names == [*shards, INDEX_FILE]
    index = json.loads((tmp_path / "q" / INDEX_FILE).read_text())["weight_map"]
    assert index["model.layers.1.mlp.up_proj.weight_packed"] == shards[1]
    assert index["model.embed_tokens.weight"] == shards[2]
    assert "model.layers.0.down.permutation" not in index


def test_progress_is_told_for_every_layer_of_every_pass(tmp_path: Path, model_of: ModelOf) -> None:
    told = quantise(model_of(), tmp_path / "q")[2]
    assert [(one.phase, one.done) for one in told] == [
        (phase, done) for phase in ("looking at the layers", "weighing the blocks", "quantising") for done in range(3)
    ]
    assert not any(one.note for one in told)


def test_silent_inputs_are_warned_of_by_layer_and_site(tmp_path: Path, model_of: ModelOf) -> None:
    model = model_of()
    model.layer(1)["post_attention_layernorm.weight"][:] = 0  # type: ignore[index]
    told = quantise(model, tmp_path / "q")[2]
    notes = [one.note for one in told if one.note]
    assert len(notes) == 2
    assert notes[0].startswith("layer 1, mlp: ") and notes[1].startswith("layer 1, down: ")


def test_inputs_that_blocks_do_not_divide_are_refused_by_tensor(tmp_path: Path, model_of: ModelOf) -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.weight .* has 200 input channels"):
        quantise(model_of(intermediate_size=200), tmp_path / "q")
    assert not list((tmp_path / "q").iterdir())


def test_the_papers_method_runs_on_its_own_threshold(tmp_path: Path, model_of: ModelOf) -> None:
    method = Method(name="paper", threshold=6)
    config, summary, _ = quantise(model_of(), tmp_path / "q", method, Rounding(compensate=False))
    assert config.outlier_blocks["mlp"] == (1, 1)
    assert not any(any(flags) for flags in config.hadamard.values())
    assert summary.outlier_share > 0.3


def test_the_report_names_every_layer_and_the_totals(tmp_path: Path, model_of: ModelOf) -> None:
    _, summary, _ = quantise(model_of(), tmp_path / "q")
    text = as_text(summary)
    assert "8-bit activations" in text and "top-1 flips" in text
    assert len(text.splitlines()) == 2 + 2 + 10
    raw = summary.as_json()
    assert raw["totals"]["outlier_share"] == summary.outlier_share
    assert [row["site"] for row in raw["layers"][1]["sites"]] == ["attention", "output", "mlp", "down"]


def test_each_layer_is_calibrated_on_what_the_quantised_ones_before_it_make(
    tmp_path: Path, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = model_of(), []
    original = weft.comet.calibrate.quantise_layer

    def watching(prepared: PreparedLayer, hidden: torch.Tensor, *rest: Any) -> Any:
        seen.append(hidden.clone())
        return original(prepared, hidden, *rest)

    monkeypatch.setattr(weft.comet.calibrate, "quantise_layer", watching)
    config, _, _ = quantise(model, tmp_path / "q")
    first = layers_of(tmp_path / "q", config, model)[0]
    start = as_it_was(model.rest()).embed(TEXT.calibration)
    assert torch.equal(seen[0], start)
    assert torch.allclose(seen[1], through(start, first.norms, model, 0, quantised_linears(first)), atol=1e-5)
