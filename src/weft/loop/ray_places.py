"""Which node of a Ray cluster has which ranks, as pure functions of what Ray says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weft.errors import DeviceError


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of the cluster. id: Ray's. cpus, gpus: that it has in all, for whoever asks Ray for them."""

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is. bundle: of the placement group. before: ranks at the same address that come before this one, of
    all `neighbours` there."""

    bundle: int
    node: RayNode
    before: int
    neighbours: int


def cpus_of_rank(nodes: Sequence[RayNode], ranks: int) -> int:
    """As many CPUs as each of so many ranks can have, each on one node. Raises DeviceError where there is not one."""
    for cpus in range(max((node.cpus for node in nodes), default=0), 0, -1):
        if sum(node.cpus // cpus for node in nodes) >= ranks:
            return cpus
    raise DeviceError(f"{ranks} ranks need a CPU each, and {in_words(nodes)}")


def place_ranks(bundles: Mapping[int, str], nodes: Sequence[RayNode], first: str) -> list[Place]:
    """Each rank's place, in order. Ranks of one address follow one another; the first ones are at the address `first`,
    if any are.

    bundles: of the placement group, and the id of the node that each is on.
    """
    known = {node.id: node for node in nodes}
    found = sorted((known[node].address != first, known[node].address, bundle) for bundle, node in bundles.items())
    neighbours = Counter(address for _, address, _ in found)
    begun: Counter[str] = Counter()
    places = []
    for _, address, bundle in found:
        places.append(Place(bundle, known[bundles[bundle]], begun[address], neighbours[address]))
        begun[address] += 1
    return places


def in_words(nodes: Sequence[RayNode]) -> str:
    """What the cluster has."""
    each = ", ".join(f"{_amount(node.cpus, node.gpus)} on {node.address}" for node in nodes)
    return f"the Ray cluster has {each or 'no nodes'}"


def bundle_in_words(bundle: Mapping[str, int]) -> str:
    return _amount(bundle.get("CPU", 0), bundle.get("GPU", 0))


def _amount(cpus: int, gpus: int) -> str:
    words = f"{cpus} CPU{'' if cpus == 1 else 's'}"
    return f"{words} and {gpus} GPU{'' if gpus == 1 else 's'}" if gpus else words
