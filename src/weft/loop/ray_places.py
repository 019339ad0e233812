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


def places(bundles: Mapping[int, str], nodes: Sequence[RayNode], first: str) -> list[Place]:
    """Each rank's, in order: those of one address follow one another, and the node `first` has the first ones, if any.

    bundles: of the placement group, and the id of the node that each is on.
    """
    known = {node.id: node for node in nodes}
    order = sorted(bundles, key=lambda bundle: _order(known[bundles[bundle]], known[first].address, bundle))
    neighbours = Counter(known[node].address for node in bundles.values())
    found: list[Place] = []
    for bundle in order:
        node = known[bundles[bundle]]
        before = sum(place.node.address == node.address for place in found)
        found.append(Place(bundle, node, before, neighbours[node.address]))
    return found


def in_words(nodes: Sequence[RayNode]) -> str:
    """What the cluster has."""
    each = ", ".join(f"{_amount(node.cpus, node.gpus)} on {node.address}" for node in nodes)
    return f"the Ray cluster has {each or 'no nodes'}"


def bundle_in_words(bundle: Mapping[str, int]) -> str:
    return _amount(bundle.get("CPU", 0), bundle.get("GPU", 0))


def _order(node: RayNode, first: str, bundle: int) -> tuple[bool, str, int]:
    return node.address != first, node.address, bundle


def _amount(cpus: int, gpus: int) -> str:
    words = f"{cpus} CPU{'' if cpus == 1 else 's'}"
    return f"{words} and {gpus} GPU{'' if gpus == 1 else 's'}" if gpus else words
