"""The offline API over an engine that recites known texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from weft import LLM, SamplingParams
from weft.config import EngineConfig
from weft.core.plan import TokenScore
from weft.core.request import Event, Finish, PromptScores, Request, RequestEnd, Timing, TokenOutput
from weft.errors import CheckpointError, ConfigError, InvalidRequest, QueueFull, Unavailable, WeftError
from weft.text.hub import resolve_model
from weft.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(resolve_model("builtin"))
EOS = TOKENIZER.eos_ids[0]
TEXT = "one two three four 日本語 five six"


@dataclass
class Reciter:
    """An engine as the contract has it, one token of every sequence a step: sequence i recites `say(prompt, i)`."""

    say: Callable[[str, int], str] = lambda prompt, index: TEXT
    tokenizer: Tokenizer = TOKENIZER
    room: int = 1000
    broken: str | None = None
    live: dict[str, Request] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    stopped: list[tuple[str, int]] = field(default_factory=list)
    spoken: dict[str, int] = field(default_factory=dict)
    most: int = 0
    closed: int = 0

    def submit(self, request: Request) -> None:
        if len(self.live) >= self.room:
            raise QueueFull("full")
        self.live[request.id] = request
        self.spoken[request.id] = 0
        self.most = max(self.most, len(self.live))

    def abort(self, request_id: str) -> None:
        if request_id in self.live:
            self.aborted.append(request_id)

    def stop(self, request_id: str, index: int) -> None:
        if request_id in self.live:
            self.stopped.append((request_id, index))

    def step(self, timeout: float | None) -> list[Event]:
        events: list[Event] = []
        for name, request in list(self.live.items()):
            if name in self.aborted or self.broken:
                reason = Finish.ABORT if name in self.aborted else Finish.ERROR
                events.append(self.end(request, reason))
            else:
                events += self.speak(request)
        return events

    def speak(self, request: Request) -> Iterator[Event]:
        position = self.spoken[request.id]
        self.spoken[request.id] += 1
        prompt, params = self.tokenizer.decode(request.prompt), request.params
        if position == 0 and params.prompt_logprobs is not None:
            yield PromptScores(request.id, tuple(TokenScore(token, -1.0, 1) for token in request.prompt[1:]))
        open_sequences = 0
        for index in range(params.n):
            tokens = [*self.tokenizer.encode(self.say(prompt, index), add_special_tokens=False), *request.eos[:1]]
            limit = min(len(tokens), params.max_tokens or len(tokens))
            if position < limit and (request.id, index) not in self.stopped:
                token, last = tokens[position], position + 1 == limit
                finish = (Finish.STOP if token in request.eos else Finish.LENGTH) if last else None
                score = None if params.logprobs is None else TokenScore(token, -0.5, 1)
                stop = token if finish is Finish.STOP else None
                yield TokenOutput(request.id, index, token, score, finish, stop)
                open_sequences += not last
        if not open_sequences:
            yield self.end(request, Finish.STOP)

    def end(self, request: Request, reason: Finish) -> RequestEnd:
        del self.live[request.id]
        return RequestEnd(request.id, reason, len(request.prompt), 3, 0, Timing(0.0), error=self.broken)

    def close(self) -> None:
        self.closed += 1


def vocabulary() -> SimpleNamespace:
    return SimpleNamespace(vocabulary=TOKENIZER.vocabulary, model="builtin", device="reciter", dtype="text")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Reciter:
    reciter = Reciter()
    module = ModuleType("weft.loop.build")

    def open_engine(config: EngineConfig, progress: Callable[[str], None]) -> tuple[Reciter, SimpleNamespace]:
        progress("reciting")
        return reciter, vocabulary()

    module.open_engine = open_engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weft.loop.build", module)
    return reciter


@pytest.fixture
def llm(engine: Reciter) -> Iterator[LLM]:
    with LLM("builtin", max_num_seqs=4) as opened:
        yield opened
    assert not engine.live


MANY = SamplingParams(max_tokens=None)


def test_texts_come_in_the_order_of_the_prompts(llm: LLM, engine: Reciter) -> None:
    engine.say = lambda prompt, index: prompt.upper() * len(prompt)
    outputs = llm.generate(["long prompt", "b", "cc"], MANY)
    assert [output.text for output in outputs] == ["LONG PROMPT" * 11, "B", "CCCC"]
    assert [output.prompt for output in outputs] == ["long prompt", "b", "cc"]
    for output in outputs:
        assert output.finish_reason == "stop" and output.outputs[0].stop_reason is None
        assert output.token_ids == (*TOKENIZER.encode(output.text, add_special_tokens=False), EOS)
        assert output.prompt_token_ids == tuple(TOKENIZER.encode(output.prompt or ""))
        assert output.logprobs is None and output.prompt_logprobs is None and output.cached_tokens == 3


def test_one_prompt_as_text_or_as_ids(llm: LLM) -> None:
    ids = TOKENIZER.encode("one")
    for prompts in ("one", ids, ["one"], [ids]):
        (output,) = llm.generate(prompts, MANY)
        assert output.text == TEXT and output.prompt_token_ids == tuple(ids)
        assert output.prompt == ("one" if isinstance(prompts, str) or prompts == ["one"] else None)


def test_length_ends_a_text_without_half_characters(llm: LLM) -> None:
    tokens = TOKENIZER.encode(TEXT, add_special_tokens=False)
    for size in range(1, len(tokens) + 1):
        (output,) = llm.generate("x", SamplingParams(max_tokens=size))
        assert output.finish_reason == "length"
        assert output.text == TOKENIZER.decode(tokens[:size])


def test_a_stop_string_ends_the_request_in_the_engine(llm: LLM, engine: Reciter) -> None:
    (output,) = llm.generate("x", SamplingParams(max_tokens=None, stop=("ee fo", "six")))
    assert output.text == "one two thr"
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", "ee fo")
    assert TOKENIZER.decode(output.token_ids).startswith("one two three fo")
    assert len(engine.stopped) == 1 and not engine.aborted and not engine.live
    (output,) = llm.generate("x", SamplingParams(max_tokens=None, stop=("ee fo",), include_stop_str_in_output=True))
    assert output.text == "one two three fo"


def test_a_stop_string_in_the_last_token_is_a_stop(llm: LLM) -> None:
    tokens = TOKENIZER.encode("one two", add_special_tokens=False)
    (output,) = llm.generate("x", SamplingParams(max_tokens=len(tokens), stop=("two",)))
    assert (output.text, output.finish_reason) == ("one ", "stop")


def test_n_sequences_stop_one_by_one(llm: LLM, engine: Reciter) -> None:
    engine.say = lambda prompt, index: ("a b c d e", "stop here and go on for a while", "short")[index]
    (output,) = llm.generate("x", SamplingParams(max_tokens=None, n=3, stop=("here",)))
    assert [(one.index, one.text, one.finish_reason) for one in output.outputs] == [
        (0, "a b c d e", "stop"),
        (1, "stop ", "stop"),
        (2, "short", "stop"),
    ]
    assert [one.stop_reason for one in output.outputs] == [None, "here", None]
    assert TOKENIZER.decode(output.outputs[1].token_ids) == "stop here"


def test_logprobs(llm: LLM) -> None:
    (output,) = llm.generate("one two", SamplingParams(max_tokens=3, logprobs=0, prompt_logprobs=0))
    assert output.logprobs is not None and output.prompt_logprobs is not None
    assert tuple(score.token for score in output.logprobs) == output.token_ids
    assert tuple(score.token for score in output.prompt_logprobs) == output.prompt_token_ids[1:]


def test_params_for_each_prompt(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [len(output.token_ids) for output in outputs] == [1, 2]
    assert len(llm.generate("a")[0].token_ids) == SamplingParams().max_tokens


def test_more_prompts_than_the_queue_takes(llm: LLM, engine: Reciter) -> None:
    engine.room = 3
    outputs = llm.generate([str(number) for number in range(20)], MANY)
    assert [output.text for output in outputs] == [TEXT] * 20
    assert engine.most == 3
    engine.room = 0
    with pytest.raises(QueueFull):
        llm.generate("x")


def test_an_error_is_the_outputs_own(llm: LLM, engine: Reciter) -> None:
    engine.broken = "NaN in the logits"
    (output,) = llm.generate("x")
    assert (output.finish_reason, output.error, output.text) == ("error", "NaN in the logits", "")
    with pytest.raises(WeftError, match="NaN"):
        list(llm.stream_chat([{"role": "user", "content": "x"}]))


def test_chat_renders_the_template_and_fills_the_context(llm: LLM, engine: Reciter) -> None:
    engine.say = lambda prompt, index: prompt
    talk = [{"role": "user", "content": "def f():"}]
    (output,) = llm.chat(talk)
    assert output.prompt is not None and "def f():" in output.prompt
    assert output.prompt_token_ids == tuple(TOKENIZER.encode(output.prompt, add_special_tokens=False))
    assert len(output.token_ids) > 1 and output.finish_reason == "stop"
    assert [one.prompt for one in llm.chat([talk, talk], MANY)] == [output.prompt] * 2
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        llm.chat(talk, chat_template="x")
    with pytest.raises(InvalidRequest, match="0 entries"):
        llm.chat([])


def test_a_template_of_the_users(engine: Reciter, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("<{{ messages[0].content }}>")
    with LLM("builtin", chat_template=path) as llm:
        assert llm.chat([{"role": "user", "content": "hi"}], MANY)[0].prompt == "<hi>"
        llm._template = None
        with pytest.raises(InvalidRequest, match="--chat-template"):
            llm.chat([{"role": "user", "content": "hi"}])


def test_a_streamed_answer_can_be_stopped(llm: LLM, engine: Reciter) -> None:
    talk = [{"role": "user", "content": "x"}]
    assert "".join(llm.stream_chat(talk)) == TEXT
    stream = llm.stream_chat(talk)
    assert TEXT.startswith(next(stream))
    assert len(engine.live) == 1
    stream.close()  # type: ignore[attr-defined]
    assert not engine.live and len(engine.aborted) == 1


def test_an_exception_leaves_nothing_behind(llm: LLM, engine: Reciter) -> None:
    def fail(prompt: str, index: int) -> str:
        if "b" in prompt:
            raise RuntimeError("the engine is torn")
        return TEXT

    engine.say = fail
    with pytest.raises(RuntimeError, match="torn"):
        llm.generate(["a", "b"], MANY)
    assert not engine.live
    assert llm.generate("a", MANY)[0].text == TEXT


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([[]], None, r"prompts\[0\] is empty"),
        (["a", [1, 10**9]], None, r"prompts\[1\] holds 1000000000; token ids are numbers from 0 to 4095"),
        ([[True]], None, "holds True"),
        ("a", SamplingParams(temperature=float("nan")), "temperature"),
        (["a", "b"], [SamplingParams()], "params has 1 entries for 2 prompts"),
        ("a", {"max_tokens": 5}, "params holds 'max_tokens'; it must be SamplingParams"),
        (5, None, "prompts is 5; it must be a text"),
        (["a", None], None, r"prompts\[1\] is None; it must be a text"),
        ("a", SamplingParams(max_tokens="5"), "max_tokens is '5'; it must be a whole number"),  # type: ignore[arg-type]
        ("a", SamplingParams(stop="ab"), "stop is 'ab'; it must be a tuple of texts"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_honoured(llm: LLM, engine: Reciter, prompts: object, params: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.generate(prompts, params)  # type: ignore[arg-type]
    assert engine.most == 0


def test_a_text_goes_on_from_its_prompt_and_an_answer_begins(engine: Reciter, tmp_path: Path) -> None:
    words = Backend(models.WordLevel({"▁one": 0, "▁two": 1, "</s>": 2}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    engine.say = lambda prompt, index: "two one"
    with LLM(tmp_path) as llm:
        engine.tokenizer = llm.tokenizer
        assert llm.generate("one", MANY)[0].text == " two one"
        talk = [{"role": "user", "content": "one"}]
        assert llm.chat(talk, MANY)[0].text == "two one"
        assert llm.chat(talk, MANY, continue_final_message=True)[0].text == " two one"


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'max_num_seq'; did you mean 'max_num_seqs'") as caught:
        LLM("builtin", max_num_seq=4, zzz=1)
    assert "unknown setting 'zzz'" in caught.value.message
    with pytest.raises(ConfigError, match="--block-size is 7"):
        LLM("builtin", block_size=7)
    with pytest.raises(ConfigError) as caught:
        LLM("builtin", max_num_seqs="4", exact_a4=1, slo_ttft=1, cores=3)
    assert caught.value.message.splitlines() == [
        "--max-num-seqs is '4'; it must be of type int",
        "--cores is 3; it must be of type str or None",
        "--exact-a4 is 1; it must be of type bool",
    ]
    with pytest.raises(CheckpointError, match="did you mean builtin"):
        LLM("buildin")


def test_close_is_for_ever(engine: Reciter) -> None:
    llm = LLM()
    llm.close()
    llm.close()
    assert engine.closed == 1
    with pytest.raises(Unavailable, match="closed"):
        llm.generate("x")


def test_the_bar_shows_tokens_per_second(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate("x", MANY)
    assert capsys.readouterr().err == ""  # no terminal, no bar
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    llm.generate("x", MANY, progress=False)
    assert capsys.readouterr().err == ""
    llm.generate(["x", "y"], MANY)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "tokens/s" in shown
