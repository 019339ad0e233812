"""The command: which subcommand runs, what is printed, and with which exit code it ends."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import weft
from weft.cli import COMMANDS, main
from weft.cli.doctor import Finding, examine, table
from weft.config import EngineConfig, ServerConfig
from weft.errors import CheckpointError


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def install(name: str) -> ModuleType:
        made = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        package, _, leaf = name.rpartition(".")
        if package in sys.modules:
            monkeypatch.setattr(sys.modules[package], leaf, made, raising=False)
        return made

    return install


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for item in (*EngineConfig.__dataclass_fields__, *ServerConfig.__dataclass_fields__, "config"):
        monkeypatch.delenv(f"WEFT_{item.upper()}", raising=False)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    words = capsys.readouterr().out
    assert all(name in words for name in COMMANDS)
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"weft {weft.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_anything_heavy(command: str) -> None:
    code = (
        "import sys; from weft.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'fastapi', 'transformers', 'huggingface_hub', 'yaml'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"weft {command}" in done.stdout


def test_python_m_weft_is_weft() -> None:
    done = subprocess.run([sys.executable, "-m", "weft", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"weft {weft.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sevre"], "weft: unknown command sevre; did you mean serve?\n  weft --help lists the commands\n"),
        (
            ["serve", "--prot", "1"],
            "weft serve: unknown argument --prot; did you mean --port?\n  weft serve --help lists every flag\n",
        ),
        (
            ["serve", "--port=x", "--seed=y"],
            "weft serve: --seed is 'y'; it must be a whole number\n  --port is 'x'; it",
        ),
        (["bench", "sevre"], "weft bench: unknown benchmark sevre; did you mean serve?"),
        (["bench"], "weft bench: unknown benchmark (none given)"),
    ],
)
def test_wrong_usage_is_two_and_one_message(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(words)


def test_serve_hands_over_valid_settings(
    module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    server = module("weft.server.run")
    server.serve = lambda engine, front: given.append((engine, front)) or 7  # type: ignore[attr-defined]
    monkeypatch.setenv("WEFT_MAX_NUM_SEQS", "5")
    assert main(["serve", "m", "--port", "9", "--api-key=hush"]) == 7
    assert given == [(EngineConfig(model="m", max_num_seqs=5), ServerConfig(port=9, api_key=("hush",)))]
    expected = (
        "settings: model=m (--model), max_num_seqs=5 (WEFT_MAX_NUM_SEQS), port=9 (--port), api_key=*** (--api-key)"
    )
    assert capsys.readouterr().err == f"{expected}\n"
    monkeypatch.delenv("WEFT_MAX_NUM_SEQS")
    assert main(["serve"]) == 7
    assert capsys.readouterr().err == ""


def test_errors_and_interrupts(module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    server = module("weft.server.run")

    def raising(error: BaseException) -> Callable[..., int]:
        def serve(*configs: object) -> int:
            raise error

        return serve

    server.serve = raising(CheckpointError("no tokenizer.json"))  # type: ignore[attr-defined]
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "weft serve: no tokenizer.json\n"
    server.serve = raising(OSError(28, "No space left on device", "/a/b"))  # type: ignore[attr-defined]
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "weft serve: /a/b: No space left on device\n"
    server.serve = raising(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert main(["serve"]) == 130
    server.serve = raising(ZeroDivisionError())  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        main(["serve"])


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m weft doctor --json | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")


def test_bench_runs_a_tool_with_its_own_flags(module: Callable[[str], ModuleType]) -> None:
    tool = module("weft.bench.serve")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num-prompts", type=int)

    tool.add_arguments = add_arguments  # type: ignore[attr-defined]
    tool.run = lambda namespace: namespace.num_prompts  # type: ignore[attr-defined]
    assert main(["bench", "serve", "--num_prompts", "42"]) == 42
    assert main(["bench", "--help"]) == 0


def test_doctor_tells_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["weft"] == weft.__version__
    rows = {(row["topic"], row["item"]): row for row in found["findings"]}
    for topic, item in [
        ("machine", "cores"),
        ("machine", "SIMD"),
        ("memory", "RAM"),
        ("memory", "huge pages"),
        ("GPU", "NVIDIA driver"),
        ("kernels", "C++ extension"),
        ("kernels", "C++ compiler"),
        ("software", "torch"),
        ("software", "matplotlib"),
        ("model", "builtin"),
        ("server", "port 8000"),
    ]:
        assert rows[topic, item]["value"]
    assert {row["state"] for row in found["findings"]} <= {"ok", "note", "missing"}
    main(["doctor"])
    assert "C++ extension" in capsys.readouterr().out


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("weft.cli.doctor.NEEDED", ("torch", "no-such-package-at-all"))
    monkeypatch.setattr("weft.cli.doctor.OPTIONAL", {"no-such-package-either": "nothing"})
    assert main(["doctor"]) == 1
    words = capsys.readouterr().out
    assert words.endswith("missing: no-such-package-at-all\n")
    assert "pip install no-such-package-at-all" in words and "needed only for nothing" in words


def test_doctor_survives_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("weft.cli.doctor._read", lambda path: "")
    monkeypatch.setattr("shutil.which", lambda name: None)
    rows = {finding.item: finding for finding in examine()}
    assert rows["huge pages"].state == "note" and rows["C++ compiler"].value == "none"

    def refuse(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("weft.cli.doctor._read", refuse)
    assert any(finding.item == "cannot be read" for finding in examine())
    assert "! x  y\n      z" in table([Finding("t", "x", "y", "missing", "z")])
