"""A stand-in for the CUDA driver, compiled with the CUDA toolkit's own header."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    triton = pytest.importorskip("triton")
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    compiler = shutil.which("cc")
    if compiler is None or not (header / "cuda.h").exists():
        pytest.skip("needs a C compiler and triton's cuda.h")
    library = tmp_path_factory.mktemp("driver") / "libgreen.so"
    source = Path(__file__).with_name("green_driver.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-I", str(header), "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))
