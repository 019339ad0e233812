"""Collectives between processes and threads against ten lines of torch, bit for bit: shapes, cuts, formats, delays, and
what becomes of the others when a rank dies, hangs or does something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.kernels import available
from weft.kernels.quantised import quantise_rows, unpack_rows

BACKENDS = ("shm", "gloo")
many = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    from weft.kernels.cpu import CpuKernels

    made = CpuKernels(available()[0], (0,))
    yield made
    made.close()


@pytest.fixture(scope="module", params=[f"{backend}-{ranks}" for backend in BACKENDS for ranks in (2, 3, 4)])
def group(request: pytest.FixtureRequest, rank_processes: Any) -> Any:
    """One group of processes for many cases. Slots of a page: most messages take several chunks."""
    backend, ranks = request.param.split("-")
    processes = rank_processes.fork(int(ranks))
    options = {"slot_bytes": 16384, "spin": 0.0} if backend == "shm" else {}
    rank_processes.open(processes, backend, **options)
    return processes


def truth(case: dict[str, Any], made: dict[str, Any], kernels: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(what every rank gets, the residual of all rows)."""
    ranks = len(case["bounds"]) - 1
    total = made["make_partial"](case, 0).float()
    for rank in range(1, 1 if case.get("replicated") else ranks):
        total = total + made["make_partial"](case, rank).float()
    if not case.get("fresh"):
        total = total + made["make_residual"](case).float()
    residual = total.to(made["DTYPES"][case["dtype"]])
    hidden = kernels.rms_norm(residual, made["make_weight"](case), 1e-5)
    form = made["make_format"](case, kernels)
    if form is None:
        return [hidden], residual
    return list(unpack_rows(quantise_rows(kernels.native, hidden, form.packed), len(hidden))), residual


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but all NaN are one."""
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32}.get(found.element_size()) if found.is_floating_point() else found.dtype
    return bool(((found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())).all())


def check(cases: list[dict[str, Any]], answers: list[list[torch.Tensor]], made: dict[str, Any], kernels: Any) -> None:
    for case in cases:
        hidden, residual = truth(case, made, kernels)
        for rank, answer in enumerate(answers):
            got = [answer.pop(0) for _ in range(len(hidden) + 1)]
            assert all(same(*pair) for pair in zip(got, hidden, strict=False)), (case, rank)
            assert same(got[-1], residual[case["bounds"][rank] : case["bounds"][rank + 1]]), (case, rank)


def run(processes: list[Any], cases: list[dict[str, Any]], made: dict[str, Any], kernels: Any) -> None:
    for process in processes:
        process.send("join", cases=cases)
    check(cases, [process.receive() for process in processes], made, kernels)


@st.composite
def seams(draw: Any, ranks: int) -> dict[str, Any]:
    form = draw(st.none() | st.tuples(st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()))
    size = draw(st.sampled_from([256, 384, 1152]) if form else st.sampled_from([1, 7, 16, 40, 100, 128, 515]))
    tokens = draw(st.integers(0, 40))
    inner = sorted(draw(st.lists(st.integers(0, tokens), min_size=ranks - 1, max_size=ranks - 1)))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return {
        "seed": draw(st.integers(0, 2**20)),
        "size": size,
        "bounds": [0, *inner, tokens],
        "dtype": dtype,
        "part_dtype": draw(st.sampled_from([dtype, "float32"])),
        "fresh": draw(st.booleans()),
        "replicated": draw(st.booleans()),
        "format": form,
        "poison": draw(st.lists(st.integers(0, tokens - 1), max_size=3)) if tokens else [],
    }


@many
@given(data=st.data())
def test_seams_are_as_defined_on_all_ranks(data: Any, group: Any, rank_processes: Any, kernels: Any) -> None:
    """T that the ranks do not divide, T = 0, empty shards, rows of NaN: several seams one after the other."""
    cases = data.draw(st.lists(seams(len(group)), min_size=1, max_size=3))
    run(group, cases, rank_processes.script, kernels)


def test_late_ranks_change_nothing(group: Any, rank_processes: Any, kernels: Any) -> None:
    """Each rank in turn is late before it starts and before it finishes, while the others run ahead."""
    ranks, cases = len(group), []
    for number in range(3 * ranks):
        bounds = [0, *(11 * (rank + 1) + number for rank in range(ranks))]
        late = {str(number % ranks): [0.01, 0] if number % 2 else [0, 0.01]}
        cases.append({"seed": number, "size": 512, "bounds": bounds, "dtype": "bfloat16", "delays": late})
    run(group, cases, rank_processes.script, kernels)


def test_gather_gives_every_tensor_to_all(group: Any, rank_processes: Any) -> None:
    for seed, shape in enumerate([[5, 33], [0, 8], [3, 7000]]):
        for process in group:
            process.send("gather", seed=seed, shape=shape)
        expected = [rank_processes.script["random"](seed + rank, *shape) for rank in range(len(group))]
        for process in group:
            found = process.receive()
            assert len(found) == len(expected) and all(map(torch.equal, found, expected))
