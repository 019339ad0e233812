"""Builds llama.cpp's server beside the libraries that the environment of environments.py has.

    python benchmarks/peers/llama_server.py [--cache DIR]

The sources are those in the source package of the llama-cpp-python that is installed there, so that the server and the
libraries, which are compiled for this machine, are of one version. Takes some minutes and a C++ compiler. The last line
printed is the program; it has no user interface for browsers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import cache_folder
from environments import interpreter, set_up

SERVER = ("queue", "common", "http", "stream", "schema", "chat", "task", "tools", "mcp", "models", "context")
HEADERS = ("tools/server", "tools/mtmd", "", "common", "include", "ggml/include", "vendor", "src")
LIBRARIES = ("llama-common", "mtmd", "llama", "ggml", "ggml-base", "ggml-cpu")


def program(cache: Path) -> Path:
    return cache / "peers" / "llama-server" / "llama-server"


def build(cache: Path) -> Path:
    """The program; one that is there is left as it is. Raises SystemExit."""
    made = program(cache)
    if made.exists():
        return made
    python = interpreter("llamacpp", cache) if interpreter("llamacpp", cache).exists() else set_up("llamacpp", cache)
    ask = "import llama_cpp; print(llama_cpp.__version__); print(llama_cpp.__file__)"
    version, file = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    libraries = Path(file).parent.parent / "lib"
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = _sources(python, version, Path(folder))
        objects = _compile(sources, Path(folder))
        links = [f"-L{libraries}", *(f"-l{name}" for name in LIBRARIES), "-lpthread", f"-Wl,-rpath,{libraries}"]
        _run(["c++", "-o", made, *objects, *links])
    return made


def _sources(python: Path, version: str, folder: Path) -> Path:
    fetch = ["download", "--no-binary", "llama-cpp-python", "--no-deps", f"llama-cpp-python=={version}"]
    _run([python, "-m", "pip", *fetch, "-d", folder])
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def _compile(sources: Path, folder: Path) -> list[Path]:
    empty = [f"-DUI_SOURCE_DIR={sources / 'tools/ui'}", f"-DUI_BINARY_DIR={folder}", f"-DLLAMA_SOURCE_DIR={sources}"]
    empty += [f"-D{name}=OFF" for name in ("HF_ENABLED", "BUILD_UI", "LLAMA_UI_GZIP")]
    _run(["cmake", *empty, "-P", sources / "scripts/ui-assets.cmake"])
    server = sources / "tools/server"
    files = [server / f"server-{name}.cpp" for name in SERVER] + [server / "server.cpp", server / "main.cpp"]
    headers = [f"-I{sources / part}" for part in HEADERS] + [f"-I{folder}"]
    objects = []
    for file in [sources / "vendor/cpp-httplib/httplib.cpp", *files, folder / "ui.cpp"]:
        objects.append(folder / f"{file.stem}.o")
        # The arithmetic is in the libraries.
        _run(["c++", "-std=c++17", "-O1", *headers, "-c", file, "-o", objects[-1]])
    return objects


def _run(command: Sequence[object]) -> None:
    print(" ".join(str(part) for part in command), file=sys.stderr)
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build llama.cpp's server in the cache.")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: weft-bench in the user's cache folder")
    print(build(cache_folder(parser.parse_args().cache)))


if __name__ == "__main__":
    main()
