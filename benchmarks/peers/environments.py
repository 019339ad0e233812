"""Sets up the peers' own environments in the cache folder; none of them is among weft's dependencies.

    python benchmarks/peers/environments.py llamacpp|transformers [--cache DIR]

llama.cpp is compiled for this machine (GGML_NATIVE), which takes about a quarter of an hour on two cores and needs a
C++ compiler and CMake. The last line printed is the environment's interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import cache_folder

PACKAGES = {
    "llamacpp": ("llama-cpp-python", "gguf", "numpy"),
    "transformers": ("torch>=2.11,<=2.13", "transformers>=5", "numpy"),
}
# Compiled here rather than taken as a wheel: a wheel is built for the least of all machines.
FROM_SOURCE = {"llamacpp": ["--no-binary", "llama-cpp-python"], "transformers": []}
VARIABLES = {"llamacpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}}
PROBE = {"llamacpp": "import llama_cpp, gguf, numpy", "transformers": "import torch, transformers"}


def interpreter(peer: str, cache: Path) -> Path:
    return cache / "peers" / peer / "bin" / "python"


def works(peer: str, python: Path) -> bool:
    """Whether the interpreter has all that the peer's worker imports."""
    command = [str(python), "-c", PROBE[peer]]
    return python.exists() and subprocess.run(command, capture_output=True).returncode == 0


def find(peer: str, given: Path | None, cache: Path) -> Path | None:
    """The interpreter to use: the given one, the one in the cache, or this one; None when none has the peer.

    Raises SystemExit for a given one that does not work.
    """
    if given is not None:
        if not works(peer, given):
            raise SystemExit(f"{given} cannot run: {PROBE[peer]}")
        return given
    here = [interpreter(peer, cache), Path(sys.executable)]
    return next((python for python in here if works(peer, python)), None)


def set_up(peer: str, cache: Path) -> Path:
    """Make the environment; one that works is left as it is."""
    python = interpreter(peer, cache)
    if works(peer, python):
        return python
    venv.create(python.parent.parent, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", *FROM_SOURCE[peer], *PACKAGES[peer]]
    print(" ".join(pip), file=sys.stderr)
    subprocess.run(pip, check=True, env={**os.environ, **VARIABLES.get(peer, {})}, stdout=sys.stderr)
    if not works(peer, python):
        raise SystemExit(f"{python} was set up, but cannot run: {PROBE[peer]}")
    return python


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Set up a peer's environment.")
    parser.add_argument("peer", choices=sorted(PACKAGES))
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: weft-bench in the user's cache folder")
    given = parser.parse_args(arguments)
    print(set_up(given.peer, cache_folder(given.cache)))


if __name__ == "__main__":
    main()
