"""The engine side of a contestant: JSON lines in and out. Runs in every peer's environment; needs nothing.

Questions:
  {"op": "run", "prompts": [[ids]], "output": n} -> {"seconds", "first", "last", "tokens": [[ids]]}
      Greedy, exactly n tokens for each prompt, all prompts submitted at once. Seconds since the question: `first` and
      `last` are the moments at which the first prompt's first and last token were known.
  {"op": "score", "tokens": [ids]} -> {"top": [ids], "logprobs": [...]}
      For each position but the last: the most probable next token, and the log-probability of the one that follows.
The first line out is {"ready": seconds of loading, "engine": name and version, "facts": what else the engine says of
itself, where it has any}. A question that fails answers {"error": ...}. End of input ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    name: str

    def run(self, prompts: list[list[int]], output: int) -> dict[str, Any]: ...

    def score(self, tokens: list[int]) -> dict[str, Any]: ...


def serve(open_engine: Callable[[], Engine]) -> None:
    """Load the engine, then answer questions until the input ends."""
    # Libraries print what they like to descriptor 1; the answers go to a copy that only this function has.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    start = time.perf_counter()
    engine = open_engine()
    facts = getattr(engine, "facts", {})
    say({"ready": time.perf_counter() - start, "engine": engine.name, "facts": facts})
    for line in sys.stdin:
        question = json.loads(line)
        operation = question.pop("op")
        try:
            say(engine.run(**question) if operation == "run" else engine.score(**question))
        except Exception as error:  # the benchmark decides what a failure means
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})
