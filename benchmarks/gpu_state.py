"""What nvidia-smi says of a GPU: its driver, its clocks, its power, and what holds them back."""

from __future__ import annotations

import subprocess

import torch

# Asked for one after the other, for a driver that does not know one name answers none of them.
QUERIES = (
    "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu",
    "clocks_event_reasons.active",
)
PATIENCE = 10.0  # seconds


def gpu_state(device: torch.device) -> dict[str, str]:
    """By nvidia-smi's own names, in MHz, W and degrees. What it does not say is left out."""
    found: dict[str, str] = {}
    if device.type == "cuda":
        chosen = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        for query in QUERIES:
            command = ["nvidia-smi", chosen, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                found[f"no {query}"] = type(error).__name__
            else:
                found |= zip(query.split(","), map(str.strip, done.stdout.split(",")), strict=False)
    return found
