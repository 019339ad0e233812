"""The one place where a device is chosen. Importing it is cheap: a device's file is imported when it is opened."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from weft.config import EngineConfig
from weft.devices.base import Device
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.devices.group import Group


def open_device(config: EngineConfig, folder: Path, say: Callable[[str], None]) -> Device:
    """The device for --device, with the model of `folder` on it; auto is cpu.

    say: told the name of each phase of the start-up when it begins. Raises ConfigError, CheckpointError, DeviceError.
    """
    if config.attention_backend != "auto" and config.device != "cuda":
        raise ConfigError(
            f"--attention-backend is {config.attention_backend}, and --device {config.device} has one way only; "
            "leave it out, or serve on --device cuda"
        )
    if config.w4a16 and config.device != "cuda":
        raise ConfigError(
            f"--w4a16 is for --device cuda, and --device is {config.device}, whose kernels take 8-bit activations; "
            "leave it out, or serve on --device cuda"
        )
    if config.batch_invariant and config.device != "cuda":
        raise ConfigError(
            f"--batch-invariant is for --device cuda, and --device is {config.device}, whose C++ kernels keep a row's "
            "bits its own without it; leave it out, or serve on --device cuda"
        )
    if config.device == "simulated":
        from weft.devices.simulated import open_simulated

        return open_simulated(config, folder, say)
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is {config.device!r}; it must be one of auto, cpu, cuda, simulated")
    if "torch" not in sys.modules:
        say("import torch")
    return rank_opener(config)(config, folder, say, None)


def rank_opener(config: EngineConfig) -> Callable[[EngineConfig, Path, Callable[[str], None], Group | None], Device]:
    """What opens a device on which a model is computed, alone or as a rank of a group. Raises ConfigError."""
    if config.device == "cuda":
        if find_spec("triton") is None:
            raise ConfigError(
                "--device is cuda, and the package triton, in which its kernels are written, is not installed; "
                "what would work: pip install triton (CUDA builds of torch bring it along), or --device cpu"
            )
        from weft.devices.cuda import open_cuda

        return open_cuda
    from weft.devices.cpu import open_cpu

    return open_cpu
