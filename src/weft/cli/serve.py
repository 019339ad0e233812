"""`weft serve`: settings, then the server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from weft.cli.flags import Parser, add_settings, load
from weft.config import EngineConfig, ServerConfig

EPILOG = (
    "Every flag can also be given as a variable (--max-num-seqs as WEFT_MAX_NUM_SEQS; several values separated by "
    "commas) and as a line of the --config file (max_num_seqs: 32). Flags win over variables, and these over the file."
)


def main(arguments: Sequence[str]) -> int:
    parser = Parser("weft serve", "Serve a model over an OpenAI-compatible HTTP API.", EPILOG)
    add_settings(parser, (EngineConfig, ServerConfig))
    loaded = load((EngineConfig, ServerConfig), parser.read(arguments), os.environ)
    if loaded.given:
        print(f"settings: {loaded.summary()}", file=sys.stderr)
    engine, server = loaded.configs
    from weft.server.run import serve  # the server is not needed to say what is wrong with a flag

    code: int = serve(engine, server)
    return code
