"""weft: an LLM serving engine. `from weft import LLM, SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.core.sampling import SamplingParams as SamplingParams
    from weft.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing weft must not import torch: the front end and `weft --help` never need it.
    if name == "LLM":
        from weft.llm import LLM

        return LLM
    if name == "SamplingParams":
        from weft.core.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'weft' has no attribute {name!r}")
