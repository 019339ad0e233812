"""The benchmark of a shaped link: its claims follow from its rows, and its ranks compute what they say."""

from __future__ import annotations

import argparse
import importlib
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weft.devices.group import measured_sizes
from weft.kernels import LEVELS, available
from weft.weave.choice import COLLECTIVES, Costs, Curve, Mode

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def weave_link(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("weave_link")


def answer(chosen: str = "woven", **seconds: list[float]) -> dict[str, Any]:
    names = {
        "one_shot": "one-shot",
        "two": "woven, two strands",
        "fused_quantised": "fused, quantised gather",
        "quantised": "woven, quantised gather",
        "nothing": "no communication",
        "split": "split, no communication",
        "fused_gloo": "fused over gloo",
        "woven_gloo": "woven over gloo",
    }
    sent = {"woven": 4000, "woven, quantised gather": 3000}
    took = {names.get(name, name): rounds for name, rounds in seconds.items()}
    return {"seconds": took, "of_rank_0": took, "cpu": took, "sent": sent, "chosen": chosen}


def test_claims_follow_from_rows(weave_link: Any) -> None:
    def row(mbit: int, precision: str, tokens: int, found: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = weave_link.row(weave_link.Cell(mbit, 0.0, precision, tokens), found)
        return made

    quarter = row(
        1000,
        "bf16",
        1024,
        answer(plain=[4.0, 8.0], fused=[3.9, 8.0], woven=[3.2, 6.0], nothing=[3.0, 6.0], split=[3, 6]),
    )
    assert quarter["communication"] == pytest.approx(0.25) and "bytes_saved" not in quarter
    assert quarter["gain"].median == pytest.approx((4 / 3.2 + 8 / 6) / 2)
    half = row(
        500,
        "w4a8",
        1024,
        answer("plain", plain=[4.0], fused=[4.0], woven=[2.5], quantised=[2.0], nothing=[2.0], split=[2.0]),
    )
    assert half["bytes_saved"] == 0.25 and half["chosen_vs_plain"] == 1.0
    assert (quarter["best"], quarter["regret"]) == ("woven", 0.0)
    assert (half["best"], half["regret"]) == ("woven, quantised gather", 1.0)
    whole = weave_link.Cell(None, 0.0, "w4a8", 256)
    counted = weave_link.row(whole, answer(plain=[1.0], fused=[1.0], woven=[9.0], quantised=[1.0], nothing=[1.0]))
    sent = {"w4a4": 2000, "w4ax": 2500}
    for precision, of_quantised in sent.items():
        cell = weave_link.Cell(None, 0.0, precision, 256)
        given = answer(plain=[1.0], fused=[1.0], woven=[9.0], quantised=[1.0], nothing=[1.0])
        given["sent"] = given["sent"] | {"woven, quantised gather": of_quantised}
        found = weave_link.claims([weave_link.row(cell, given)])
        assert found == {f"gather_bytes_saved_{'int4' if precision == 'w4a4' else 'mixed'}": 1 - of_quantised / 4000}
    found = weave_link.claims([quarter, half, counted])
    assert found["woven_gain_at_20_to_30_percent_comm"] == quarter["gain"].median
    assert "woven_gain_at_25_percent_comm" not in found, "it is of links that were sought for it"
    found = weave_link.claims([half, quarter | {"quarter": True}, counted])
    assert found["woven_gain_at_25_percent_comm"] == quarter["gain"].median
    assert found["woven_gain_500mbit"] == pytest.approx(1.6)
    assert found["woven_tax_percent"] == pytest.approx(100 * (3.2 / 3 + 1) / 2 - 100)  # the other link is saturated
    assert found["gather_bytes_saved_int8"] == 0.25 and "gather_bytes_saved_int4" not in found
    assert found["worst_case_vs_plain"] == 1.0
    assert found["choice_regret_percent"] == 100.0, "a choice that is no worse than plain may still be a bad one"
    assert weave_link.claims([]) == {}


def test_what_carries_the_messages_is_compared_where_both_were_measured(weave_link: Any) -> None:
    times = {"plain": [4.0], "fused": [4.0], "woven": [3.0], "nothing": [2.0]}
    cell = weave_link.Cell(1000, 0.0, "bf16", 512)
    alone = weave_link.row(cell, answer(**times))
    both = weave_link.row(cell, answer(**times, fused_gloo=[5.0], woven_gloo=[4.5]))
    found = weave_link.claims([alone, both])
    assert found["gloo_vs_links_fused"] == 1.25 and found["gloo_vs_links_woven"] == 1.5
    assert found["gloo_vs_links_cpu"] == 1.5
    assert not [name for name in weave_link.claims([alone]) if "gloo" in name]
    assert both["best"] == alone["best"] == "woven", "nobody is served over gloo where the extension is"


def test_regret_is_against_what_could_have_been_chosen(weave_link: Any) -> None:
    """Neither what ends in wrong results nor rows that travel otherwise than they are served."""
    bf16: dict[str, list[float]] = {"plain": [4.0, 4.0], "one_shot": [3.5, 3.5], "fused": [4.0, 4.0]}
    bf16 |= {"two": [3.0, 3.2], "woven": [3.3, 3.3], "nothing": [1.0, 1.0]}
    made = weave_link.row(weave_link.Cell(1000, 0.0, "bf16", 512), answer("one-shot", **bf16))
    assert made["best"] == "woven, two strands"
    assert made["regret"] == pytest.approx((3.5 / 3.0 + 3.5 / 3.2) / 2 - 1)
    w4a8 = bf16 | {"fused_quantised": [3.4, 3.4], "quantised": [3.6, 3.6]}
    made = weave_link.row(weave_link.Cell(1000, 0.0, "w4a8", 512), answer("one-shot", **w4a8))
    assert made["best"] == "fused, quantised gather" and made["regret"] == pytest.approx(3.5 / 3.4 - 1)
    for quantised in (False, True):
        assert {mode for mode, _ in weave_link.served(quantised=quantised)} == {mode.value for mode in Mode}


def test_what_is_chosen_follows_from_costs_as_they_are_measured_at_start_up(
    weave_link: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for a link and a model, and not at the very sizes that are asked for."""
    weave_ranks = importlib.import_module("weave_ranks")
    measured: list[list[int]] = []
    stage, seam = Curve(((1, 0.0), (1000, 1.0))), Curve(((1, 0.0), (1000, 0.5)))

    def measure(_decoder: Any, _kv: Any, _block: int, collectives: Any, sizes: list[int], *, formats: Any) -> Costs:
        assert list(collectives) == list(COLLECTIVES) and (formats("packed") == "its format") is (len(measured) > 1)
        measured.append(sizes)
        return Costs(8, stage, stage, {Mode.PLAIN: seam, Mode.FUSED: seam}, 0.0)

    monkeypatch.setattr(weave_ranks, "measure", measure)
    monkeypatch.setattr(weave_ranks, "input_format", lambda _kernels, _packed: "its format")
    rank = weave_ranks.Rank.__new__(weave_ranks.Rank)
    rank.plain = rank.one_shot = rank.fused = rank.woven = rank.kernels = None
    rank.orders, rank.costs = {"tokens": 2048}, {}
    chosen = []
    for precision in ("bf16", "w4a8"):
        model = weave_ranks.Model(SimpleNamespace(), [], precision != "bf16")
        for mbit in (1000, 500):
            for tokens in (6, 256):
                job = {"mbit": mbit, "latency": 0.0, "precision": precision, "tokens": tokens}
                chosen.append(rank._chosen(model, job))
    assert measured == [measured_sizes(2048)] * 4
    assert chosen == ["plain", "woven, two strands"] * 2 + ["plain", "woven, two strands, quantised gather"] * 2


@pytest.mark.skipif(not set(LEVELS) & set(available()), reason="the C++ extension is not built")
def test_what_a_quantised_gather_saves_follows_from_the_model(weave_link: Any) -> None:
    """As many rows are scattered, in bfloat16, as are gathered."""
    from weft.kernels.cpu import CpuKernels
    from weft.kernels.wire import input_format
    from weft.models.shard import Part

    weave_ranks = importlib.import_module("weave_ranks")
    raw = weave_link.SHAPE | {"num_hidden_layers": 1, "intermediate_size": 512, "vocab_size": 256}
    row, saved = 2048 * 2, {}
    kernels = CpuKernels(available()[0], (0,))
    for precision in (cell.precision for cell in weave_link.BYTES):
        model = weave_ranks.make_model(raw, Part(0, 2), kernels, precision, 16)
        (layer,) = model.decoder._weights.layers
        bytes_of = {input_format(kernels, packed).row_bytes for packed in (layer.qkv, layer.gate_up)}
        assert model.quantised and len(bytes_of) == 1
        saved[precision] = (row - bytes_of.pop()) / (2 * row)
    kernels.close()
    assert saved == {"w4a8": 1984 / 8192, "w4a4": 3008 / 8192, "w4ax": 2944 / 8192}


def test_a_step_takes_as_long_as_the_slower_rank(weave_link: Any) -> None:
    times = {"plain": [9.0, 9.0], "fused": [9.0, 9.0]}
    answers = [
        answer(**times, woven=[3.0, 6.0], nothing=[2.0, 5.0]),
        answer(**times, woven=[3.0, 6.0], nothing=[3.0, 4.0]),
    ]
    made = weave_link.row(weave_link.Cell(1000, 0.0, "bf16", 1024), weave_link.merged(answers))
    assert made["tax"] == pytest.approx((3 / 3 + 6 / 5) / 2 - 1)
    assert made["tax_of_rank_0"] == pytest.approx((3 / 2 + 6 / 5) / 2 - 1)


def test_cells_can_be_named(weave_link: Any) -> None:
    assert weave_link._cell("500:bf16:1024") == weave_link.Cell(500, 0.0, "bf16", 1024)
    assert weave_link._cell("1000:w4a8:512:0.1") in weave_link.grid()
    assert weave_link._cell("1000:mixture:512") in weave_link.OF_EXPERTS
    for wrong in ("500:bf16", "500:fp8:1024", "x:bf16:1024", "0:bf16:1", "500:bf16:1024:-1", "1:bf16:1:1:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="would work"):
            weave_link._cell(wrong)


def test_a_link_is_found_at_which_communication_is_a_quarter(weave_link: Any) -> None:
    """Plain takes 8 s of computing and a second for each thousandth of a microsecond of a bit."""
    rows = []
    for mbit in (2000, 1000, 500, 250):
        took = {"plain": [8.0 + 1000 / mbit], "fused": [9.0], "woven": [8.0], "nothing": [8.0]}
        rows.append(weave_link.row(weave_link.Cell(mbit, 0.0, "bf16", 1024), answer(**took)))
        rows.append(weave_link.row(weave_link.Cell(mbit, 1e-3, "w4a8", 512), answer(**took)))
    assert weave_link.quarters(rows) == [weave_link.Cell(375, 0.0, "bf16", 1024)]  # 1000 / 375 is a third of 8
    assert weave_link.quarters(rows[:4]) == [], "none between two links"


def test_the_grid_has_a_cell_for_every_claim(weave_link: Any) -> None:
    for size in ({}, {"quick": True}, {"short": True}):
        cells = list(weave_link.grid(**size))
        assert {cell.precision for cell in cells} == {"bf16", "w4a8"}
        assert len(set(cells)) == len(cells)
        assert any(cell.mbit == 500 and cell.tokens >= 1024 for cell in cells)


def test_without_root_it_says_why(
    weave_link: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("sys.argv", ["weave_link.py"])
    weave_link.main()
    assert capsys.readouterr().out == "skipped: network namespaces need root\n"


class Loopback:
    """Both ranks in this namespace."""

    interfaces = ("lo", "lo")
    addresses = ("127.0.0.1", "127.0.0.1")

    def within(self, _rank: int) -> tuple[str, ...]:
        return ()


@pytest.mark.skipif(not set(LEVELS) & set(available()), reason="the C++ extension is not built")
def test_its_ranks_carry_out_jobs(weave_link: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        monkeypatch.setattr(weave_link, "PORT", chosen.getsockname()[1])
    monkeypatch.setattr(weave_link, "SHAPE", weave_link.SHAPE | TINY | {"vocab_size": 256})
    ranks = weave_link.Ranks(Loopback(), 2, ["w4a8"], 96, gloo=True)
    try:
        cell = weave_link.Cell(None, 1e-3, "w4a8", 96)
        found = weave_link.row(cell, ranks.job(cell, 2))
        without = ranks.job(weave_link.Cell(None, 0.0, "w4a8", 96), 1)  # its seams are in a thread in C++
    finally:
        ranks.close()
    assert found["woven"].count == 2 and found["plain"].median > 2 * 4 * 1.0  # milliseconds: two for each seam
    assert found["no communication"].median < found["plain"].median
    assert 0.1 < found["bytes_saved"] < 0.4
    rejoined = {weave_link.REJOINED, weave_link.TWO_REJOINED}
    assert without["seconds"].keys() == set(weave_link.ALL_MODES) - rejoined
    assert found["chosen"] in weave_link.served(quantised=True).values() and found["regret"] >= 0


@pytest.mark.skipif(not set(LEVELS) & set(available()), reason="the C++ extension is not built")
def test_its_ranks_rejoin_at_experts(weave_link: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compare the bits of all modes themselves."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        monkeypatch.setattr(weave_link, "PORT", chosen.getsockname()[1])
    few = {"num_experts": 6, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128, "vocab_size": 256}
    monkeypatch.setattr(weave_link, "MIXTURE", weave_link.MIXTURE | TINY | few)
    ranks = weave_link.Ranks(Loopback(), 2, ["mixture"], 96)
    try:
        cell = weave_link.Cell(1000, 0.0, "mixture", 96)
        found = weave_link.row(cell, ranks.job(cell, 2))
    finally:
        ranks.close()
    claims = weave_link.claims([found])
    assert claims["rejoined_vs_plain"] == found["rejoined_vs_plain"].median > 0
    assert claims["rejoined_vs_woven"] == found["rejoined_vs_woven"].median > 0
    assert not [name for name in claims if name.startswith("woven")], "these are of the model without experts"
    assert found["chosen"] in weave_link.served(quantised=False).values()
