"""The text of /metrics, read by prometheus-client's own parser."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from weft.core.request import Finish, PromptScores, Request, RequestEnd, Timing, TokenOutput
from weft.core.sampling import SamplingParams
from weft.errors import InvalidRequest, QueueFull, StepFailed, Unavailable
from weft.ipc.messages import LaneStats, Stats
from weft.server import metrics as module
from weft.server.metrics import Metrics, RequestWatch, metrics_router

LANES = (LaneStats("prefill", 1, 2.0, 7, 70, 3, 4, 0.125), LaneStats("decode", 3, 1.0, 9, 9, 5))
STATS = Stats(8, 2, 60, 20, 15, 5, 4, 100, 30, 900, 450, 10.0, LANES)
REQUEST = Request("r", (1, 2, 3))
SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
GAPS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
# What vLLM has of one engine and one model of text (vllm/v1/metrics/loggers.py): its gauges, its counters, and the
# bounds of its histograms. weft does not sleep, has nowhere else to look for a prefix, and does not list its settings.
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = (
    *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"),
    *("request_success",),
)
HISTOGRAMS = {
    "time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
    ),
    "inter_token_latency_seconds": GAPS,
    "request_time_per_output_token_seconds": GAPS,
    "e2e_request_latency_seconds": SECONDS,
    "request_queue_time_seconds": SECONDS,
    "request_inference_time_seconds": SECONDS,
    "request_prefill_time_seconds": SECONDS,
    "request_decode_time_seconds": SECONDS,
    "request_prompt_tokens": COUNTS,
    "request_generation_tokens": COUNTS,
    "request_max_num_generation_tokens": COUNTS,
    "request_prefill_kv_computed_tokens": COUNTS,
    "request_params_max_tokens": COUNTS,
    "request_params_n": (1, 2, 5, 10, 20),
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}


@dataclass
class Engine:
    """What metrics ask for statistics."""

    answer: Stats | Exception = STATS

    async def stats(self) -> Stats:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def scrape(metrics: Metrics) -> dict[str, float]:
    """name{label=value,...} without model_name, to value; checks the form of the text on the way."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families((await metrics.render()).decode()):
        assert family.name.startswith("weft:") and family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "llama"
            key = sample.name.removeprefix("weft:") + "".join(f"|{k}={v}" for k, v in sorted(labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def metrics(engine: Engine) -> Metrics:
    return Metrics("llama", engine.stats)


async def test_a_dashboard_of_vllm_finds_its_names_kinds_and_bounds(metrics: Metrics) -> None:
    kinds, bounds = {}, {}
    for family in text_string_to_metric_families((await metrics.render()).decode()):
        name = family.name.removeprefix("weft:")
        kinds[name] = family.type
        bounds[name] = {float(one.labels["le"]) for one in family.samples if "le" in one.labels}
    expected = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter")
    expected |= dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name: kinds.get(name) for name in expected} == expected
    assert not {name: missing for name, each in HISTOGRAMS.items() if (missing := {*each, float("inf")} - bounds[name])}


async def test_what_the_engine_counts_is_there_under_the_known_names(metrics: Metrics) -> None:
    found = await scrape(metrics)
    expected = {
        "engine_up": 1,
        "num_requests_running": 8,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.2,
        "kv_blocks|state=free": 60,
        "kv_blocks|state=cached": 20,
        "kv_blocks|state=held": 15,
        "kv_blocks|state=pinned": 5,
        "num_preemptions_total": 4,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 30,
        "prompt_tokens_total": 900,
        "generation_tokens_total": 450,
        "partition|lane=prefill": 1,
        "partition|lane=decode": 3,
        "lane_running|lane=decode": 5,
        "lane_busy_seconds_total|lane=prefill": 2,
        "lane_steps_total|lane=decode": 9,
        "lane_tokens_total|lane=prefill": 70,
        "partition_moves_total|lane=prefill": 4,
        "partition_move_seconds_total|lane=prefill": 0.125,
        "lane_busy_ratio|lane=prefill": 0.2,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert not any("_created" in name for name in found)


async def test_the_controller_of_the_shares_is_told_of_where_there_is_one(metrics: Metrics, engine: Engine) -> None:
    assert "partition_regime|regime=mixed" not in await scrape(metrics)
    engine.answer = msgspec.structs.replace(
        STATS,
        partition_regime="mixed",
        partition_chunk=128,
        partition_switches=4,
        partition_switch_seconds=0.5,
        partition_decide_seconds=0.25,
        partition_put_back=7,
        partition_refused=2,
        partition_decisions=9,
        partition_ttft=0.75,
    )
    found = await scrape(metrics)
    expected = {
        "partition_switches_total": 4,
        "partition_switch_seconds_total": 0.5,
        "partition_decide_seconds_total": 0.25,
        "partition_put_back_total": 7,
        "partition_refused_total": 2,
        "partition_decisions_total": 9,
        "partition_predicted_ttft_seconds": 0.75,
        "partition_chunk": 128,
        "partition_regime|regime=mixed": 1,
        "partition_regime|regime=split": 0,
        "partition_regime|regime=turns": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "partition_predicted_tpot_seconds" not in found


async def test_steps_are_told_apart_by_their_tokens(metrics: Metrics, engine: Engine) -> None:
    sizes = (4, 0, 2, *[0] * 10, 1)
    engine.answer = msgspec.structs.replace(STATS, iteration_tokens=20030, step_sizes=sizes)
    found = await scrape(metrics)
    expected = {"_count": 7, "_sum": 20030, "_bucket|le=1.0": 4, "_bucket|le=8.0": 4, "_bucket|le=16.0": 6}
    expected |= {"_bucket|le=16384.0": 6, "_bucket|le=+Inf": 7}
    assert {name: found[f"iteration_tokens_total{name}"] for name in expected} == expected


async def test_the_busy_ratio_is_of_the_time_since_the_last_scrape(metrics: Metrics, engine: Engine) -> None:
    await scrape(metrics)
    lanes = (LaneStats("prefill", 2, 3.0, 8, 80, 0), LaneStats("decode", 2, 1.0, 9, 9, 0))
    engine.answer = msgspec.structs.replace(STATS, uptime=12.0, lanes=lanes)
    found = await scrape(metrics)
    assert (found["lane_busy_ratio|lane=prefill"], found["lane_busy_ratio|lane=decode"]) == (0.5, 0.0)
    assert found["partition|lane=prefill"] == 2
    assert (await scrape(metrics))["lane_busy_ratio|lane=prefill"] == 0.0  # asked twice at one moment


async def test_without_the_engine_the_rest_is_still_told(
    metrics: Metrics, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answer = Unavailable("the engine is gone")
    found = await scrape(metrics)
    assert found["engine_up"] == 0 and "num_requests_running" not in found
    assert found["request_success_total|finished_reason=stop"] == 0

    async def never() -> Stats:
        await asyncio.sleep(3600)
        return STATS

    monkeypatch.setattr(module, "STATS_SECONDS", 0.01)
    assert (await scrape(Metrics("llama", never)))["engine_up"] == 0


async def test_a_request_is_measured_from_its_arrival_to_its_end(metrics: Metrics) -> None:
    now = [100.0]
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=7, n=2))
    watch = RequestWatch(metrics, request, lambda: now[0])

    def at(moment: float, event: Any) -> None:
        now[0] = moment
        watch.event(event)

    at(100.1, PromptScores("r", ()))
    at(101.0, TokenOutput("r", 0, 5))
    at(101.5, TokenOutput("r", 1, 5))
    at(102.0, TokenOutput("r", 0, 6))
    at(105.0, TokenOutput("r", 0, 7, finish=Finish.LENGTH))
    at(105.0, TokenOutput("r", 1, None, finish=Finish.ABORT))
    at(106.0, RequestEnd("r", Finish.LENGTH, 3, 2, 4, Timing(10.0, 10.5, 12.0, 20.0)))
    found = await scrape(metrics)
    expected = {
        "time_to_first_token_seconds": (1, 1.0),
        "inter_token_latency_seconds": (2, 4.0),
        "request_time_per_output_token_seconds": (1, 2.0),
        "e2e_request_latency_seconds": (1, 6.0),
        "request_queue_time_seconds": (1, 0.5),
        "request_prefill_time_seconds": (1, 1.5),
        "request_decode_time_seconds": (1, 8.0),
        "request_inference_time_seconds": (1, 9.5),
        "request_prompt_tokens": (1, 3.0),
        "request_prefill_kv_computed_tokens": (1, 1.0),
        "request_generation_tokens": (1, 4.0),
        "request_max_num_generation_tokens": (1, 3.0),
        "request_params_max_tokens": (1, 7.0),
        "request_params_n": (1, 2.0),
    }
    assert {name: (found[f"{name}_count"], found[f"{name}_sum"]) for name in expected} == expected
    assert found["request_success_total|finished_reason=length"] == 1
    assert found["inter_token_latency_seconds_bucket|le=1.0"] == 1


async def test_a_request_that_never_ran_has_no_times_that_it_did_not_have(metrics: Metrics) -> None:
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=None))
    metrics.watch(request).event(RequestEnd("r", Finish.ABORT, 3, 0, 0, Timing(10.0, None, None, 11.0)))
    found = await scrape(metrics)
    assert (found["request_params_n_sum"], found["request_params_max_tokens_count"]) == (1, 0)
    assert found["request_success_total|finished_reason=abort"] == 1
    assert found["e2e_request_latency_seconds_count"] == 1
    for name in (
        "time_to_first_token",
        *(f"request_{part}_time" for part in ("queue", "inference", "prefill", "decode")),
    ):
        assert found[f"{name}_seconds_count"] == 0
    assert found["request_prefill_kv_computed_tokens_count"] == 0


async def test_refusals_are_counted_by_reason_and_ends_once(metrics: Metrics) -> None:
    metrics.refused(InvalidRequest("no"))
    metrics.watch(REQUEST).error(QueueFull("full"))
    metrics.watch(REQUEST).error(Unavailable("gone before it began"))
    begun = metrics.watch(REQUEST)
    begun.event(TokenOutput("r", 0, 1))
    begun.error(Unavailable("gone in the middle"))
    metrics.watch(REQUEST).abandoned()
    failed = RequestEnd("r", Finish.ERROR, 3, 0, 0, Timing(1.0), "it broke", StepFailed.code)
    metrics.watch(REQUEST).event(failed)
    found = await scrape(metrics)
    assert {name: value for name, value in found.items() if name.startswith("admission_rejections_total")} == {
        "admission_rejections_total|reason=invalid_value": 1,
        "admission_rejections_total|reason=queue_full": 1,
        "admission_rejections_total|reason=unavailable": 1,
    }
    ends = {name: value for name, value in found.items() if name.startswith("request_success_total")}
    assert ends == {
        "request_success_total|finished_reason=stop": 0,
        "request_success_total|finished_reason=length": 0,
        "request_success_total|finished_reason=abort": 1,
        "request_success_total|finished_reason=error": 2,
    }


async def test_two_servers_in_one_process_do_not_share_metrics(metrics: Metrics, engine: Engine) -> None:
    other = Metrics("llama", engine.stats)
    metrics.refused(InvalidRequest("no"))
    assert not any("rejections" in name for name in await scrape(other))


async def test_a_model_name_of_any_characters_is_escaped(engine: Engine) -> None:
    name = 'a"b\\c\nd é'
    text = (await Metrics(name, engine.stats).render()).decode()
    labels = {
        sample.labels["model_name"] for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert labels == {name}


async def test_the_route_says_what_it_sends(metrics: Metrics) -> None:
    app = FastAPI()
    app.include_router(metrics_router(metrics))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://weft") as http:
        response = await http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "weft:num_requests_running" in response.text
    assert "text/plain" in app.openapi()["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
