"""What benchmarks/accuracy.py is made of: injections that preserve the model, and figures that are what they say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from weft.comet.calibrate import Text
from weft.comet.forward import SITES

from .conftest import make_model, tiny_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_, CONFIG = tiny_config()
TOKENS = torch.randint(0, CONFIG.vocabulary, (4, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("accuracy", "outliers", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("accuracy")


def whole() -> dict[str, torch.Tensor]:
    model = make_model(CONFIG)
    layers = {
        f"model.layers.{index}.{name}": tensor
        for index in range(CONFIG.layers)
        for name, tensor in model.layer(index).items()
    }
    return layers | dict(model.rest())


def test_every_injection_preserves_the_model_and_makes_outliers(accuracy: ModuleType) -> None:
    tensors = whole()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    versions = list(accuracy.make_versions(tensors, CONFIG, Text(TOKENS, TOKENS), [None, *accuracy.INJECTIONS]))
    assert len(versions) == 6
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    plain = inputs(accuracy, versions[0])
    places = {"norm gain": "attention", "up/down": "down", "V/O and K/Q": "output", "all of them": "mlp"}
    for version in versions[1:]:
        if version.name in places:
            site = places[version.name]
            assert inputs(accuracy, version)[site] > 1.3 * plain[site]
    rotated = next(version for version in versions if version.name == "PCA-rotated")
    rows = accuracy.rows_of_the_residual(rotated.model, TOKENS)
    moments = rows.T @ rows
    assert torch.allclose(moments, moments.diagonal().diag(), atol=1e-3 * float(moments.max()))
    assert (moments.diagonal().diff() < 1e-3).all()


def inputs(accuracy: ModuleType, version: object) -> dict[str, float]:
    """How far the largest channel of each site's input stands out, over the median."""
    largest: dict[str, torch.Tensor] = {}

    def watching(linears: object) -> object:
        def apply(site: str, x: torch.Tensor) -> torch.Tensor:
            largest[site] = x.abs().amax(dim=0)
            return linears(site, x)  # type: ignore[operator]

        return apply

    layers = accuracy.exact(version.model)  # type: ignore[attr-defined]
    parts = [(norms, watching(linears)) for norms, linears in layers.parts]
    accuracy.log_probabilities(version.model, accuracy.Layers(parts, None, 0.0, 32.0), TOKENS)  # type: ignore[attr-defined]
    return {site: float(largest[site].max() / largest[site].median()) for site in SITES}


def test_a_changed_model_is_no_version(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tensors: dict[str, torch.Tensor], *_: object) -> dict[str, torch.Tensor]:
        name = "model.layers.0.mlp.down_proj.weight"
        return tensors | {name: tensors[name] * 1.01}

    monkeypatch.setitem(accuracy.INJECTIONS, "wrong", wrong)
    with pytest.raises(SystemExit, match="the injection 'wrong' changed the model"):
        list(accuracy.make_versions(whole(), CONFIG, Text(TOKENS, TOKENS), [None, "wrong"]))


def test_the_float_model_loses_nothing_and_coarser_ones_more(accuracy: ModuleType) -> None:
    version = next(accuracy.make_versions(whole(), CONFIG, Text(TOKENS, TOKENS), [None]))
    sizes = torch.full((4,), 57.0, dtype=torch.float64)
    kl = []
    with torch.no_grad():
        made = dict(accuracy.all_methods(version.model, Text(TOKENS, TOKENS), quick=False))
        assert len(made) == 11
        for name in ("FP32", "W8A8", "FMPQ weft W4AxKV4", "W4A4 naive"):
            row = accuracy.measure(version, made[name], TOKENS, sizes)
            kl.append(row["kl"])
            assert row["loss_low"] <= row["loss_percent"] <= row["loss_high"]
    assert kl[0] == 0
    assert kl == sorted(kl)
    assert accuracy.measure(version, made["FMPQ weft W4AxKV4, all 4-bit"], TOKENS, sizes)["kl"] > 0
    nats = torch.nn.functional.nll_loss(version.logs[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    exact = accuracy.measure(version, accuracy.exact(version.model), TOKENS, sizes)
    assert exact["bits_per_byte"] == pytest.approx(float(nats) / 0.6931472 / (4 * 57), rel=1e-5)


def test_four_bits_asymmetric_keep_both_ends_and_fifteen_steps(accuracy: ModuleType) -> None:
    x = torch.randn(3, 5, 2, 64)
    stored = accuracy.asymmetric4(x)
    assert torch.allclose(stored.amin(dim=-1), x.amin(dim=-1))
    assert torch.allclose(stored.amax(dim=-1), x.amax(dim=-1), atol=1e-5)
    step = (x.amax(dim=-1) - x.amin(dim=-1)) / 15
    assert ((stored - x).abs() <= step[..., None] * 0.501).all()
    assert torch.equal(accuracy.asymmetric4(torch.ones(2, 8)), torch.ones(2, 8))


def test_claims_take_the_worst_version(accuracy: ModuleType) -> None:
    losses = {"built-in": (1.0, 4.0, 9.0), "all of them": (1.4, 2.8, 300.0)}
    methods = ("FMPQ weft W4AxKV4", "FMPQ paper W4AxKV4", "W4A4 naive")
    rows = [
        {"version": version, "method": method, "loss_percent": loss, "outlier_share": 0.09}
        for version, values in losses.items()
        for method, loss in zip(methods, values, strict=True)
    ]
    found = accuracy.claims(rows)
    assert found["fmpq_bpb_loss_percent"] == 1.4
    assert found["fmpq_of_paper_loss"] == 0.5
    assert found["naive_w4a4_loss_percent"] == 300.0
    assert found["fmpq_outlier_mac_percent"] == pytest.approx(9.0)
