"""Flags of other engines that weft has not, and what to write instead: for those who type them out of habit."""

from __future__ import annotations

LEAVE_OUT = "leave it out"
NO_TOOLS = f"weft does not call tools; {LEAVE_OUT}"
NO_TLS = "weft does not speak TLS; put a proxy before it"
# vLLM's, and why there is none.
WITHOUT = {
    "--trust-remote-code": f"weft runs no code that comes with a model; {LEAVE_OUT}",
    "--enforce-eager": f"weft has no such mode; {LEAVE_OUT}",
    "--quantization": f"the checkpoint says it, and weft quantize makes one in 4 bits; {LEAVE_OUT}",
    "--enable-chunked-prefill": f"prompts always come in chunks, of --max-num-batched-tokens; {LEAVE_OUT}",
    "--pipeline-parallel-size": "weft divides layers (--tensor-parallel-size), not their sequence",
    "--data-parallel-size": "start a server for each copy of the model, and balance between them",
    "--tokenizer": f"weft takes the one in the model's folder; {LEAVE_OUT}",
    "--download-dir": "the variable HF_HOME says where downloads go",
    "--swap-space": f"a sequence that is preempted is computed again, not stored; {LEAVE_OUT}",
    "--speculative-config": f"weft does not guess tokens ahead; {LEAVE_OUT}",
    "--enable-lora": f"weft has no adapters; {LEAVE_OUT}",
    "--enable-auto-tool-choice": NO_TOOLS,
    "--tool-call-parser": NO_TOOLS,
    "--reasoning-parser": f"weft sends reasoning as a part of the text; {LEAVE_OUT}",
    "--ssl-keyfile": NO_TLS,
    "--ssl-certfile": NO_TLS,
    "--disable-log-requests": "--log-level warning logs none",
    "--disable-log-stats": f"weft logs none, /metrics has them; {LEAVE_OUT}",
}
# vLLM's, SGLang's and llama.cpp's, and the name that weft has for them.
INSTEAD = {
    "--master-addr": "--dist-init-addr HOST:PORT",
    "--master-port": "--dist-init-addr HOST:PORT",
    "--model-path": "--model",
    "--context-length": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "--parallel": "--max-num-seqs",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--alias": "--served-model-name",
    "--threads": "--cores",
}


def advice(flag: str) -> str | None:
    """What to do instead of giving this flag, where it is one that another engine has."""
    if flag in INSTEAD:
        return f"here it is {INSTEAD[flag]}"
    return WITHOUT.get(flag)
