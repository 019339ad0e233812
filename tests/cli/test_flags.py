"""Flags, variables and YAML give the same settings, and every mistake is named."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weft.cli.flags import Parser, add_settings, load, settings_of
from weft.cli.others import INSTEAD, WITHOUT
from weft.config import EngineConfig, ServerConfig, Shares, disaggregated, parse_cores, parse_partition
from weft.errors import ConfigError

BOTH = (EngineConfig, ServerConfig)
SETTINGS = {item.name: item for config in BOTH for item in settings_of(config)}
# Not "--": argparse drops it even from --flag=--.
WORDS = (
    st.text("abcXYZ019 ./:-_é日#'\"[]{}%@!&*", max_size=8).map(str.strip).filter(lambda word: word not in ("", "--"))
)


def values_of(name: str) -> st.SearchStrategy[Any]:
    item = SETTINGS[name]
    if "choices" in item.metadata:
        return st.sampled_from(item.metadata["choices"])
    if name == "partition":
        return st.just("off") | st.tuples(st.integers(1, 99), st.integers(1, 99)).map(
            lambda pair: f"{pair[0]}:{pair[1]}"
        )
    if name in ("rank_timeout", "rank_load_timeout"):
        return st.floats(0.1, 1000)
    if name == "gpu_memory_utilization":
        return st.floats(0.01, 1)
    if name == "allowed_origins":
        return st.lists(st.sampled_from(["*", "https://a.example", "http://[::1]:80"]), min_size=1).map(tuple)
    if name == "cores":
        return st.sampled_from(["0", "0-3", "1,3-5", "7-7"])
    one: st.SearchStrategy[Any] = {
        bool: st.booleans(),
        int: st.integers(1024, 65535),
        float: st.floats(0, 1000),
        str: WORDS,
        Path: WORDS.map(Path),
    }[item.kind]
    return st.lists(one, min_size=1, max_size=3).map(tuple) if item.many else one


# Those that go with some values of --partition only, or with several ranks only, have tests of their own.
DEPENDENT = ("slo_ttft", "slo_tpot", "partition_record", "tensor_parallel_size", "weave", "collective")
DEPENDENT += ("nnodes", "node_rank", "dist_init_addr", "w4a16", "batch_invariant")
DEPENDENT += ("distributed_executor_backend", "ray_address", "ray_cpus")
GIVEN = st.fixed_dictionaries({}, optional={name: values_of(name) for name in SETTINGS if name not in DEPENDENT})


def read(arguments: list[str], environment: dict[str, str]) -> tuple[Any, ...]:
    parser = Parser("weft serve", "")
    add_settings(parser, BOTH)
    return load(BOTH, parser.read(arguments), environment).configs


def as_flags(given: dict[str, Any]) -> list[str]:
    found = []
    for name, value in given.items():
        flag = SETTINGS[name].flag
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-"))
        else:
            found += [f"{flag}={entry}" for entry in (value if isinstance(value, tuple) else (value,))]
    return found


def as_variables(given: dict[str, Any]) -> dict[str, str]:
    return {
        f"WEFT_{name.upper()}": ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in given.items()
    }


def as_yaml(given: dict[str, Any], folder: Path) -> Path:
    plain = {
        name: list(map(str, value)) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in given.items()
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(plain, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml")


@given(given=GIVEN)
@settings(max_examples=100, deadline=None)
def test_flags_variables_and_yaml_mean_the_same(given: dict[str, Any], folder: Path) -> None:
    expected = tuple(
        config(**{spec.name: given[spec.name] for spec in fields(config) if spec.name in given}) for config in BOTH
    )
    assume(not any(config.problems() for config in expected))
    assert read(as_flags(given), {}) == expected
    assert read([], as_variables(given)) == expected
    assert read([f"--config={as_yaml(given, folder)}"], {}) == expected
    assert read([], {"WEFT_CONFIG": str(as_yaml(given, folder))}) == expected


@given(flags=GIVEN, variables=GIVEN, lines=GIVEN)
@settings(max_examples=60, deadline=None)
def test_flags_win_over_variables_over_yaml(
    flags: dict[str, Any], variables: dict[str, Any], lines: dict[str, Any], folder: Path
) -> None:
    winning = {**lines, **variables, **flags}
    assume(winning.get("max_num_batched_tokens", 512) >= winning.get("max_num_seqs", 64))
    path = as_yaml(lines, folder)
    assert read([*as_flags(flags), f"--config={path}"], as_variables(variables)) == read(as_flags(winning), {})


def test_yaml_values_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("partition: 1:1\nenable-prefix-caching: no\ncores: 0\nmodel: 123\nseed: 0010\nrevision: ~\n")
    engine, _ = read(["--config", str(path)], {})
    assert (engine.partition, engine.enable_prefix_caching, engine.cores) == ("1:1", False, "0")
    assert (engine.model, engine.seed, engine.revision) == ("123", 10, None)
    path.write_text("partition: off\nserved_model_name: one\n")
    engine, server = read(["--config", str(path)], {})
    assert (engine.partition, server.served_model_name) == ("off", ("one",))
    path.write_text("# nothing\n")
    assert read(["--config", str(path)], {}) == read([], {})


def test_spellings() -> None:
    for arguments in (["m", "--max_num_seqs=4"], ["--max-num-seqs", "4", "m"], ["--model", "m", "--max_num_seqs", "4"]):
        engine, _ = read(arguments, {})
        assert (engine.model, engine.max_num_seqs) == ("m", 4)
    _, server = read(["--served_model_name", "a_b", "--served-model-name=c_d"], {})
    assert server.served_model_name == ("a_b", "c_d")
    assert read([], {"WEFT_PORT": "", "WEFT_SERVICE_HOST": "10.0.0.1"}) == read([], {})


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("2kb", 2000), ("1TiB", 2**40)]
)
def test_sizes(text: str, number: int) -> None:
    engine, _ = read([f"--kv-cache-memory-bytes={text}"], {})
    assert engine.kv_cache_memory_bytes == number


def problems(arguments: list[str], environment: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(arguments, environment or {})
    return caught.value.message.splitlines()


def test_every_problem_is_named_at_once_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("max_num_seq: 4\nseed: x\nseed: 1\nhost: {a: 1}\ndtype: [auto, bfloat16]\nblock_size: 7\n")
    found = problems(
        ["--port=70000", "--max-model-len", "0", "--partition=1:0", "--config", str(path)],
        {"WEFT_NUM_BLOCKS": "many", "WEFT_ENABLE_METRICS": "perhaps", "WEFT_KERNELS": "sse", "WEFT_MAX_NUM_SEQ": "3"},
    )
    assert found == [
        "unknown variable WEFT_MAX_NUM_SEQ; did you mean WEFT_MAX_NUM_SEQS?",
        f"{path}, line 1: unknown setting max_num_seq; did you mean max_num_seqs?",
        f"{path}, line 3: seed is there twice",
        f"{path}, line 4: host must be a plain value",
        "WEFT_NUM_BLOCKS is 'many'; it must be a whole number",
        "WEFT_ENABLE_METRICS is 'perhaps'; it must be true or false",
        f"{path}, line 2 is 'x'; it must be a whole number",
        f"{path}, line 5 has 2 values; dtype takes one",
        "--max-model-len is 0; a prompt and its answer need at least 2",
        f"--block-size is 7; it must be one of 16, 32, 64, 128 (set by {path}, line 6)",
        "--partition is '1:0'; it must be off, auto, paper, two positive numbers P:D such as 1:1, turns:P:D, pd:P:D, "
        "or two percentages such as 80%:100%",
        "--kernels is 'sse'; it must be one of auto, avx512, avx2, portable, reference (set by WEFT_KERNELS)",
        "--port is 70000; it must be between 0 and 65535",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prot=1"], "unknown argument --prot=1; did you mean --port?"),
        (["m", "n"], "unknown argument n"),
        (["--quantization=awq"], "unknown argument --quantization=awq: the checkpoint says it"),
        (["--ctx_size", "5"], "unknown argument --ctx-size: here it is --max-model-len"),
        (["--served-model-name="], "--served-model-name is ''; it must have 1 to 256 characters"),
        (["--write-timeout=-1"], "--write-timeout is -1.0; it must be between 0 and 86400 seconds"),
        (["--port"], "argument --port: expected one argument"),
        (["m", "--model", "n"], "MODEL is 'm' and --model is 'n'; give one of them"),
        (["--shutdown-timeout=nan"], "--shutdown-timeout is nan; it must be between 0 and 86400 seconds"),
        (["--max-body-bytes=1 parsec"], "--max-body-bytes is '1 parsec'; it must be a number of bytes"),
        (["--cores=3-1"], "--cores is '3-1'; '3-1' is not a core number"),
        (["--config=/none/at/all"], "--config /none/at/all cannot be read"),
        (["--max-num-batched-tokens=8"], "--max-num-batched-tokens is 8, less than --max-num-seqs 64"),
    ],
)
def test_mistakes(arguments: list[str], words: str) -> None:
    assert problems(arguments)[0].startswith(words)


@pytest.mark.parametrize("content", ["- a\n", "a: b: c\n", "a: 1\n---\nb: 2\n", "\x00"])
def test_files_that_hold_no_settings(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    assert problems(["--config", str(path)])[0].startswith(f"--config {path}")


def test_the_flags_of_other_engines_are_none_of_ours_and_what_they_are_called_here_is() -> None:
    ours = {item.flag for item in SETTINGS.values()}
    for flag in WITHOUT | INSTEAD:
        assert flag not in ours
    for words in [*INSTEAD.values(), *(w for text in WITHOUT.values() for w in re.findall(r"--[a-z-]+", text))]:
        assert words.split()[0].replace("--no-", "--") in ours


def test_a_service_of_kubernetes_that_is_called_weft_is_told_of() -> None:
    links = {"WEFT_PORT": "tcp://10.0.0.1:80", "WEFT_SERVICE_HOST": "10.0.0.1", "WEFT_PORT_80_TCP_PORT": "80"}
    (problem,) = problems([], links)
    assert "whole number; Kubernetes sets it" in problem
    assert read(["--port", "9"], links)[1].port == 9


@pytest.mark.parametrize("value", ["", "  "])
def test_a_secret_that_is_empty_does_not_open_the_door(value: str) -> None:
    assert problems([], {"WEFT_API_KEY": value}) == ["WEFT_API_KEY is empty; give it a value, or do not set it"]


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://a.example/b", ""])
def test_what_no_browser_calls_its_origin_is_refused(origin: str) -> None:
    (problem,) = problems([f"--allowed-origins={origin}"], {})
    assert f"--allowed-origins is {origin!r}; an origin is like https://app.example:8443, or *" in problem
    assert read(["--allowed-origins", "https://page.example", "http://localhost:3000"], {}) and read(
        ["--allowed-origins=*"], {}
    )


def test_secrets_are_not_shown() -> None:
    parser = Parser("weft serve", "")
    add_settings(parser, BOTH)
    loaded = load(BOTH, parser.read(["--api-key=hush", "--port=9"]), {"WEFT_SEED": "4"})
    assert loaded.summary() == "seed=4 (WEFT_SEED), port=9 (--port), api_key=*** (--api-key)"


def test_help_names_every_setting_with_its_default() -> None:
    parser = Parser("weft serve", "")
    add_settings(parser, BOTH)
    words = " ".join(parser.format_help().split())
    for item in SETTINGS.values():
        assert item.flag in words
        assert " ".join(item.help.split()).replace("%%", "%") in words.replace("- ", "-")
    assert "port to listen on (default: 8000)" in words


def test_every_setting_has_a_type_that_flags_know() -> None:
    assert {item.kind for item in SETTINGS.values()} <= {bool, int, float, str, Path}
    for config in BOTH:
        hints = typing.get_type_hints(config)
        assert [item.name for item in settings_of(config)] == list(hints)
    assert not {spec.name for spec in fields(EngineConfig)} & {spec.name for spec in fields(ServerConfig)}


def test_partition_and_cores() -> None:
    assert parse_partition("off") is None
    assert parse_partition("1:3") == Shares("fixed", 1, 3, 4)
    assert parse_partition("80%:100%") == Shares("fixed", 80, 100, 100)
    assert parse_partition("auto") == Shares("auto", 100, 100, 100)
    assert parse_partition("turns:3:1") == Shares("turns", 3, 1, 4) and parse_partition("pd:1:2") == Shares(
        "pd", 1, 2, 3
    )
    assert disaggregated("pd:1:2") and not any(map(disaggregated, ("off", "1:1", "auto", "turns:1:1")))
    assert parse_cores("8,0-2,1") == (0, 1, 2, 8)
    for text in (
        "",
        "1",
        "1:",
        "0:1",
        "1:1:1",
        "-1:2",
        "Auto",
        "1%:1",
        "%:%",
        "80%100%",
        "turns",
        "turns:",
        "pd:1",
        "pd:0:1",
        "turns:50%:50%",
        "off:1:1",
    ):
        with pytest.raises(ValueError, match="it must be off, auto"):
            parse_partition(text)
    with pytest.raises(ValueError, match="more than 100%"):
        parse_partition("101%:20%")
    for text in ("", "a", "1-", "0-99999999999", "1,,2"):
        with pytest.raises(ValueError, match="not a core number"):
            parse_cores(text)


@given(
    text=st.sampled_from(["1:1", "3:1", "1:99", "30%:50%", "80%:100%", "100%:100%", "1%:1%", "auto"]),
    units=st.integers(1, 200),
)
def test_shares_of_a_device_are_at_least_one_unit_and_overlap_only_if_asked(text: str, units: int) -> None:
    shares = parse_partition(text)
    assert shares is not None
    overlap = shares.prefill + shares.decode > shares.whole
    if units == 1 and not overlap:
        with pytest.raises(ValueError, match="need two"):
            shares.of(units)
        return
    assert Shares("turns", 1, 3, 4).of(units) == (units, units), "parts of the time"
    prefill, decode = shares.of(units)
    assert 1 <= prefill <= units and 1 <= decode <= units
    assert overlap or prefill + decode <= units
    if shares.prefill + shares.decode == shares.whole:
        assert prefill + decode == units


@pytest.mark.parametrize(
    "given",
    [
        {"slo_ttft": 0.5},
        {"slo_tpot": 0.1, "partition": "1:1"},
        {"partition_record": "run.jsonl", "partition": "6:8"},
    ],
)
def test_targets_are_refused_where_nothing_uses_them(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no use for it; auto and paper do"):
        EngineConfig(**given).validate()
    with pytest.raises(ConfigError, match=r"--slo-ttft is 0\.0; it must be more than 0"):
        EngineConfig(partition="auto", slo_ttft=0.0).validate()
    EngineConfig(partition="auto", slo_ttft=0.5, slo_tpot=0.1).validate()


RAY = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size is 0; it must be from 1 to 64"),
        (
            {"tensor_parallel_size": 2, "device": "simulated"},
            "--device simulated has one rank; cpu and cuda have several",
        ),
        (
            {"tensor_parallel_size": 2, "device": "cuda", "partition": "1:1"},
            "--partition is 1:1, and ranks on GPUs have one lane; --partition off",
        ),
        (
            {"tensor_parallel_size": 2, "device": "cuda", "collective": "gloo"},
            "--collective is gloo, and --device is cuda, which has nccl and symmetric",
        ),
        ({"tensor_parallel_size": 2, "collective": "nccl"}, "--device is auto, which has shm and gloo"),
        (RAY | {"device": "cuda", "collective": "symmetric"}, "shows each rank one GPU only; --collective nccl works"),
        (
            {"tensor_parallel_size": 2, "device": "cuda", "weave": "plain", "collective": "symmetric"},
            "--weave is plain, which --collective symmetric does not have; --collective nccl does",
        ),
        ({"weave": "woven"}, "--weave is woven, and one rank has no use for it; --tensor-parallel-size 2 has"),
        ({"collective": "gloo"}, "--collective is gloo, and one rank has no use for it"),
        ({"tensor_parallel_size": 2, "weave": "plain", "collective": "shm"}, "--collective gloo does"),
        ({"nnodes": 2, "dist_init_addr": "a:1"}, "--nnodes is 2; it must divide --tensor-parallel-size, which is 1"),
        ({"nnodes": 0}, "--nnodes is 0; it must divide"),
        ({"tensor_parallel_size": 4, "nnodes": 2}, "several hosts need an address"),
        ({"dist_init_addr": "10.0.0.1:29500"}, "one has no use for it"),
        ({"dist_init_addr": "10.0.0.1"}, "it must be a host and a port, such as 10.0.0.1:29500"),
        (
            {"tensor_parallel_size": 2, "nnodes": 2, "dist_init_addr": "0.0.0.0:29500"},
            "no host can be called at 0.0.0.0; it must be host 0's own address, such as 10.0.0.1:29500",
        ),
        (
            {"tensor_parallel_size": 2, "nnodes": 2, "dist_init_addr": "[::]:29500"},
            "no host can be called at ::",
        ),
        ({"node_rank": 1}, "--node-rank is 1; it must be at least 0 and less than --nnodes, which is 1"),
        (
            {"tensor_parallel_size": 2, "nnodes": 2, "dist_init_addr": "a:1", "collective": "shm"},
            "--collective gloo is for --nnodes 2",
        ),
        ({"distributed_executor_backend": "ray"}, "backend is ray, and one rank has no use for it"),
        ({"distributed_executor_backend": "slurm"}, "it must be one of mp, ray"),
        ({**RAY, "nnodes": 2}, "leave it out: Ray chooses the hosts"),
        ({**RAY, "ray_cpus": 0}, "--ray-cpus is 0; it must be at least 1"),
        ({**RAY, "ray_address": "local"}, "--ray-address is 'local'; it must be auto, or host and port of a cluster"),
        ({**RAY, "ray_address": "ray://a:10001"}, "--ray-address is 'ray://a:10001'; it must be auto"),
        ({"ray_address": "a:1"}, "--ray-address is a:1, which only --distributed-executor-backend ray has a use for"),
        ({"ray_cpus": 4}, "--ray-cpus is 4, which only --distributed-executor-backend ray"),
        ({"rank_timeout": 0.0}, "--rank-timeout is 0.0; it must be more than 0"),
        ({"rank_load_timeout": 86400.0}, "--rank-load-timeout is 86400.0; it must be more than 0 and less than 86400"),
        (
            {"tensor_parallel_size": 2, "weave": "x"},
            "--weave is 'x'; it must be one of auto, plain, one-shot, fused, woven",
        ),
    ],
)
def test_settings_of_ranks(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        EngineConfig(**given).validate()
    EngineConfig(tensor_parallel_size=4, weave="plain", device="cpu", rank_timeout=0.5).validate()
    for flags in (["-tp", "3"], ["-tp=3"], ["--tensor-parallel-size=3"], ["--tensor_parallel_size", "3"]):
        assert read(flags, {})[0].tensor_parallel_size == 3


def test_settings_of_ranks_that_ray_starts() -> None:
    for address in (None, "auto", "10.0.0.1:6379"):
        EngineConfig(**RAY, ray_address=address, ray_cpus=4, dist_init_addr="10.0.0.1:29500").validate()


def test_validate_raises_what_problems_found() -> None:
    EngineConfig().validate()
    ServerConfig().validate()
    with pytest.raises(ConfigError, match=r"--num-blocks is 0.*\n--seed|--num-blocks is 0"):
        EngineConfig(num_blocks=0).validate()


def test_a_parser_of_another_command_shares_the_manners() -> None:
    parser = Parser("weft bench serve", "")
    parser.add_argument("--num-prompts", type=int, default=1)
    assert parser.read(["--num_prompts=3"]) == argparse.Namespace(num_prompts=3)
    with pytest.raises(ConfigError, match="did you mean --num-prompts"):
        parser.read(["--num-promts=3"])


@pytest.mark.parametrize("module", ["weft.cli", "weft.cli.flags", "weft.cli.serve", "weft.text.hub", "weft.llm"])
def test_nothing_heavy_is_imported_early(module: str) -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'huggingface_hub', 'numpy', 'rich'}"
    code = f"import sys, {module}; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
