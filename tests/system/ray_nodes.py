"""Nodes of a Ray cluster, all on this host: `python ray_nodes.py ADDRESS...`, an address of the loopback interface for
each. It writes the cluster's address, and ends the nodes when its standard input ends."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster()
    for address in sys.argv[1:]:
        cluster.add_node(
            node_ip_address=address, num_cpus=1, include_dashboard=False, include_log_monitor=False, no_monitor=True
        )
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
