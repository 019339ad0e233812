"""`weft bench NAME`: the measuring tools, each with flags of its own."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from weft.cli.flags import Parser, nearest
from weft.errors import ConfigError

BENCHES = {
    "serve": "drive an OpenAI-compatible server with a load, and report its latencies",
    "kernels": "time the kernels of a model on this machine, by shape and by share of the device",
}
MODULES = {"serve": "weft.bench.serve", "kernels": "weft.cli.bench_kernels"}


def main(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print("usage: weft bench NAME [ARGUMENTS]\n")
        print(*(f"  {bench:8} {words}" for bench, words in BENCHES.items()), sep="\n")
        return 0
    if name not in BENCHES:
        raise ConfigError(
            f"unknown benchmark {name or '(none given)'}{nearest(name, BENCHES)}\nthere are: {', '.join(BENCHES)}"
        )
    module = importlib.import_module(MODULES[name])
    parser = Parser(f"weft bench {name}", BENCHES[name].capitalize() + ".")
    module.add_arguments(parser)
    code: int = module.run(parser.read(arguments[1:]))
    return code
