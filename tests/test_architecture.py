"""The import rules and the banned calls, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import weft

SOURCE = Path(__file__).parent.parent / "src" / "weft"
MODULES = sorted(SOURCE.rglob("*.py"))
PACKAGES = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name not in {"assets", "__pycache__"}}

# Which packages of weft a package may import. `errors` and `config` are leaves that everybody may read.
LEAVES = {"errors", "config"}
ALLOWED = {
    "core": set(),
    "phases": {"core"},
    "text": {"core"},
    "ipc": {"core"},
    "kernels": {"core"},
    "weave": {"core", "kernels"},
    "comet": {"core", "kernels"},
    "models": {"core", "kernels", "comet", "weave"},
    "devices": {"core", "phases", "text", "kernels", "weave", "comet", "models"},
    "loop": {"core", "phases", "ipc", "text", "devices"},
    "server": {"core", "text", "ipc", "loop"},
    "bench": set(),
    "sim": {"core", "phases", "weave", "comet", "models", "devices", "loop", "bench"},
    "cli": PACKAGES,
}
# Packages that must run from a source tree on a bare GPU image.
BARE = {"core", "phases", "weave", "comet", "kernels", "models", "devices"}
BARE_LIBRARIES = {"torch", "numpy", "safetensors", "tokenizers", "triton", "flashinfer"}
TORCH_FREE = {"core", "phases", "text", "ipc", "server", "bench"}
BANNED_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system"}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [node.module or ""]
            found += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "weft"]
    return found


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def test_the_packages_are_the_ones_with_rules() -> None:
    assert set(ALLOWED) == PACKAGES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_rules(path: Path) -> None:
    package = package_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in BANNED_MODULES, f"{path} imports {name}"
        if not package:
            continue
        if top == "weft" and rest:
            target = rest.split(".")[0]
            allowed = ALLOWED[package] | {package} | LEAVES
            if target in PACKAGES:
                assert target in allowed, f"{path} imports {name}; {package} may import {sorted(allowed)}"
        elif package in BARE and top not in sys.stdlib_module_names and top != "weft":
            assert top in BARE_LIBRARIES, f"{path} imports {name}, which a bare GPU image may lack"
        if top == "torch":
            assert package not in TORCH_FREE, f"{path} imports torch"
        if package == "core" and top != "weft":
            assert top in sys.stdlib_module_names, f"{path} imports {name}; core is standard library only"


def test_server_reaches_the_loop_only_through_its_client() -> None:
    for path in (SOURCE / "server").glob("*.py"):
        for name in imports(path):
            if name.startswith("weft.loop"):
                assert name == "weft.loop.client", f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_banned_calls(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in BANNED_CALLS, f"{path}:{node.lineno}"


@pytest.mark.parametrize("module", ["weft", "weft.cli", "weft.server.app", "weft.server.run", "weft.loop.client"])
def test_the_front_end_never_imports_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_version_is_public() -> None:
    assert weft.__version__.count(".") == 2
