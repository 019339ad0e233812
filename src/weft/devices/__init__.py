"""The one place where a device is chosen. Importing it is cheap: a device's file is imported when it is opened."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from weft.config import EngineConfig
from weft.devices.base import Device
from weft.errors import ConfigError


def open_device(config: EngineConfig, folder: Path, say: Callable[[str], None]) -> Device:
    """The device for --device, with the model of `folder` on it; auto is cpu.

    say: told the name of each phase of the start-up when it begins. Raises ConfigError, CheckpointError, DeviceError.
    """
    if config.device == "simulated":
        from weft.devices.simulated import open_simulated

        return open_simulated(config, folder, say)
    if config.device in ("auto", "cpu"):
        if "torch" not in sys.modules:
            say("import torch")
        from weft.devices.cpu import open_cpu

        return open_cpu(config, folder, say)
    raise ConfigError(f"--device is {config.device!r}; it must be one of auto, cpu, simulated")
