"""The offline API: a model in this process, prompts in, texts out.

with LLM("builtin") as llm:
    print(llm.generate("import os\\n")[0].text)
"""

from __future__ import annotations

import difflib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from weft.config import BUILTIN_MODEL, EngineConfig
from weft.core.request import Request, RequestEnd, TokenOutput
from weft.core.sampling import SamplingParams
from weft.errors import ConfigError, InvalidRequest, QueueFull, Unavailable, WeftError
from weft.jobs import Completion, Job, Output, continuations
from weft.text.chat import ChatTemplate, missing_template
from weft.text.generation import GenerationDefaults
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from weft.loop.engine import Engine

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]

__all__ = ["LLM", "Completion", "Output", "SamplingParams"]


class LLM:
    """A model, its tokenizer and an engine in this process. Close it, or use it as a context manager.

    model: 'builtin', a Hugging Face folder or a hub id. settings: fields of EngineConfig, such as max_num_seqs=16.
    chat_template: file with a template to use instead of the checkpoint's.
    Raises ConfigError, CheckpointError or DeviceError when it cannot be set up.
    """

    def __init__(
        self, model: str | Path = BUILTIN_MODEL, *, chat_template: str | Path | None = None, **settings: Any
    ) -> None:
        config = _engine_config(str(model) if isinstance(model, Path) else model, settings)
        folder = resolve_model(config.model, config.revision)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.defaults = GenerationDefaults.from_folder(folder, self.tokenizer.eos_ids)
        self._template = (
            ChatTemplate.from_folder(folder)
            if chat_template is None
            else ChatTemplate.from_file(Path(chat_template), folder)
        )
        self._numbers = itertools.count()
        from weft.loop.build import open_engine  # torch comes with it

        engine, self.info = open_engine(config, lambda _: None)
        self._engine: Engine | None = engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Output]:
        """Continue each prompt (text or token ids); the outputs are in the order of the prompts.

        params: for all prompts, or one for each; None takes the checkpoint's sampling defaults.
        progress: show a bar with tokens/s on a terminal. Raises InvalidRequest for what cannot be honoured.
        """
        listed = _prompts(prompts)
        jobs = [
            self._job(f"prompts[{i}]", prompt, given)
            for i, (prompt, given) in enumerate(zip(listed, self._params(params, len(listed)), strict=True))
        ]
        return self._run(jobs, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[Output]:
        """Answer a conversation, a list of {"role", "content"}, or several; otherwise as `generate`.

        continue_final_message: go on in the last message instead of beginning a new one. variables: for the chat
        template, such as enable_thinking=False. Without params, an answer may fill the context.
        """
        single = not messages or isinstance(messages[0], Mapping)
        talks: list[Conversation] = [messages] if single else list(messages)  # type: ignore[list-item, arg-type]
        given = self._params(params, len(talks), max_tokens=None)
        jobs = [
            self._talk(talk, one, variables, go_on=continue_final_message)
            for talk, one in zip(talks, given, strict=True)
        ]
        return self._run(jobs, progress)

    def stream_chat(
        self, messages: Conversation, params: SamplingParams | None = None, **variables: Any
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece; close the iterator to stop it."""
        job = self._talk(messages, self._params(params, 1, max_tokens=None)[0], variables)
        for _ in self._drive([job]):
            yield from job.sequences[0].take()
        if job.error is not None:
            raise WeftError(job.error)

    def close(self) -> None:
        """Free the model; idempotent."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int, **defaults: Any
    ) -> list[SamplingParams]:
        if params is None:
            return [self.defaults.params(**defaults)] * count
        given = [params] * count if isinstance(params, SamplingParams) else list(params)
        for one in given:
            if not isinstance(one, SamplingParams):
                raise InvalidRequest(f"params holds {one!r}; it must be SamplingParams, or a list of them")
            one.validate(self.info.vocabulary)
        if len(given) != count:
            raise InvalidRequest(f"params has {len(given)} entries for {count} prompts; give one, or one for each")
        return given

    def _talk(
        self, messages: Conversation, params: SamplingParams, variables: Mapping[str, Any], go_on: bool = False
    ) -> Job:
        if self._template is None:
            raise missing_template()
        text = self._template.render(messages, continue_final_message=go_on, **variables)
        # The template has written the special tokens; an answer begins a text of its own, so the prompt is no context.
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Job(self._request(ids, params), text, continuations(self.tokenizer, params, ids if go_on else ()))

    def _job(self, where: str, prompt: Prompt, params: SamplingParams) -> Job:
        text = prompt if isinstance(prompt, str) else None
        if text is None and not isinstance(prompt, Sequence):
            raise InvalidRequest(f"{where} is {prompt!r}; it must be a text or a list of token ids", param="prompts")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InvalidRequest(f"{where} is empty; give a text or at least one token id", param="prompts")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.info.vocabulary:
                raise InvalidRequest(
                    f"{where} holds {token!r}; token ids are numbers from 0 to {self.info.vocabulary - 1}",
                    param="prompts",
                )
        return Job(self._request(ids, params), text, continuations(self.tokenizer, params, ids))

    def _request(self, ids: Sequence[int], params: SamplingParams) -> Request:
        return Request(f"offline-{next(self._numbers)}", tuple(ids), params, eos=self.defaults.eos_ids)

    def _run(self, jobs: Sequence[Job], progress: bool) -> list[Output]:
        from weft.progress import Bar  # rich is slow to import

        began = time.monotonic()
        with Bar(len(jobs), progress) as bar:
            for finished, tokens in self._drive(jobs):
                rate = tokens / max(time.monotonic() - began, 1e-9)
                bar.show(finished, f"{finished}/{len(jobs)} {tokens} tokens, {rate:.1f} tokens/s")
        return [job.output() for job in jobs]

    def _drive(self, jobs: Sequence[Job]) -> Iterator[tuple[int, int]]:
        """Run the jobs; yields (finished jobs, tokens so far) after every round. Closing it aborts what is left."""
        if self._engine is None:
            raise Unavailable("this LLM is closed")
        waiting = deque(jobs)
        running: dict[str, Job] = {}
        finished = tokens = 0
        try:
            while waiting or running:
                _submit(self._engine, waiting, running)
                for event in self._engine.step(None):
                    tokens += isinstance(event, TokenOutput)
                    job = running[event.request]
                    stopped = job.apply(event)
                    if stopped is not None:
                        self._engine.stop(event.request, stopped)
                    if isinstance(event, RequestEnd):
                        del running[event.request]
                        finished += 1
                yield finished, tokens
        finally:
            for name in running:
                self._engine.abort(name)
            while running:
                for event in self._engine.step(None):
                    if isinstance(event, RequestEnd):
                        running.pop(event.request, None)


def _submit(engine: Engine, waiting: deque[Job], running: dict[str, Job]) -> None:
    """Hand over as many jobs as the engine's queue takes."""
    while waiting:
        try:
            engine.submit(waiting[0].request)
        except QueueFull:
            if not running:
                raise
            return
        job = waiting.popleft()
        running[job.request.id] = job


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequest(f"prompts is {prompts!r}; it must be a text, token ids, or a list of them")
    if prompts and all(isinstance(entry, int) for entry in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _engine_config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    known = [spec.name for spec in fields(EngineConfig)]
    problems = []
    for name in settings.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise ConfigError("\n".join(sorted(problems)))
    config = EngineConfig(model=model, **settings)
    config.validate()
    return config
