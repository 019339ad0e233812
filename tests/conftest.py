"""Where there is no GPU, Triton interprets its kernels. It reads the variable while it is imported, so that this comes
before any test module."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
