"""A BF16 GGUF file in one of llama.cpp's own types, by llama.cpp itself: quantise_gguf.py FILE OUT q4_0|q8_0.

As its own tool does by default: the output layer of a q4_0 file is Q6_K, where the shape allows that.
"""

from __future__ import annotations

import sys

import llama_cpp

TYPES = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def main(source: str, out: str, kind: str) -> None:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), params)
    if status != 0:
        raise SystemExit(f"llama_model_quantize answers {status} for {source}")


if __name__ == "__main__":
    main(*sys.argv[1:])
