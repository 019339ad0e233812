"""Models in the forms that peers want, made by the peers' own tools and kept in the cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TOOLS = Path(__file__).resolve().parent / "peers"


def gguf(folder: Path, python: Path, cache: Path, kind: str | None = None) -> Path:
    """The model of `folder` as a GGUF file: BF16, or of `kind` q4_0 or q8_0. python: llama.cpp's interpreter."""
    plain = cache / "models" / f"{folder.name}.gguf"
    source = _newest(folder)
    _make(plain, source, lambda part: _run(python, TOOLS / "to_gguf.py", folder, part))
    if kind is None:
        return plain
    out = plain.with_name(f"{folder.name}-{kind}.gguf")
    _make(out, plain.stat().st_mtime, lambda part: _run(python, TOOLS / "quantise_gguf.py", plain, part, kind))
    return out


def gguf_with_words(folder: Path, python: Path, cache: Path, kind: str | None = None) -> Path:
    """The same with a vocabulary of made-up words, for llama.cpp's server."""
    plain = gguf(folder, python, cache, kind)
    out = plain.with_name(f"{plain.stem}-words.gguf")
    _make(out, plain.stat().st_mtime, lambda part: _run(python, TOOLS / "gguf_words.py", plain, part))
    return out


def openvino(folder: Path, python: Path, cache: Path) -> Path:
    """The model of `folder` as OpenVINO's, weights in INT4 with groups of 128 (embedding and output layer in INT8)."""
    out = cache / "models" / f"{folder.name}-openvino-int4"
    tool = python.with_name("optimum-cli")
    options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "128"]
    _make(out, _newest(folder), lambda part: _run(tool, "export", "openvino", "-m", folder, *options, part))
    return out


def _newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in folder.glob("*") if path.suffix in (".safetensors", ".json"))


def _make(out: Path, newest: float, make: Callable[[Path], None]) -> None:
    """Make `out`, a file or a folder, unless it is there and as new as what it is made of."""
    if out.exists() and out.stat().st_mtime >= newest:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    for old in (part, out):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    make(part)
    part.replace(out)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
