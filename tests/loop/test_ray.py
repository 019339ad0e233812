"""Ranks that Ray places, without Ray: who is where, and a stand-in for a cluster whose actors are threads. The real one
is in tests/system/test_ray.py."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import weft
from weft.config import EngineConfig, parse_address, parse_cores
from weft.core.plan import Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.cores import collective_of
from weft.devices.simulated import continuation
from weft.errors import CheckpointError, ConfigError, DeviceError, RankLost
from weft.ipc.ranks import Meeting
from weft.loop import ray_actor, ray_actors, ray_cluster
from weft.loop.nodes import free_port, whereabouts
from weft.loop.rank_processes import Ranks, start_ranks
from weft.loop.ranks import RankedDevice, open_ranks
from weft.loop.ray_actor import Found
from weft.loop.ray_places import RayNode, cpus_of_rank, in_words, place_ranks
from weft.text.hub import resolve_model

COMMAND = (sys.executable, str(Path(__file__).with_name("stub_rank.py")))
KILLED = 1  # of stub_rank.py
BUILTIN = resolve_model("builtin")
HOST, ADDRESS = "127.0.0.1", "127.0.0.1:6379"
CONNECT = socket.create_connection
CONFIG = EngineConfig(tensor_parallel_size=2, distributed_executor_backend="ray", ray_address=ADDRESS, rank_timeout=5.0)
NODES = (RayNode("a", HOST, 4, 0), RayNode("b", HOST, 4, 0))

# Who is where.

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@given(SIZES, st.integers(1, 12))
def test_a_rank_gets_as_many_cpus_as_all_can_have(sizes: list[int], ranks: int) -> None:
    def fits(cpus: int) -> bool:
        """By filling the nodes one by one."""
        left = list(sizes)
        for _ in range(ranks):
            roomy = [index for index, free in enumerate(left) if free >= cpus]
            if not roomy:
                return False
            left[roomy[0]] -= cpus
        return True

    nodes = [RayNode(str(index), f"10.0.0.{index}", size, 0) for index, size in enumerate(sizes)]
    if not fits(1):
        with pytest.raises(DeviceError, match=f"{ranks} ranks need a CPU each, and the Ray cluster has {sizes[0]} CPU"):
            cpus_of_rank(nodes, ranks)
    else:
        cpus = cpus_of_rank(nodes, ranks)
        assert fits(cpus) and not fits(cpus + 1)


@given(st.data())
def test_ranks_of_a_host_follow_one_another(data: st.DataObject) -> None:
    hosts = data.draw(st.lists(st.sampled_from("pqr"), min_size=1, max_size=5))  # addresses of the nodes
    nodes = [RayNode(f"n{index}", host, 9, 0) for index, host in enumerate(hosts)]
    on = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=8))
    first = data.draw(st.sampled_from("pqr"))
    found = place_ranks({bundle: node.id for bundle, node in enumerate(on)}, nodes, first)
    assert sorted(place.bundle for place in found) == list(range(len(on)))
    assert all(place.node == on[place.bundle] for place in found)
    addresses = [place.node.address for place in found]
    assert first not in addresses or addresses[0] == first
    for address in set(addresses):
        count = sum(node.address == address for node in on)
        start = addresses.index(address)
        assert addresses[start : start + count] == [address] * count
        assert [(place.before, place.neighbours) for place in found[start : start + count]] == [
            (before, count) for before in range(count)
        ]


def test_words() -> None:
    assert whereabouts(["a", "a", "a", "b"]) == " (ranks 0 to 2 on a, rank 3 on b)"
    nodes = (RayNode("1", "a", 1, 0), RayNode("2", "b", 8, 2))
    assert in_words(nodes) == "the Ray cluster has 1 CPU on a, 8 CPUs and 2 GPUs on b"
    assert in_words(()) == "the Ray cluster has no nodes"


# A cluster whose actors are threads.


class RayError(Exception):
    pass


class GetTimeoutError(RayError, TimeoutError):
    pass


@dataclass
class Ray:
    """What is used of the module, with nodes that have room for a bundle in turns, or for none. find: instead of the
    actors' own."""

    nodes_: tuple[RayNode, ...] = NODES
    room: bool = True
    find: Callable[..., bytes] | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))
    asked: list[dict[str, int]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError)
        strategies = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda group, placement_group_bundle_index: None)
        self.util = SimpleNamespace(
            scheduling_strategies=strategies,
            placement_group=self._group,
            remove_placement_group=lambda group: self.ended.append("group"),
            placement_group_table=lambda group: {
                "bundles_to_node_id": {
                    bundle: self.nodes_[bundle % len(self.nodes_)].id for bundle in range(len(self.asked))
                }
            },
        )

    def _group(self, bundles: list[dict[str, int]], strategy: str) -> Any:
        self.asked = bundles
        return SimpleNamespace(wait=lambda seconds: self.room)

    def init(self, **settings: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def shutdown(self) -> None:
        self.ended.append("connection")

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"NodeID": "c", "NodeManagerAddress": "c", "Alive": False, "Resources": {}}
        alive = [
            {"NodeID": node.id, "NodeManagerAddress": node.address, "Alive": True, "Resources": {"CPU": node.cpus}}
            for node in self.nodes_
        ]
        return [dead, *alive]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1.0, "memory": 1e9}

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: self.nodes_[0].id)

    def remote(self, kind: type) -> Any:
        actor = kind()
        find, serve = self.find or actor.find, actor.serve
        methods = {"find": SimpleNamespace(remote=partial(self.pool.submit, find))}
        methods["serve"] = SimpleNamespace(remote=partial(self.pool.submit, serve))

        def options(**given: Any) -> Any:
            self.options.append(given)
            return SimpleNamespace(remote=lambda: SimpleNamespace(**methods))

        return SimpleNamespace(options=options)

    def get(self, call: Future[bytes], timeout: float | None = None) -> bytes:
        try:
            return call.result(timeout)
        except TimeoutError:
            raise GetTimeoutError from None

    def wait(self, calls: list[Future[bytes]], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done = wait(calls, timeout).done
        return [call for call in calls if call in done], [call for call in calls if call not in done]


def present(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Ray:
    """Installed, as it were, and serving at ADDRESS."""
    for name in ("ray", "ray.exceptions", "ray.util", "ray.util.scheduling_strategies"):
        monkeypatch.setitem(sys.modules, name, ray)
    monkeypatch.setattr(ray_cluster.socket, "create_connection", reach)
    return ray


def reach(address: tuple[str, int], timeout: float | None = None) -> socket.socket:
    """A connection; at the cluster's address something listens always."""
    if address == parse_address(ADDRESS):
        return socket.socket()
    return CONNECT(address, timeout)


@dataclass
class Started:
    """What the actors were told of their rank."""

    ranks: range
    meeting: Meeting
    cores: str | None
    before: int
    neighbours: int


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """Filled by actors, whose ranks are stub_rank.py."""
    found: list[Started] = []

    def start(config: EngineConfig, model: Path, ranks: range, meeting: Meeting, bind: str, **given: int) -> Ranks:
        found.append(Started(ranks, meeting, config.cores, **given))
        return start_ranks(config, model, ranks, meeting, bind, COMMAND, **given)

    monkeypatch.setattr(ray_actor, "start_ranks", start)
    return found


def open_(config: EngineConfig = CONFIG, model: Path = BUILTIN) -> RankedDevice:
    return open_ranks(config, model, lambda _phase: None)


def plan(step: int, first: int) -> Plan:
    sampling = Sampling(SamplingParams(temperature=0.0), seed=0, position=2)
    return Plan(step, Lane.MIXED, (Slice(step, 0, (first, 8), (step,), sampling),))


@pytest.mark.parametrize("nodes", [NODES, NODES[:1]], ids=["two nodes", "one node"])
def test_ranks_of_actors_are_one_device(
    nodes: tuple[RayNode, ...], started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = present(Ray(nodes), monkeypatch)
    handler = signal.getsignal(signal.SIGTERM)
    device = open_()
    try:
        device.submit(plan(1, 50))
        (result,) = device.poll(20.0)
        assert (result.sampled[0].token,) == continuation([50, 8], 1, 4096)
        assert ray.asked == [{"CPU": 2 * len(nodes)}] * 2  # all that there are, divided
        assert [given["num_cpus"] for given in ray.options] == [2 * len(nodes)] * 2
        started.sort(key=lambda one: one.ranks[0])
        assert [one.ranks for one in started] == [range(1), range(1, 2)]
        assert [(one.before, one.neighbours) for one in started] == [(0, 2), (1, 2)]  # by address: one host
        (meeting,) = {one.meeting for one in started}
        shared = len(nodes) == 1 and collective_of(CONFIG) == "shm"
        assert meeting.host == HOST and (meeting.port is None) is shared
    finally:
        device.close()
    assert ray.ended == ["group", "connection"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_rank_uses_no_more_cores_than_it_asked_for(started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actor, "usable_cores", lambda wanted: tuple(range(8)))
    monkeypatch.setattr("weft.loop.rank_processes.usable_cores", lambda wanted: parse_cores(wanted or ""))
    present(Ray(), monkeypatch)
    open_(replace(CONFIG, ray_cpus=2)).close()
    assert [one.cores for one in started] == ["0,1,2,3"] * 2  # for both, who divide them


def test_a_rank_on_a_gpu_sees_one_only(started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = present(Ray(), monkeypatch)
    open_(replace(CONFIG, device="cuda")).close()
    assert ray.asked == [{"CPU": 1, "GPU": 1}] * 2
    assert [(given["num_cpus"], given["num_gpus"]) for given in ray.options] == [(1, 1)] * 2
    assert [(one.before, one.neighbours, one.cores) for one in started] == [(0, 1, None)] * 2


def test_a_rank_that_is_killed(started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = present(Ray(), monkeypatch)
    device = open_()
    try:
        device.submit(plan(1, KILLED))
        with pytest.raises(RankLost, match=rf"rank 1 was killed by SIGKILL.* \(ranks 0 to 1 on {HOST}\)"):
            device.poll(20.0)
    finally:
        device.close()
    assert ray.ended == ["group", "connection"]


def raises(error: Exception) -> Callable[..., bytes]:
    def find(address: str) -> bytes:
        raise error

    return find


def answers(version: str, seconds: float = 0.0) -> Callable[..., bytes]:
    def find(address: str) -> bytes:
        time.sleep(seconds)
        return msgspec.json.encode(Found(version, 1))

    return find


TRACEBACK = "ray::RankActor.find()\n  File x\nModuleNotFoundError: No module named 'weft'"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"room": False}, "no room within 60 s for 2 ranks of 4 CPUs each: the Ray cluster has 4 CPUs on"),
        ({"room": False}, "and 1 CPU of all these are free. What would work: fewer ranks, fewer --ray-cpus"),
        ({"nodes_": (RayNode("a", HOST, 1, 0),)}, f"need a CPU each, and the Ray cluster has 1 CPU on {HOST}"),
        ({"find": raises(RayError(TRACEBACK))}, "did not start: ModuleNotFoundError: No module named 'weft'"),
        ({"find": raises(RayError(TRACEBACK))}, "must be installed on every node, for the Python that"),
        ({"find": answers("0.0.9")}, f"weft 0.0.9 is installed there, and this is {weft.__version__}"),
        ({"find": answers(weft.__version__, 1.0)}, f"rank 0 on {HOST}: its actor did not start within 0.5 s"),
    ],
)
def test_what_ray_cannot_do(given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "START_SECONDS", 0.5)
    ray = present(Ray(**given), monkeypatch)
    with pytest.raises(DeviceError, match=re.escape(words)):
        open_()
    assert ray.ended == ["group", "connection"][not ray.asked :]


def test_what_actors_cannot_do(tmp_path: Path, started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    present(Ray(), monkeypatch)
    with pytest.raises(CheckpointError, match=rf"rank \d on {HOST}: model 'a/b/c' is not 'builtin', not a folder here"):
        open_(replace(CONFIG, model="a/b/c"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DeviceError, match=rf"rank \d on {HOST}: the model's config\.json is not the same"):
        open_(model=tmp_path)
    with (
        socket.create_server((HOST, 0)) as taken,
        pytest.raises(DeviceError, match="the engine cannot listen at 127"),
    ):
        open_(replace(CONFIG, dist_init_addr=f"{HOST}:{taken.getsockname()[1]}"))
    with pytest.raises(DeviceError, match="--collective is shm, and Ray has put the ranks on 2 nodes"):
        open_(replace(CONFIG, collective="shm"))
    monkeypatch.setattr(ray_cluster, "START_SECONDS", 0.2)
    monkeypatch.setattr(ray_actor, "serve_ranks", lambda *given: time.sleep(1.5))
    with pytest.raises(DeviceError, match=rf"rank 0 on {HOST} did not reach the engine at {HOST}:\d+ within 0\.2 s"):
        open_()
    assert not started


def test_a_folder_is_looked_for_by_its_whole_path(
    tmp_path: Path, started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor's working folder is another one."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    wanted: list[str] = []

    def resolve(model: str, revision: str | None) -> Path:
        wanted.append(model)
        return Path(model)

    monkeypatch.setattr(ray_actor, "resolve_model", resolve)
    present(Ray(), monkeypatch)
    open_(replace(CONFIG, model="model"), Path("model")).close()
    assert wanted == [str(tmp_path / "model")] * 2


def test_without_ray_and_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = f"{HOST}:{free_port(HOST)}"
    present(Ray(), monkeypatch)
    with pytest.raises(DeviceError, match=rf"no Ray cluster at --ray-address {closed}: .*refused\n.*`ray start --head"):
        open_(replace(CONFIG, ray_address=closed))
    monkeypatch.setenv("RAY_ADDRESS", closed)
    for address in (None, "auto"):
        with pytest.raises(DeviceError, match=f"no Ray cluster at RAY_ADDRESS {closed}"):
            open_(replace(CONFIG, ray_address=address))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ConfigError, match="RAY_ADDRESS is 'local'; it must be auto, or host and port of a cluster"):
        open_(replace(CONFIG, ray_address=None))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"the package ray is not installed; .* pip install 'weft\[ray\]'"):
        open_()
