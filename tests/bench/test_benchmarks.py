"""What the benchmark scripts are made of: figures, limits, random models, and contestants in processes of their own."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weft.kernels import REFERENCE, available

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 256}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ by its name."""
    for folder in (FOLDER, FOLDER / "peers"):
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([3.0, 1.0, 2.0], "2.00 [1.00..3.00]"),
        ([1234.5], "1234 [1234..1234]"),
        ([0.0123, 0.0456], "0.029 [0.012..0.046]"),
        ([0.0], "0 [0..0]"),
        ([], "-"),
    ],
)
def test_a_figure_is_the_median_with_its_spread(scripts: Any, values: list[float], text: str) -> None:
    assert str(scripts("common").Figure.of(values)) == text


def test_the_report_has_claims_rows_machine_and_commit(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "any.py"), str(tmp_path / "trace.csv"), "--part", "both"])
    common = scripts("common")
    arguments = argparse.Namespace(json=tmp_path / "out.json", quick=True)
    common.report(arguments, {"claim": 1.5}, [{"value": common.Figure.of([1.0]), "path": tmp_path, "nan": math.nan}])
    content = json.loads(arguments.json.read_text())
    assert content["command"] == ["any.py", "trace.csv", "--part", "both"], "names, not where this machine has them"
    assert content["claims"] == {"claim": 1.5}
    assert content["rows"][0]["value"]["median"] == 1.0 and content["rows"][0]["nan"] is None
    assert content["machine"]["cores"] >= 1 and content["commit"]


def test_the_machine_tells_what_its_cpu_can_do(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that call themselves alike may be generations apart."""
    common = scripts("common")
    here = common.machine()
    if available() != (REFERENCE,):
        assert here["level"] == available()[0]
    assert ("avx2" in here["cpu_flags"]) == (here["level"] != "portable")
    assert json.loads(json.dumps(here)) == here
    old = "fpu sse2 fma avx2"
    new = f"{old} avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16"
    for flags, level, told in (
        ("fpu sse2", "portable", []),
        (old, "avx2", ["avx2"]),
        (new.replace(" avx512_bf16", ""), "avx2", ["avx2", "avx512f", "avx512_vnni"]),
        (new, "avx512", ["avx2", "avx512f", "avx512_bf16", "avx512_vnni"]),
    ):
        said = ["model name\t: AMD EPYC", f"flags\t\t: {flags}"]
        monkeypatch.setattr(common, "_lines", lambda _path, said=said: said)
        made = common.machine()
        assert (made["cpu"], made["level"], made["cpu_flags"]) == ("AMD EPYC", level, told)


def test_own_work_is_no_other_load_and_a_childs_work_is_counted(scripts: Any) -> None:
    common = scripts("common")
    before, watch = common.cpu_seconds(os.getpid()), common.LoadWatch()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    own = common.cpu_seconds(os.getpid()) - before
    assert own > 0.05
    other, stolen = watch.other_load()
    assert 0 <= other <= 1 and 0 <= stolen <= 1


def test_the_limits_follow_from_reading_and_multiplying_the_weights(scripts: Any) -> None:
    serve_cpu, models = scripts("serve_cpu"), scripts("models")
    shape = models.Shape(vocabulary=1000, body=90_000_000, head=10_000_000)
    bandwidth, flops = 20e9, 1e12
    by_name = {case.name: case.limit(shape, bandwidth, flops) for case in serve_cpu.CASES}
    assert by_name["decode"] == pytest.approx(20e9 / 200e6)  # 100 M weights of two bytes
    assert by_name["prefill"] == pytest.approx(512 / (2 * (512 * 90e6 + 10e6) / 1e12))
    # 16 sequences: 3.2 ms of arithmetic a step, 10 ms of reading; 2048 tokens of prefill.
    prefill = 2 * (2048 * 90e6 + 16 * 10e6) / 1e12
    assert by_name["batch16"] == pytest.approx(2048 / (prefill + 127 * 0.01))


def test_only_steady_rounds_count_where_there_are_enough(scripts: Any) -> None:
    serve_cpu = scripts("serve_cpu")

    def one(after: float) -> Any:
        return serve_cpu.Round({"bandwidth": 10.0, "bf16": 10.0}, {"bandwidth": 10.0, "bf16": after})

    good, bad = one(9.0), one(7.0)
    assert (good.steady, bad.steady) == (True, False)
    assert serve_cpu._kept([good, bad, good], 2)[0] == [good, good]
    kept, note = serve_cpu._kept([good, bad], 2)
    assert kept == [good, bad] and note.startswith("NOT STEADY")
    assert serve_cpu._kept([good], 1) == ([good], None)


def test_a_random_model_is_one_that_others_can_read(scripts: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = scripts("models")
    folder = models.random_llama(tmp_path, {**models.LLAMA_1B, **TINY}, "tiny")
    weights = load_file(folder / "model.safetensors")
    drawn = weights["model.layers.0.mlp.up_proj.weight"].float()
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(weights["model.norm.weight"].float(), torch.ones(64))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {name for name, _ in model.named_parameters()} == set(weights)
    shape = models.Shape.of(folder)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert shape.body + shape.head == matrices
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert AutoTokenizer.from_pretrained(folder).vocab_size == 128
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.random_llama(tmp_path, {**models.LLAMA_1B, **TINY}, "tiny") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_bf16_is_rounded_as_torch_rounds(scripts: Any) -> None:
    values = np.random.default_rng(0).standard_normal(4096, np.float32)
    bits = np.frombuffer(scripts("models")._bits(values), np.int16)
    assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16), torch.from_numpy(values).to(torch.bfloat16))


WORKER = """
import os, sys
sys.path.insert(0, {folder!r})
from workerloop import serve
class Echo:
    name = "echo"
    def run(self, prompts, output):
        os.write(1, b"noise on standard output\\n")
        if output == 0: raise ValueError("no output")
        if output < 0: os._exit(3)
        return {{"tokens": [p[:output] for p in prompts]}}
    def score(self, tokens): return {{}}
serve(Echo)
"""


def test_a_contestant_answers_fails_and_dies_in_clear_words(scripts: Any, tmp_path: Path) -> None:
    contestant = scripts("contestant")
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(FOLDER / "peers")))
    with contestant.Contestant("echo", [sys.executable, str(script)], tmp_path / "log") as one:
        assert one.engine == "echo"
        assert one.ask("run", prompts=[[1, 2, 3]], output=2) == {"tokens": [[1, 2]]}
        with pytest.raises(contestant.ContestantError, match="ValueError: no output"):
            one.ask("run", prompts=[], output=0)
        assert one.ask("run", prompts=[[7]], output=1) == {"tokens": [[7]]}
        with pytest.raises(contestant.ContestantError, match="echo has ended"):
            one.ask("run", prompts=[], output=-1)
    with pytest.raises(contestant.ContestantError, match="No module named 'absent'"):
        contestant.Contestant("absent", [sys.executable, "-c", "import absent"], tmp_path / "log")
