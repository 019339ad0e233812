"""Which kernels a name stands for, and what is said where they cannot be had."""

from __future__ import annotations

import subprocess
import sys

import pytest

import weft.kernels
from weft.errors import DeviceError
from weft.kernels import LEVELS, REFERENCE, available, open_kernels, resolve


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weft._native", None)


def test_importing_the_choice_brings_neither_torch_nor_the_extension() -> None:
    code = "import sys, weft.kernels; print([m for m in ('torch', 'numpy', 'weft._native') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_available_ends_in_the_reference_and_is_ordered(best_level: str) -> None:
    names = available()
    assert names[0] == best_level and names[-1] == REFERENCE
    assert list(names[:-1]) == [name for name in LEVELS if name in names]
    assert "portable" in names


def test_auto_is_the_best_level_without_a_note(best_level: str) -> None:
    assert resolve("auto") == (best_level, None)
    assert resolve(best_level) == (best_level, None)


def test_every_available_name_opens() -> None:
    for name in available():
        kernels = open_kernels(name, (0,))
        assert kernels.name == name
        kernels.close()


def test_without_the_extension_auto_is_the_reference_and_says_what_to_do(no_extension: None) -> None:
    name, note = resolve("auto")
    assert name == REFERENCE and note is not None
    for said in ("slow", "not built", "compiler", "pip install"):
        assert said in note
    assert available() == (REFERENCE,)


def test_without_the_extension_a_level_is_refused(no_extension: None) -> None:
    with pytest.raises(DeviceError, match=r"avx2.*not built.*auto, reference"):
        open_kernels("avx2", (0,))


def test_an_extension_that_cannot_be_loaded_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libstdc++.so.6: version GLIBCXX_9 not found")

    monkeypatch.setattr(weft.kernels.importlib, "import_module", broken)
    _, note = resolve("auto")
    assert note is not None and "cannot be loaded" in note and "GLIBCXX_9" in note


def test_a_level_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCpu:
        @staticmethod
        def levels() -> list[str]:
            return ["portable"]

    monkeypatch.setattr(weft.kernels, "_native", lambda: (OldCpu, ""))
    assert resolve("auto") == ("portable", None)
    with pytest.raises(DeviceError, match=r"avx512.*this CPU cannot.*portable, reference"):
        open_kernels("avx512", (0,))
    with pytest.raises(DeviceError, match="no such backend"):
        open_kernels("cuda", (0,))


def test_the_extension_refuses_a_level_that_it_cannot_run(best_level: str) -> None:
    from weft import _native

    with pytest.raises(ValueError, match="level sse9"):
        _native.Backend("sse9", [0])
