"""`weft doctor`: what this machine can do for weft, and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import weft
from weft.cli.flags import Parser
from weft.config import ServerConfig
from weft.errors import ConfigError, WeftError

SIMD = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "asimd", "sve")
NEEDED = (
    *("torch", "numpy", "safetensors", "tokenizers", "huggingface-hub", "jinja2", "msgspec", "pyzmq"),
    *("fastapi", "uvicorn", "prometheus-client", "rich", "pyyaml"),
)
OPTIONAL = {
    "matplotlib": "pictures (--plot); pip install 'weft[plot]'",
    "ray": "ranks that a Ray cluster starts; pip install 'weft[ray]'",
    "transformers": "the tests and the baselines of benchmarks/; pip install 'weft[test]'",
}
OPEN_FILES = 4096
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """state: ok, note (works, but better could be had) or missing (something will not work). advice: what to do."""

    topic: str
    item: str
    value: str
    state: str = "ok"
    advice: str = ""


def main(arguments: Sequence[str]) -> int:
    parser = Parser("weft doctor", "Tell what this machine can do for weft, and what is missing.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--phases", type=Path, metavar="FILE", help="instead: latency models from what --partition-record has written"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --phases: prediction against observation")
    namespace = parser.read(arguments)
    if namespace.phases is not None:
        return _phases(namespace.phases, namespace.plot, namespace.json)
    if namespace.plot is not None:
        raise ConfigError("--plot draws what --phases FILE has; without that there is nothing to draw")
    findings = list(examine())
    if namespace.json:
        print(json.dumps({"weft": weft.__version__, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(table(findings))
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def _phases(path: Path, plot: Path | None, as_json: bool) -> int:
    from weft.cli.doctor_phases import report

    content, text = report(path, plot)
    print(json.dumps(content, indent=2) if as_json else text)
    return 0 if content["replay_is_the_same"] else 1


def examine() -> Iterator[Finding]:
    """Every finding; a part of the machine that cannot be read is a finding too."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (machine, memory, gpu, kernels, packages, model, server)
    for part in parts:
        try:
            yield from part()
        except OSError as error:
            yield Finding(part.__name__, "cannot be read", str(error), "note")


def machine() -> Iterator[Finding]:
    yield Finding("machine", "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    text = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    yield Finding("machine", "CPU", name[1] if name else platform.processor() or "unknown")
    usable, every = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    yield Finding("machine", "cores", f"{usable} usable of {every}")
    if usable < 2:
        yield Finding("machine", "lanes", "one core", "note", "--partition P:D and pd:P:D need two cores")
    line = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    flags = line[1].split() if line else []
    found = [level for level in SIMD if level in flags]
    yield Finding("machine", "SIMD", " ".join(found) or "none known", "ok" if found else "note")


def memory() -> Iterator[Finding]:
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M)}
    total, free = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    yield Finding("memory", "RAM", f"{free / GIB:.1f} GiB available of {total / GIB:.1f} GiB")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal():
        yield Finding("memory", "container limit", f"{int(limit) / GIB:.1f} GiB")
    huge = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    mode = huge[1] if huge else "not offered"
    advice = "" if mode in ("always", "madvise") else "weights and KV stay on small pages, which read more slowly"
    yield Finding("memory", "huge pages", mode, "note" if advice else "ok", advice)


def gpu() -> Iterator[Finding]:
    driver = re.search(r"Module\s+([\d.]+)", _read("/proc/driver/nvidia/version"))
    if driver:
        yield Finding("GPU", "NVIDIA driver", driver[1], advice="weft computes on the GPU with --device cuda only")
    else:
        yield Finding("GPU", "NVIDIA driver", "none; weft computes on the CPU")


def kernels() -> Iterator[Finding]:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    try:
        importlib.import_module("weft._native")
        yield Finding("kernels", "C++ extension", "built")
    except ImportError as error:
        built = any(Path(weft.__file__).parent.glob("_native*"))
        why = f"cannot be loaded: {error}" if built else "not built; the slow reference kernels are used"
        first = "" if compiler else "install a C++ compiler, then "
        advice = f"{first}reinstall weft in its source folder: pip install --force-reinstall --no-deps ."
        yield Finding("kernels", "C++ extension", why, "note", advice)
    advice = "" if compiler else "needed only to build the extension, e.g. apt install g++"
    yield Finding("kernels", "C++ compiler", compiler or "none", "ok" if compiler else "note", advice)


def packages() -> Iterator[Finding]:
    yield Finding("software", "Python", platform.python_version())
    for name in NEEDED:
        version = _version(name)
        if version is None:
            yield Finding("software", name, "not installed", "missing", f"pip install {name}")
        else:
            yield Finding("software", name, version)
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        advice = "" if version else f"needed only for {purpose}"
        yield Finding("software", name, version or "not installed", "ok" if version else "note", advice)


def model() -> Iterator[Finding]:
    from weft.text.hub import resolve_model
    from weft.text.tokenizer import Tokenizer

    try:
        folder = resolve_model("builtin")
        size = sum(path.stat().st_size for path in folder.iterdir())
        tokens = Tokenizer.from_folder(folder).vocabulary
        yield Finding("model", "builtin", f"{size / 2**20:.1f} MiB, {tokens} tokens in its vocabulary")
    except WeftError as error:
        yield Finding("model", "builtin", str(error), "missing", "reinstall weft")


def server() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < OPEN_FILES
    advice = f"each client takes one; ulimit -n {OPEN_FILES}" if few else ""
    yield Finding("server", "open files", str(files), "note" if few else "ok", advice)
    address = (ServerConfig().host, ServerConfig().port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            yield Finding("server", f"port {address[1]}", "free")
        except OSError as error:
            advice = "another server runs there; weft serve --port takes another"
            yield Finding("server", f"port {address[1]}", error.strerror or str(error), "note", advice)


def table(findings: Sequence[Finding]) -> str:
    """One line a finding, the topic on its first; advice on a line of its own."""
    marks = {"ok": " ", "note": "-", "missing": "!"}
    width = max(len(finding.item) for finding in findings)
    lines, topic = [f"weft {weft.__version__}, Python {sys.executable}"], ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            lines += ["", topic]
        lines.append(f" {marks[finding.state]} {finding.item:{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"   {'':{width}}  {finding.advice}")
    missing = [finding.item for finding in findings if finding.state == "missing"]
    lines += ["", f"missing: {', '.join(missing)}" if missing else "nothing that weft needs is missing"]
    return "\n".join(lines)


def _read(path: str) -> str:
    """A file of the kernel's; empty where this kernel has none."""
    file = Path(path)
    return file.read_text() if file.is_file() else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
