"""The parts of benchmarks/phases.py that measure nothing: loads, claims, and the contest in virtual time."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ by its name."""
    for folder in (FOLDER, FOLDER / "peers"):
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A request a second, with lengths that tell the second."""
    path = tmp_path / "made_up_trace.csv"
    rows = "".join(f"{second},{second + 100},{second % 7}\n" for second in range(2000))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    return path


def test_parts_and_pieces_of_a_trace_are_apart_and_scaled(scripts: Any, trace: Path) -> None:
    loads = scripts("phases_loads")
    load = loads.recorded(trace, loads.Scale(0.5, 2.0, (700, 8), 2.0))
    assert load.name == "made_up" and not load.caching
    tune, report, second = (
        load.make(part, 1.0, 60.0, piece) for part, piece in (("tune", 0), ("report", 0), ("tune", 1))
    )
    assert len(tune) == len(report) == len(second) == 120, "two requests a second"
    assert [due for due, _ in tune[:3]] == [0.0, 0.5, 1.0]
    assert [size.input for _, size in tune[:3]] == [200, 200, 201]
    assert report[0][1].input == 650 and second[0][1].input == 260, "a piece begins where the last one ended"
    assert all(1 <= size.output <= 8 and size.input <= 700 for _, size in (*tune, *report))
    assert load.make("tune", 1.0, 60.0, 0) == tune
    slower = load.make("tune", 0.5, 60.0, 2, 1.0)
    assert slower[0] == (0.0, second[0][1]) and len(slower) == 60, "the pieces before had one rate in all"
    with pytest.raises(SystemExit, match="too short for 500 s at 2 times its rate"):
        load.make("report", 1.0, 500.0, 0)


def test_no_two_pieces_have_a_prompt_in_common(scripts: Any, trace: Path) -> None:
    """Or a server's prefix cache would know in one round, or in another try, what it has computed before."""
    loads = scripts("phases_loads")
    for load in (loads.recorded(trace, loads.Scale(0.5, 2.0, (700, 8))), loads.changing((loads.Mix(2.0, 60, 5),))):
        pieces = [load.shots(part, 1.0, 20.0, 512, piece) for part in ("tune", "report") for piece in (0, 1)]
        pieces += [load.shots("report", 1.0, 20.0, 512, 1, again=again) for again in (1, 2)]
        begins = [shot.prompt[:16] for piece in pieces for shot in piece]
        assert len(set(begins)) == len(begins) >= 80
        assert pieces[0] == load.shots("tune", 1.0, 20.0, 512, 0)
        shapes = [[(shot.due, shot.input_tokens, shot.output_tokens) for shot in piece] for piece in pieces]
        assert shapes[-3] == shapes[-2] == shapes[-1] != shapes[0], "a piece that is measured again is the same load"


def test_the_changing_load_is_heavy_in_prompts_then_in_answers_then_in_prompts(scripts: Any) -> None:
    loads, simulated = scripts("phases_loads"), scripts("phases_simulated")
    for device in simulated.DEVICES.values():
        rows = loads.changing(device.mixes).make("report", 1.0, 90.0, 0)
        thirds = [[size for due, size in rows if 30 * k <= due < 30 * k + 30] for k in range(3)]
        means = [sum(size.input / size.output for size in third) / len(third) for third in thirds]
        assert means[0] > 20 > 2 > means[1] and means[2] > 20
        assert [due for due, _ in rows] == sorted(due for due, _ in rows)


def rows_of(attained: dict[tuple[str, float, str, str], float]) -> list[dict[str, Any]]:
    names = ("trace", "rate", "policy", "kind")
    return [
        {**dict(zip(names, key, strict=True)), "device": "any", "attainment": value, "requests": 100}
        for key, value in attained.items()
    ]


def test_claims_are_the_least_ratio_to_the_best_in_hindsight(scripts: Any) -> None:
    tables = scripts("phases_tables")
    attained = {("conv", 1.0, "chunk 64", "chunk"): 0.5, ("conv", 1.0, "split 1:1", "split"): 0.8}
    attained |= {("conv", 1.0, "turns 1:1", "turns"): 0.9, ("conv", 1.0, "auto", "auto"): 0.72}
    attained |= {("conv", 2.0, "chunk 64", "chunk"): 0.0, ("conv", 2.0, "auto", "auto"): 0.01}
    attained |= {("changing", 1.0, "chunk 64", "chunk"): 0.4, ("changing", 1.0, "auto", "auto"): 0.6}
    attained |= {("changing", 1.0, "paper", "paper"): 0.3}
    found = tables.claims(rows_of(attained), "x_")
    assert found["x_auto_vs_best_fixed"] == pytest.approx(0.72 / 0.9)
    assert found["x_auto_vs_best_split"] == pytest.approx(0.72 / 0.8)
    assert found["x_auto_vs_best_chunk"] == pytest.approx(0.72 / 0.5)
    assert found["x_auto_vs_every_fixed_changing"] == pytest.approx(1.5)
    assert found["x_auto_vs_paper_changing"] == pytest.approx(2.0) and "x_auto_vs_paper" not in found
    before = {("conv", 1.0, "chunk 64", "chunk"): 0.9, ("conv", 1.0, "split 1:1", "split"): 0.1}
    chosen = tables.chosen_elsewhere(rows_of(before), rows_of(attained))
    assert chosen == {"auto_vs_chosen_before": pytest.approx(0.72 / 0.5)}
    assert tables.against_best(rows_of(attained))[0] == "any, conv at 1: auto 72.0%, turns 1:1 90.0%: 0.80"
    other = [one | {"device": "other", "attainment": 2 * one["attainment"]} for one in rows_of(attained)]
    assert tables.claims(rows_of(attained) + other, "x_") == found, "devices are not compared with each other"


def told_rows(policies: dict[str, str], attained: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows of one load at two rates, as a run in virtual time has them. policies: their kinds."""
    times = {f"{what}_p{p}": 0.001 * p for what in ("ttft", "tpot") for p in (50, 90, 99)}
    return [
        {"device": "any", "trace": "conv", "rate": rate, "policy": name, "kind": kind, "requests": 100, "failed": 3,
         "attainment": attained[name][at], "goodput": attained[name][at], "per_second": 2.0 * rate, "switches": 0,
         "part": "report", **times}
        for at, rate in enumerate((1.0, 2.0))
        for name, kind in policies.items()
    ]  # fmt: skip


SOME = {
    "chunk 64": "chunk", "chunk 128": "chunk", "split 1:3": "split", "split 3:1": "split", "turns 1:1": "turns",
    "overlap": "overlap", "pd 1:1": "pd", "paper": "paper", "auto": "auto",
}  # fmt: skip
PARTS = {
    "chunk 64": (0.9, 0.1), "chunk 128": (0.7, 0.5), "split 1:3": (0.2, 0.2), "split 3:1": (0.8, 0.3),
    "turns 1:1": (0.5, 0.1), "overlap": (0.6, 0.2), "pd 1:1": (0.4, 0.1), "paper": (0.5, 0.2), "auto": (0.95, 0.8),
}  # fmt: skip


def test_of_each_kind_the_one_is_shown_that_did_best_at_all_rates(scripts: Any) -> None:
    tables = scripts("phases_tables")
    assert tables.chosen(told_rows(SOME, PARTS)) == {
        "auto": "auto", "best chunk": "chunk 128", "best split": "split 3:1", "overlap or turns": "overlap",
        "paper": "paper", "pd": "pd 1:1",
    }  # fmt: skip
    rows = told_rows(SOME, PARTS)
    for one in rows:
        if one["policy"] == "chunk 128":
            one["requests"] = 50
    assert tables.chosen(rows)["best chunk"] == "chunk 64", "the other one was left out of some rounds"
    lucky = {"0": (9, 10)}
    rounds = {"auto": {"0": (10, 10), "1": (2, 10)}, "chunk 64": {"0": (5, 10), "1": (2, 10)}, "chunk 128": lucky}
    rows = [one | {"rounds": rounds[one["policy"]]} for one in rows if one["policy"] in rounds]
    assert tables.chosen(rows)["best chunk"] == "chunk 128", "in the rounds that it was in"


def test_tables_and_pictures_are_made_of_what_an_earlier_run_wrote(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = scripts("phases")
    rows = [*told_rows(SOME, PARTS), *(one | {"device": "two cores"} for one in told_rows(SOME, PARTS))]
    rows[0]["tpot_p50"] = None  # as JSON has what is not a number
    note = "SIMULATED any: a device, 4 shares, targets TTFT 1 s and TPOT 0.025 s; part report"
    told, document, picture = (tmp_path / name for name in ("told.json", "page.md", "picture.png"))
    told.write_text(json.dumps({"claims": {"simulated_x": 1.5}, "rows": rows, "notes": [note]}))
    document.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in PLACES))
    flags = ["--again", str(told), "--doc", str(document), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["phases.py", *flags])
    phases.main()
    assert phases.told(told).targets == {"any": (1.0, 0.025)}
    text = document.read_text()
    assert "| any | conv | 1 | 2.00 | 95% | 90% (chunk 64) | 50% | 40% | 0.95 | 0.90 | 0.50 | 0.40 | 3 of 100 |" in text
    assert "| any | conv | 2 | 4.00 | 80% | 50% (chunk 128) |" in text
    assert "| conv | 1 | **90%** | 70% | 20% | 80% | 50% | 60% |" in text
    assert "| 2 | chunk 128 | 50.0% | 0.50 | 0.05 | 0.09 | 0.10 | 50.0 | 90.0 | 99.0 |" in text
    assert "simulated_x = 1.500" in text
    assert picture.exists() and (tmp_path / "picture_two_cores.png").exists()


@pytest.mark.parametrize(
    "flags",
    [["--again", "a", "--json", "b"], ["--again", "a", "--cpu", "builtin"], ["--doc", "a", "--only", "auto"],
     ["--doc", "a", "--cpu", "builtin"]],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(
    scripts: Any, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["phases.py", *flags])
    with pytest.raises(SystemExit):
        scripts("phases")._arguments()
    assert "with it" in capsys.readouterr().err


PLACES = ("simulated", "fixed", "latencies", "claims")


def test_the_document_has_a_place_for_each_table() -> None:
    text = (FOLDER.parent / "docs" / "phases.md").read_text()
    assert all(f"<!-- {name} -->\n" in text for name in PLACES)


def test_every_static_split_takes_part(scripts: Any) -> None:
    simulated = scripts("phases_simulated")
    for device in simulated.DEVICES.values():
        splits = [one.name for one in simulated.contestants(device) if one.kind == "split"]
        assert splits == [f"split {units}:{device.shares - units}" for units in range(1, device.shares)]


def test_pieces_of_several_rates_have_no_request_in_common(scripts: Any, trace: Path) -> None:
    cpu, loads = scripts("phases_cpu"), scripts("phases_loads")
    load = loads.recorded(trace, loads.Scale(1.0, 1.0, (4000, 8)))
    contest = cpu.Contest.__new__(cpu.Contest)
    contest._factors, contest._vocabulary = (0.5, 1.0, 1.5), 512
    machine = cpu.Machine(0.1, 0.05, {"made_up": 2.0}, {"made_up": 0.9}, 20.0)
    pieces = [contest._shots(load, machine, "report", turn, one) for turn in (0, 1) for one in contest._factors]
    assert [len(shots) for shots in pieces] == pytest.approx([18, 36, 54] * 2, abs=1)
    lengths = [shot.input_tokens for shots in pieces for shot in shots]
    assert lengths == sorted(set(lengths)), "each begins where the one before ended"


def test_a_fixed_policy_that_leaves_no_room_is_named(scripts: Any) -> None:
    tables = scripts("phases_tables")
    attained = {("changing", 0.4, "chunk 64", "chunk"): 0.9, ("changing", 0.4, "split 8:4", "split"): 0.92}
    attained |= {("changing", 1.0, "chunk 64", "chunk"): 0.9, ("changing", 1.0, "pd 1:1", "pd"): 0.99}
    attained |= {("conv", 1.0, "chunk 64", "chunk"): 1.0}
    (note,) = tables.no_room(rows_of(attained))
    assert note == "any, changing at 0.4: split 8:4 has 92.0% in target, so that nothing could be 1.1 times better"
    attained |= {("changing", 0.4, "auto", "auto"): 0.95, ("changing", 1.0, "auto", "auto"): 0.99}
    assert tables.claims(rows_of(attained))["auto_vs_every_fixed_changing"] == pytest.approx(1.1), "where there is room"


def test_what_was_measured_outlives_a_run_that_is_killed(scripts: Any, tmp_path: Path) -> None:
    cpu, path = scripts("phases_cpu"), tmp_path / "out.pieces"
    pieces = cpu.Pieces(path, False)
    records = [[0.0, 0.1, 0.3, 0.5, 0.6, 20, 3, None], [0.2, 0.2, None, None, 0.9, 20, 0, "refused"]]
    machine = {"ttft": 0.1, "tpot": 0.05, "rates": {"conv": 2.0}, "parts": {"conv": 0.9}, "seconds": 3.0}
    pieces.add(model="m", what="machine", values=machine)
    for turn in (0, 1):
        key = {"model": "m", "what": "piece", "load": "conv", "factor": 1.0, "round": turn, "policy": "auto"}
        pieces.add(**key, kind="auto", seconds=2.0, records=records)
    path.write_text(path.read_text() + '{"model": "m", "what": "pie')  # it was killed here
    with pytest.raises(SystemExit, match="give --resume"):
        cpu.Pieces(path, False)
    again = cpu.Pieces(path, True)
    assert again.find(what="piece") == pieces.find(what="piece")
    (row,) = cpu._rows(again, "m", cpu._machine(again, "m"))
    assert row["requests"] == 4 and row["attainment"] == 0.5 and row["rounds"] == {"0": (1, 2), "1": (1, 2)}
    assert row["goodput"] == pytest.approx(2 / (2.9 - 0.1)), "one piece after the other"
    again.close()
    assert not path.exists()


def test_luck_is_not_taken_for_the_best_policy(scripts: Any) -> None:
    """Two fixed policies that are equally good, each lucky in a round: who chose by the other rounds was unlucky."""
    cpu = scripts("phases_cpu")
    machine = cpu.Machine(0.1, 0.05, {"conv": 2.0}, {"conv": 0.9})
    pieces = cpu.Pieces(None, False)

    def add(policy: str, kind: str, turn: int, met: int, factor: float = 1.0) -> None:
        good, bad = [0.0, 0.0, 0.1, 0.2, 0.2, 20, 3, None], [0.0, 0.0, 9.0, 9.1, 9.1, 20, 3, None]
        key = {"model": "m", "what": "piece", "load": "conv", "factor": factor, "round": turn, "policy": policy}
        pieces.add(**key, kind=kind, seconds=1.0, records=[good] * met + [bad] * (10 - met))

    for policy, kind, rounds in (
        ("auto", "auto", (8, 8)), ("one", "overlap", (10, 6)), ("two", "split", (6, 10)), ("once", "turns", (10,)),
        ("else", "paper", (10, 10)),
    ):  # fmt: skip
        for turn, met in enumerate(rounds):
            add(policy, kind, turn, met)
    assert cpu.beside_chosen(pieces, "m", machine) == {"conv": pytest.approx(16 / 12)}
    for policy, met in (("auto", 3), ("chunk 32", 2)):
        add(policy, policy.split()[0], 0, met, 1.5)
    found = {(one["rate"], one["policy"]): one["attainment"] for one in cpu._rows(pieces, "m", machine)}
    assert len(found) == 7 and found[0.9, "auto"] == 0.8 and found[1.35, "auto"] == pytest.approx(0.3)


def test_one_policy_has_to_do_for_all_rates_of_a_load(scripts: Any) -> None:
    """Each of two fixed ones is best at one of two rates, and neither is as good as auto at both."""
    tables = scripts("phases_tables")
    rows = [
        {"device": "any", "trace": "conv", "rate": rate, "policy": policy, "kind": kind, "attainment": met / count,
         "requests": count, "rounds": {"0": (met - 1, count - 1), "1": (1, 1)}}
        for policy, kind, found in (
            ("auto", "auto", ((9, 10), (15, 20))), ("chunk 64", "chunk", ((10, 10), (5, 20))),
            ("overlap", "overlap", ((4, 10), (16, 20))),
        )
        for rate, (met, count) in zip((0.7, 1.0), found, strict=True)
    ]  # fmt: skip
    assert tables.claims(rows)["auto_vs_best_fixed"] == pytest.approx(0.9), "at one of them"
    whole = tables.pooled(rows)
    assert [(one["policy"], one["requests"], one["attainment"]) for one in whole] == [
        ("auto", 30, 0.8), ("chunk 64", 30, 0.5), ("overlap", 30, 20 / 30),
    ]  # fmt: skip
    assert tables.claims(whole)["auto_vs_best_fixed"] == pytest.approx(24 / 20)
    assert tables.against_best(whole) == ["any, conv at all its rates: auto 80.0%, overlap 66.7% in 4 pieces: 1.20"]
    changing = [one | {"trace": "changing"} for one in rows]
    assert tables.no_room(tables.pooled(changing)) == []
    assert len(tables.no_room(changing)) == 1, "at the lower rate"


def test_who_is_far_behind_at_all_rates_together_is_left_out_of_later_rounds(scripts: Any) -> None:
    cpu = scripts("phases_cpu")
    contest = cpu.Contest.__new__(cpu.Contest)
    names = (("auto", "auto"), ("chunk 512", "chunk"), ("chunk 32", "chunk"), ("overlap", "overlap"))
    contest._entrants = [cpu.Contestant(name, kind, lambda _: None) for name, kind in names]
    contest._model, contest._pieces = "m", cpu.Pieces(None, False)
    machine = cpu.Machine(0.1, 0.05, {"conv": 2.0, "code": 2.0}, {"conv": 0.9, "code": 0.9})
    good, bad = [0.0, 0.0, 0.1, 0.2, 0.2, 20, 3, None], [0.0, 0.0, 9.0, 9.1, 9.1, 20, 3, None]
    for name, kind in names:
        for factor, met in ((0.7, 10), (1.0, {"auto": 8, "chunk 512": 0, "chunk 32": 2, "overlap": 6}[name])):
            key = {"model": "m", "what": "piece", "load": "conv", "factor": factor, "round": 0, "policy": name}
            contest._pieces.add(**key, kind=kind, seconds=1.0, records=[good] * met + [bad] * (10 - met))
    load, other = (scripts("phases_loads").Load(name, False, list) for name in ("conv", "code"))
    assert [one.name for one in contest._left(load, machine, 1)] == ["auto", "chunk 512", "overlap"]
    assert len(contest._left(load, machine, 0)) == len(contest._left(other, machine, 1)) == 4


def test_who_was_left_out_of_later_rounds_is_compared_in_the_earlier_ones(scripts: Any) -> None:
    tables = scripts("phases_tables")
    rows = [
        {"device": "any", "trace": "conv", "rate": 1.0, "policy": policy, "kind": kind, "rounds": rounds,
         "requests": sum(count for _, count in rounds.values()), "attainment": 0.0}
        for policy, kind, rounds in (
            ("auto", "auto", {"0": (8, 10), "1": (2, 10), "2": (5, 10)}),
            ("chunk 512", "chunk", {"0": (3, 10), "1": (3, 10), "2": (3, 10)}),
            ("overlap", "overlap", {"0": (4, 10)}),
            ("llama-server", "peer", {"0": (0, 10), "1": (0, 10)}),
        )
    ]  # fmt: skip
    assert tables.claims(rows)["auto_vs_best_chunk"] == pytest.approx(15 / 9)
    assert tables.claims(rows)["auto_vs_best_fixed"] == pytest.approx(15 / 9), "overlap had half as many as auto"
    beside = tables.ratios(rows, lambda one: one["kind"] == "peer")
    assert beside == {("any", "conv", 1.0): pytest.approx(10 / 0.5)}
    assert tables.against_best(rows) == ["any, conv at 1: auto 0.0%, chunk 512 0.0% in 3 pieces: 1.67"]
    other = [rows[1] | {"policy": "chunk 64"}, rows[3] | {"device": "else"}]
    found = [(one["device"], one["policy"]) for one in tables.in_order([*reversed(rows), *other])]
    assert found == [
        *(("any", name) for name in ("chunk 64", "chunk 512", "overlap", "auto", "llama-server")),
        ("else", "llama-server"),
    ]


def test_disaggregation_has_two_devices_and_twice_the_requests(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    phases, simulated = scripts("phases"), scripts("phases_simulated")
    flags = ["phases.py", "--loads", "changing", "--rates", "1", "--seconds", "1.5", "--only", "pd", "chunk 512"]
    monkeypatch.setattr(sys, "argv", flags)
    for device in simulated.DEVICES:
        found = phases.contest(phases._arguments(), "tune")
        rows = {one["kind"]: one for one in found if one["device"] == device}
        assert rows["pd"]["requests"] == pytest.approx(2 * rows["chunk"]["requests"], abs=2)
        assert rows["pd"]["goodput"] == pytest.approx(rows["pd"]["attainment"] * rows["pd"]["offered"] / 2)
        assert rows["chunk"]["goodput"] == pytest.approx(rows["chunk"]["attainment"] * rows["chunk"]["offered"])
    assert {one.devices for one in simulated.contestants(simulated.DEVICES["two cores"]) if one.kind != "pd"} == {1}


def test_every_policy_serves_every_request_the_same_way_each_time(scripts: Any) -> None:
    loads, simulated = scripts("phases_loads"), scripts("phases_simulated")
    for device in simulated.DEVICES.values():
        rows = loads.changing(device.mixes).make("tune", 1.0, 2.0, 0)
        rows = [(due, replace(size, output=min(size.output, 20))) for due, size in rows]
        for one in simulated.contestants(device):
            records, switches = simulated.serve(one, rows, device.targets, False)
            assert [record.error for record in records] == [None] * len(rows)
            records.sort(key=lambda record: record.due)
            assert [record.output_tokens for record in records] == [size.output for _, size in rows]
            assert switches == 0 or one.kind in ("auto", "paper")
            if one.kind == "auto":
                again, switches_again = simulated.serve(one, rows, device.targets, False)
                assert (sorted(again, key=lambda record: record.due), switches_again) == (records, switches)


def test_the_script_writes_claims_rows_and_a_picture(
    scripts: Any, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = scripts("phases")
    all_of = phases.simulated.contestants
    monkeypatch.setattr(phases.simulated, "contestants", lambda device: all_of(device)[2:5])
    for rates in (["1"], ["1", "2"]):  # bars, and lines
        out, picture = tmp_path / "out.json", tmp_path / "out.png"
        flags = ["--seconds", "2", "--rates", *rates, "--json", str(out), "--plot", str(picture)]
        monkeypatch.setattr(sys, "argv", ["phases.py", str(trace), *flags])
        phases.main()
        content = json.loads(out.read_text())
        assert {row["trace"] for row in content["rows"]} == {"made_up", "changing"}
        assert {row["device"] for row in content["rows"]} == set(phases.simulated.DEVICES)
        assert any("SIMULATED" in note for note in content["notes"]) and "made_up (report)" in capsys.readouterr().out
        assert picture.stat().st_size > 5000 and str(tmp_path) not in out.read_text()
        picture.unlink()
