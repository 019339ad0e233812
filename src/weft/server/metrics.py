"""Prometheus metrics: vLLM's stems, kinds and bounds of buckets under the prefix weft:, so that its dashboards work
after one search-and-replace.

Times that a client feels are taken in this process; queue, prefill and decode times on the engine's clock; counts and
gauges of the engine are asked for on every scrape.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import accumulate

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from weft.core.plan import Regime
from weft.core.request import Event, Finish, Request, RequestEnd, TokenOutput
from weft.errors import Unavailable, WeftError
from weft.ipc.messages import STEP_BUCKETS, Stats

PREFIX = "weft:"
# Seconds that a scrape waits for the engine. It answers between two steps.
STATS_SECONDS = 5.0
# vLLM's bounds, and some below them, since small models are quicker: an alert on one bound finds it here.
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
COUNT_BUCKETS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
SEQUENCE_BUCKETS = (1, 2, 5, 10, 20)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "from the arrival of a request to its first token", FIRST_TOKEN_BUCKETS),
    ("inter_token_latency_seconds", "between two tokens of a sequence", TOKEN_BUCKETS),
    ("request_time_per_output_token_seconds", "mean gap between the tokens of a sequence", TOKEN_BUCKETS),
    ("e2e_request_latency_seconds", "from the arrival of a request to its end", REQUEST_BUCKETS),
    ("request_queue_time_seconds", "from arrival in the engine to the first step", REQUEST_BUCKETS),
    ("request_inference_time_seconds", "from the first step to the end", REQUEST_BUCKETS),
    ("request_prefill_time_seconds", "from the first step to the first token", REQUEST_BUCKETS),
    ("request_decode_time_seconds", "from the first token to the end", REQUEST_BUCKETS),
    ("request_prompt_tokens", "prompt tokens of a request", COUNT_BUCKETS),
    ("request_prefill_kv_computed_tokens", "prompt tokens of a request that no cache had", COUNT_BUCKETS),
    ("request_generation_tokens", "generated tokens of a request, of all its sequences", COUNT_BUCKETS),
    ("request_max_num_generation_tokens", "generated tokens of a request's longest sequence", COUNT_BUCKETS),
    ("request_params_max_tokens", "tokens that a request asked for at most, where it did", COUNT_BUCKETS),
    ("request_params_n", "sequences that a request asked for", SEQUENCE_BUCKETS),
)


class Metrics:
    """All metrics of one server. stats: asks the engine; called on every scrape, with a time-out."""

    def __init__(self, model_name: str, stats: Callable[[], Awaitable[Stats]]) -> None:
        self._stats = stats
        self._labels = {"model_name": model_name}
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(PREFIX + name, words, ["model_name"], registry=self._registry, buckets=buckets).labels(
                **self._labels
            )
            for name, words, buckets in HISTOGRAMS
        }
        self._success = self._counter("request_success", "requests that ended, by the way they did", "finished_reason")
        for reason in Finish:
            self._success.labels(**self._labels, finished_reason=reason.value)  # a series that is there from the start
        self._rejections = self._counter("admission_rejections", "requests that were not taken", "reason")
        self._last = (0.0, dict[str, float]())

    def watch(self, request: Request) -> RequestWatch:
        """Measures one request. Call it when the request has arrived, before it is submitted."""
        return RequestWatch(self, request)

    def refused(self, error: WeftError) -> None:
        """A request that was not taken, by the engine or before it came there."""
        self._rejections.labels(**self._labels, reason=error.code or error.type).inc()

    def observe(self, name: str, value: float) -> None:
        """One value of a histogram."""
        self._histograms[name].observe(value)

    def ended(self, reason: Finish) -> None:
        """One request that the engine had taken."""
        self._success.labels(**self._labels, finished_reason=reason.value).inc()

    async def render(self) -> bytes:
        """The text of /metrics. Without an engine that answers, it says engine_up 0 and leaves the engine's out."""
        try:
            async with asyncio.timeout(STATS_SECONDS):
                stats = await self._stats()
        except (TimeoutError, Unavailable) as error:
            logging.getLogger(__name__).warning("no statistics of the engine: %s", error or "it did not answer in time")
            stats = None
        families = [*self._registry.collect(), *self._engine(stats)]
        for family in families:
            # When a series was first seen is of no use, and doubles their number.
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        return generate_latest(_Collected(families))

    def _counter(self, name: str, words: str, label: str) -> Counter:
        return Counter(PREFIX + name, words, ["model_name", label], registry=self._registry)

    def _engine(self, stats: Stats | None) -> Iterator[Metric]:
        """What the engine counts."""
        yield self._gauge("engine_up", "whether the engine answers", stats is not None)
        if stats is None:
            return
        total = stats.blocks_free + stats.blocks_cached + stats.blocks_held + stats.blocks_pinned
        used = (stats.blocks_held + stats.blocks_pinned) / total if total else 0.0
        yield self._gauge("num_requests_running", "requests that have begun", stats.running)
        yield self._gauge("num_requests_waiting", "requests that wait for their first step", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "share of the KV blocks in use, 0 to 1", used)
        yield self._by(
            "kv_blocks",
            "KV blocks by state",
            "state",
            {
                "free": stats.blocks_free,
                "cached": stats.blocks_cached,
                "held": stats.blocks_held,
                "pinned": stats.blocks_pinned,
            },
        )
        for name, words, count in (
            ("num_preemptions", "sequences that lost their blocks to others", stats.preemptions),
            ("prefix_cache_queries", "prompt tokens looked up in the prefix cache", stats.prefix_queries),
            ("prefix_cache_hits", "prompt tokens found in the prefix cache", stats.prefix_hits),
            ("prompt_tokens", "prompt tokens of the requests taken", stats.prompt_tokens),
            ("generation_tokens", "tokens generated", stats.generation_tokens),
            ("partition_decisions", "decisions on shares, some to go on", stats.partition_decisions),
            ("partition_switches", "changes of how the lanes share the device", stats.partition_switches),
            ("partition_switch_seconds", "time to tell the device of new shares", stats.partition_switch_seconds),
            ("partition_decide_seconds", "time to decide on shares", stats.partition_decide_seconds),
            ("partition_put_back", "requests put back that could not be in time", stats.partition_put_back),
            ("partition_refused", "requests refused that could not be in time", stats.partition_refused),
        ):
            family = CounterMetricFamily(PREFIX + name, words, labels=["model_name"])
            family.add_metric(list(self._labels.values()), count)
            yield family
        yield self._steps(stats)
        if stats.partition_regime:
            regimes = {regime.value: float(regime.value == stats.partition_regime) for regime in Regime}
            yield self._by("partition_regime", "how the lanes share the device: 1 is in force", "regime", regimes)
            yield self._gauge("partition_chunk", "most prompt tokens beside decode; 0: no limit", stats.partition_chunk)
        for name, value in (("ttft", stats.partition_ttft), ("tpot", stats.partition_tpot)):
            if value is not None:
                words = f"mean {name.upper()} that the controller predicts"
                yield self._gauge(f"partition_predicted_{name}_seconds", words, value)
        yield from self._lanes(stats)

    def _steps(self, stats: Stats) -> Metric:
        words = "tokens of a step, of prompts and of output"
        family = HistogramMetricFamily(PREFIX + "iteration_tokens_total", words, labels=["model_name"])
        bounds = [*map(floatToGoString, STEP_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(stats.step_sizes), strict=True))
        family.add_metric(list(self._labels.values()), buckets, stats.iteration_tokens)
        return family

    def _lanes(self, stats: Stats) -> Iterator[Metric]:
        """Busy ratios are over the time since the last scrape, whoever made it; the counters have no such flaw."""
        lanes = stats.lanes
        before, busy = self._last
        self._last = (stats.uptime, {lane.lane: lane.busy for lane in lanes})
        elapsed = max(stats.uptime - before, 1e-9)
        ratios = {lane.lane: min(1.0, (lane.busy - busy.get(lane.lane, 0.0)) / elapsed) for lane in lanes}
        yield self._by("partition", "units of the device that a lane has", "lane", {x.lane: x.share for x in lanes})
        yield self._by(
            "lane_busy_ratio", "share of the time in which a lane computed, since the last scrape", "lane", ratios
        )
        yield self._by("lane_running", "sequences that a lane owns", "lane", {x.lane: x.running for x in lanes})
        for name, words, values in (
            ("lane_busy_seconds", "device time of a lane", {x.lane: x.busy for x in lanes}),
            ("lane_steps", "steps of a lane", {x.lane: float(x.steps) for x in lanes}),
            ("lane_tokens", "tokens computed by a lane", {x.lane: float(x.tokens) for x in lanes}),
            ("partition_moves", "steps before which a lane took on another share", {x.lane: x.moves for x in lanes}),
            ("partition_move_seconds", "time to take on other shares", {x.lane: x.move_seconds for x in lanes}),
        ):
            family = CounterMetricFamily(PREFIX + name, words, labels=["model_name", "lane"])
            for lane, value in values.items():
                family.add_metric([*self._labels.values(), lane], value)
            yield family

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, words, labels=["model_name"])
        family.add_metric(list(self._labels.values()), value)
        return family

    def _by(self, name: str, words: str, label: str, values: dict[str, float] | dict[str, int]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, words, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family


class RequestWatch:
    """Measures one request: give it every event of the engine, in order, or the error that ended it instead."""

    def __init__(self, metrics: Metrics, request: Request, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._request = request
        self._clock = clock
        self._arrived = clock()
        self._first: float | None = None
        # By sequence: time of the first token, time of the last, number of tokens.
        self._sequences: dict[int, tuple[float, float, int]] = {}

    def event(self, event: Event) -> None:
        """Take in TokenOutput, PromptScores or RequestEnd as it comes."""
        if isinstance(event, TokenOutput) and event.token is not None:
            self._token(event.index, self._clock())
        elif isinstance(event, RequestEnd):
            self._end(event, self._clock())

    def error(self, error: WeftError) -> None:
        """The engine refused the request (QueueFull, ...) or died under it; no RequestEnd will come."""
        if isinstance(error, Unavailable) and self._sequences:
            self._metrics.ended(Finish.ERROR)
        else:
            self._metrics.refused(error)

    def abandoned(self) -> None:
        """The client went away, and the request was aborted without waiting for its RequestEnd."""
        self._metrics.ended(Finish.ABORT)

    def _token(self, index: int, now: float) -> None:
        if self._first is None:
            self._first = now
            self._metrics.observe("time_to_first_token_seconds", now - self._arrived)
        first, last, count = self._sequences.get(index, (now, now, 0))
        if count:
            self._metrics.observe("inter_token_latency_seconds", now - last)
        self._sequences[index] = (first, now, count + 1)

    def _end(self, end: RequestEnd, now: float) -> None:
        observe, params = self._metrics.observe, self._request.params
        self._metrics.ended(end.reason)
        observe("e2e_request_latency_seconds", now - self._arrived)
        observe("request_prompt_tokens", len(self._request.prompt))
        observe("request_generation_tokens", end.generated_tokens)
        observe("request_max_num_generation_tokens", max((count for *_, count in self._sequences.values()), default=0))
        observe("request_params_n", params.n)
        if params.max_tokens is not None:
            observe("request_params_max_tokens", params.max_tokens)
        for first, last, count in self._sequences.values():
            if count > 1:
                observe("request_time_per_output_token_seconds", (last - first) / (count - 1))
        times = end.timing
        if times.scheduled is not None:
            observe("request_queue_time_seconds", times.scheduled - times.arrived)
            if times.first_token is not None:
                observe("request_prefill_time_seconds", times.first_token - times.scheduled)
                observe("request_prefill_kv_computed_tokens", end.prompt_tokens - end.cached_tokens)
            if times.ended is not None:
                observe("request_inference_time_seconds", times.ended - times.scheduled)
        if times.first_token is not None and times.ended is not None:
            observe("request_decode_time_seconds", times.ended - times.first_token)


class _Collected:
    """What prometheus-client takes for a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def metrics_router(metrics: Metrics) -> APIRouter:
    """GET /metrics, in Prometheus's text format."""
    router = APIRouter(tags=["metrics"])
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=text)  # type: ignore[arg-type]
    async def prometheus() -> Response:
        return Response(await metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
