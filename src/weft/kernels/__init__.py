"""The one place where kernels are chosen. Importing it is cheap: no torch, and the extension only when asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft.errors import CheckpointError, DeviceError

if TYPE_CHECKING:
    from weft.kernels.base import Kernels

REFERENCE = "reference"
LEVELS = ("avx512", "avx2", "portable")  # of the C++ extension, best first
HEAD_STEP, HEAD_MOST = 8, 256  # channels of a head that the extension takes: multiples of one, up to the other


def _native() -> tuple[Any, str]:
    """(the extension, ""), or (None, why there is none)."""
    try:
        return importlib.import_module("weft._native"), ""
    except ModuleNotFoundError:
        return None, "it is not built"
    except ImportError as error:
        return None, f"it cannot be loaded: {error}"


def available() -> tuple[str, ...]:
    """The names that `open_kernels` accepts here, best first; "reference" is always the last."""
    native, _ = _native()
    return (*(native.levels() if native else ()), REFERENCE)


def resolve(name: str) -> tuple[str, str | None]:
    """(the backend that `name` stands for, what people should know about it). Raises DeviceError when there is none."""
    native, missing = _native()
    if name == REFERENCE:
        return name, "the reference kernels are for comparison, and slow"
    if native is None:
        if name == "auto":
            return REFERENCE, (
                f"running on the slow reference kernels, for the C++ extension has a problem: {missing}; "
                "install a C++20 compiler and run `pip install .` again"
            )
        raise DeviceError(f"--kernels {name} needs the C++ extension, but {missing}; what would work: auto, reference")
    here = tuple(native.levels())
    if name == "auto":
        return here[0], None
    if name in here:
        return name, None
    if name in LEVELS:
        raise DeviceError(
            f"--kernels {name}: this CPU cannot run that level; what would work: auto, {', '.join(available())}"
        )
    raise DeviceError(f"--kernels {name}: there is no such backend; what would work: auto, {', '.join(available())}")


def check_heads(name: str, head_dim: int) -> None:
    """Raises CheckpointError for a model whose heads the kernels do not take."""
    if name != REFERENCE and (head_dim % HEAD_STEP or head_dim > HEAD_MOST):
        raise CheckpointError(
            f"head_dim is {head_dim}; the {name} kernels take multiples of {HEAD_STEP} up to {HEAD_MOST}, and "
            f"--kernels {REFERENCE} of weft serve takes any, slowly"
        )


def open_kernels(name: str, cores: tuple[int, ...], *, exact_a4: bool = False) -> Kernels:
    """A backend for one lane on these cores. Raises DeviceError.

    exact_a4: quantised linears round activations to 4 bits outside of the outlier blocks; else, as a CPU has no 4-bit
    arithmetic, to 8 bits everywhere.

    The backend's own threads are pinned to cores[1:]; the thread that calls it does a share of the work, and whoever
    owns that thread pins it to cores[0].
    """
    chosen, _ = resolve(name)
    if chosen == REFERENCE:
        from weft.kernels.reference import ReferenceKernels

        return ReferenceKernels(cores)
    from weft.kernels.cpu import CpuKernels

    return CpuKernels(chosen, cores, exact_a4=exact_a4)
