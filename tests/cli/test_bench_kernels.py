"""`weft bench kernels`: what is measured is what a step computes, and every line of it is in the file."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.cli import main
from weft.devices.kernel_times import Case, CpuMachine, cases_of, measure, prepare
from weft.kernels.reference import ReferenceKernels
from weft.models.families import ModelConfig, read_config
from weft.models.mixtures import Experts
from weft.text.hub import resolve_model


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return read_config(resolve_model("builtin"))


class Counting(ReferenceKernels):
    """Remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__((0,))
        self.called: list[tuple[str, tuple[int, ...]]] = []
        self.cores: list[tuple[int, ...]] = []

    def linear(self, x: torch.Tensor, packed: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        y = super().linear(x, packed, dtype)
        self.called.append(("gemm", (*x.shape, y.shape[1])))
        return y

    def attention(self, q: torch.Tensor, kv: Any, batch: Any, *rest: Any) -> torch.Tensor:
        self.called.append(("attention", (len(batch.contexts), *batch.contexts.unique().tolist(), len(q))))
        return super().attention(q, kv, batch, *rest)

    def set_cores(self, cores: tuple[int, ...]) -> None:
        self.cores.append(cores)


def test_a_call_has_the_shape_of_its_case(model: ModelConfig) -> None:
    kernels = Counting()
    machine = CpuMachine(kernels, (0, 1))
    with torch.inference_mode():
        prepare(machine, model, Case("gemm", "o", "bf16", 3, 64, 32))()
        prepare(machine, model, Case("attention", "decode", "auto", 4, 1, 33))()
        prepare(machine, model, Case("attention", "prefill", "auto", 1, 20, 20))()
    assert kernels.called == [("gemm", (3, 32, 64)), ("attention", (4, 33, 4)), ("attention", (1, 20, 20))]


def test_the_layers_are_those_of_the_model(model: ModelConfig) -> None:
    cases = cases_of(model, "bf16", tokens=(1, 8), sequences=(2,), contexts=(16,))
    weights = sum(case.n * case.k for case in cases if case.operation == "gemm" and case.m == 1 and case.name != "head")
    attention = model.hidden_size * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    assert weights == attention + 3 * model.hidden_size * model.intermediate_size
    assert [(case.name, case.m, case.n, case.k) for case in cases if case.operation == "attention"] == [
        ("decode", 2, 1, 16),
        ("prefill", 1, 8, 8),
    ]


def test_a_layer_with_experts_has_the_products_of_one_of_them_and_the_shared_ones(model: ModelConfig) -> None:
    mixed = replace(model, intermediate_size=96, experts=Experts(6, 2, 96, 160, normalised=True))
    cases = cases_of(mixed, "bf16", tokens=(1,), sequences=(1,), contexts=(16,))
    width = model.hidden_size
    shapes = {case.name: (case.n, case.k) for case in cases if case.operation == "gemm"}
    assert (shapes["gate_up"], shapes["down"], shapes["router"]) == ((192, width), (width, 96), (6, width))
    assert (shapes["shared_gate_up"], shapes["shared_down"]) == ((320, width), (width, 160))


def test_each_share_is_measured_and_the_whole_device_comes_back(model: ModelConfig) -> None:
    kernels = Counting()
    cases = [Case("norm", "norm", "bf16", 2, 64, 0)]
    found = list(measure(CpuMachine(kernels, (3, 5)), model, cases, (1, 2), 3))
    assert [(one.share, one.shares) for one in found] == [(1, 2), (2, 2)]
    assert all(0 < one.least <= one.seconds <= one.greatest for one in found)
    assert kernels.cores == [(3,), (3, 5), (3, 5)]


def test_every_line_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "times.csv"
    flags = ["--tokens", "1,4", "--sequences", "1", "--contexts", "32", "--rounds", "1", "--disable-progress"]
    assert main(["bench", "kernels", *flags, "--csv", str(file)]) == 0
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 5 * 2 + 2 + 1 + 1
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert "GFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "0"], "--tokens is '0'; each number must be from 1"),
        (["--contexts", "a"], "--contexts is 'a'; it must be whole numbers with commas"),
        (["--shares", "9999"], "--shares is '9999'; the device has"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--csv", "/nowhere/x.csv"], "--csv /nowhere/x.csv cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_said(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *flags]) in (1, 2)
    assert words in capsys.readouterr().err
