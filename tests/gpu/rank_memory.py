"""Two processes on one GPU that meet in torch's symmetric memory, for test_ranks.py. Prints what has come of it.

Run with TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from weft.weave.collective import Join
from weft.weave.distributed import meet
from weft.weave.symmetric import Layout, SymmetricCollective, gpu_region

HOST, TOKENS, SIZE = "127.0.0.1", 32, 512
SECONDS = 45  # for both, less than test_ranks.py waits


def partial(rank: int) -> torch.Tensor:
    return torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(rank))


def run(rank: int, port: int) -> tuple[int, bool, bool]:
    device, bounds = torch.device("cuda", 0), (0, TOKENS // 2, TOKENS)
    torch.cuda.set_device(device)
    store = meet(HOST, port, rank, 2, timeout=30.0)
    layout = Layout(2, TOKENS, SIZE, torch.float32, room=TOKENS * SIZE)
    region = gpu_region(store, "weft-test", rank, 2, layout.bytes, device)
    group = SymmetricCollective(region, rank, layout, timeout=30.0)
    weight = torch.ones(SIZE, device=device)
    residual = torch.zeros(TOKENS // 2, SIZE, device=device)
    for _ in range(3):
        joined = group.finish(group.start(Join(partial(rank).to(device), residual.clone(), weight, 1e-5, bounds)))
        both = group.gather(joined.hidden)
    total = partial(0) + partial(1)
    expected = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    right = torch.allclose(joined.hidden.cpu(), expected, rtol=1e-5, atol=1e-5)
    return int(group.failed), torch.equal(both[0], both[1]), right


def main() -> None:
    if len(sys.argv) == 3:
        found = run(int(sys.argv[1]), int(sys.argv[2]))
        print(json.dumps(found), flush=True)
        os._exit(0)  # what is shared goes with the processes
    with socket.create_server((HOST, 0)) as chosen:
        port = chosen.getsockname()[1]
    processes = [
        subprocess.Popen([sys.executable, Path(__file__), str(rank), str(port)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        found = [json.loads(process.communicate(timeout=SECONDS)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:  # one that waits for another outlives whoever waits for it
            process.kill()
    failed, same, right = zip(*found, strict=True)
    print(json.dumps({"failed": failed, "same": all(same), "right": all(right)}))


if __name__ == "__main__":
    main()
