"""The `weft` command: finds the subcommand, runs it, and turns errors into one clear message and an exit code.

Exit codes: 0 well, 1 failed, 2 wrong usage, 130 interrupted. Nothing heavy is imported before a subcommand needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import weft
from weft.errors import ConfigError, WeftError

COMMANDS = {
    "serve": "serve a model over an OpenAI-compatible HTTP API",
    "chat": "talk to a model in the terminal, in this process or on a server",
    "bench": "measure a running server, or this machine's kernels",
    "simulate": "serve traffic on simulated GPUs in virtual time, from one to a fleet",
    "plan": "find the cheapest simulated fleet that meets latency targets",
    "quantize": "make a 4-bit checkpoint from a model",
    "doctor": "tell what this machine can do and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `weft ARGUMENTS`; argv defaults to the process's own. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "help", ""):
        print(usage(), file=sys.stdout if first else sys.stderr)
        return 0 if first else 2
    if first in ("-V", "--version", "version"):
        print(f"weft {weft.__version__}")
        return 0
    return run(first, arguments[1:])


def run(command: str, arguments: Sequence[str]) -> int:
    try:
        if command not in COMMANDS:
            from weft.cli.flags import nearest

            raise ConfigError(f"unknown command {command}{nearest(command, COMMANDS)}\nweft --help lists the commands")
        code: int = importlib.import_module(f"weft.cli.{command}").main(arguments)
        sys.stdout.flush()
        return code
    except WeftError as error:
        name = f"weft {command}" if command in COMMANDS else "weft"
        print(f"{name}: " + "\n  ".join(error.message.splitlines()), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that is full, a file that may not be read
        where = f"{error.filename}: " if error.filename else ""
        print(f"weft {command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def usage() -> str:
    rows = [f"  {name:8} {words}" for name, words in COMMANDS.items()]
    return "\n".join(
        [
            "usage: weft COMMAND [ARGUMENTS]",
            "",
            "An LLM serving engine.",
            "",
            *rows,
            "",
            "weft COMMAND --help lists the flags of a command; weft --version prints the version.",
        ]
    )
