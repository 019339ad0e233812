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
    if engine.node_rank:
        return _node(engine, server)
    from weft.server.run import serve  # the server is not needed to say what is wrong with a flag

    code: int = serve(engine, server)
    return code


def _node(engine: EngineConfig, server: ServerConfig) -> int:
    """Ranks for another host, which has the front end."""
    import signal

    from weft import log
    from weft.loop.nodes import serve_node
    from weft.text.hub import resolve_model

    log.set_up(server.log_level)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve_node(engine, resolve_model(engine.model, engine.revision))
    except KeyboardInterrupt:  # its ranks have ended, and host 0 says so
        return 1
    return 0
