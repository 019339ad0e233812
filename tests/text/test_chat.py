"""Chat templates render as transformers renders them, and neither data nor template can run away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from weft.errors import CheckpointError, ConfigError, InvalidRequest
from weft.text.chat import MAX_MESSAGES, ChatTemplate, missing_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
Today Date: {{ date_string }}
{{ system_message }}
{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls[0].function | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
INST = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation %}
        {{- " " + message["content"]|trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
    {%- if loop.index > 6 %}{% break %}{% endif %}
{%- endfor %}
"""
SOURCES = {"chatml": CHATML, "headers": HEADERS, "inst": INST}
WORDS = st.text(st.sampled_from("ab \n<>&'\"{}%日😀") | st.characters(codec="utf-8"), max_size=12)
TALK = st.tuples(st.booleans(), st.lists(WORDS, min_size=1, max_size=9)).map(
    lambda drawn: [
        *([{"role": "system", "content": "Be <kind> & 'short'."}] if drawn[0] else []),
        *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(drawn[1])),
    ]
)


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(folders["byte_fallback"])


def same(oracle: Any, name: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    tokens = {**TOKENS, "unk_token": "<unk>"}
    expected = oracle.apply_chat_template(messages, chat_template=SOURCES[name], tokenize=False, **variables)
    assert ChatTemplate(SOURCES[name], tokens).render(messages, **variables) == expected
    return str(expected)


@pytest.mark.parametrize("name", SOURCES)
@given(messages=TALK, add=st.booleans())
@settings(max_examples=50, deadline=None)
def test_renders_as_transformers(name: str, messages: list[dict[str, Any]], add: bool, oracle: Any) -> None:
    same(oracle, name, messages, add_generation_prompt=add)


@pytest.mark.parametrize("name", SOURCES)
@given(messages=TALK)
@settings(max_examples=50, deadline=None)
def test_a_last_message_is_continued_as_transformers_does(
    name: str, messages: list[dict[str, Any]], oracle: Any
) -> None:
    # transformers takes the spaces away from the end of a message where the template does; here it ends as it was sent.
    assume(messages[-1]["content"] == messages[-1]["content"].rstrip() != "")
    try:
        same(oracle, name, messages, continue_final_message=True)
    except ValueError:  # what transformers says of a message that the template leaves out
        with pytest.raises(InvalidRequest, match="shows the last message 0 times"):
            ChatTemplate(SOURCES[name], TOKENS).render(messages, continue_final_message=True)


def test_a_message_that_is_continued_ends_as_it_was_written() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}<more>"
    template = ChatTemplate(source, {})
    for content in ("s", "", "a ", None):  # "s" is in what comes after it as well
        talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
        text = template.render(talk, continue_final_message=True)
        assert text == "<user>x</s><assistant>" + (content or "") and talk[1]["content"] == content


@pytest.mark.parametrize("source", ["{{ messages[0].role }}", "{{ messages[0].content * 2 }}"])
def test_a_message_that_the_template_does_not_show_once_is_not_continued(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"shows the last message [02] times"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], continue_final_message=True)


def test_variables_tools_and_tool_calls_as_transformers(oracle: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert "<think>" in same(oracle, "chatml", messages, add_generation_prompt=True, enable_thinking=False)
    assert "1 May" in same(oracle, "headers", messages, add_generation_prompt=True, date_string="1 May")
    tool = {"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "<"}}}]}
    text = same(oracle, "headers", [*messages, call], add_generation_prompt=True, tools=[tool])
    assert "<é>" in text and '{"a": "<"}' in text


def test_the_builtin_template_as_transformers(folders: dict[str, Path]) -> None:
    template = ChatTemplate.from_folder(folders["builtin"])
    assert template is not None
    oracle = AutoTokenizer.from_pretrained(folders["builtin"])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]
    for talk in (messages, messages[1:]):
        expected = oracle.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert template.render(talk) == expected


def test_the_date() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}", {}).render([{"role": "user", "content": ""}])
    assert text.startswith("20") and len(text) == 4


def test_parts_are_joined_by_line_ends() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert ChatTemplate(source, {}).render(messages) == "[a\nb][None]"
    assert messages[0]["content"] is parts


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "0 entries"),
        ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), "4097 entries"),
        ([{"content": "x"}], r"messages\[0\] must be an object with a role"),
        (["x"], r"messages\[0\] must be"),
        ([{"role": "user", "content": 3}], "of type int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "text only"),
        ([{"role": "user", "content": ["x"]}], "text only"),
        ([{"role": "user", "content": "x", "extra": object()}], "not JSON"),
    ],
)
def test_messages_that_are_none(messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        ChatTemplate("x", {}).render(messages)


@pytest.mark.parametrize("variables", [{"tokenize": True}, {"chat_template": "x"}, {"enable_thinking": [1]}])
def test_requests_set_only_known_variables_to_scalars(variables: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        ChatTemplate("x", {}).render([{"role": "user", "content": "x"}], **variables)


HELLO = [{"role": "user", "content": "hello"}]
RANGES = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].missing.name }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        (RANGES, "more rounds"),
        ("{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "more rounds"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% macro slow(n) %}{% if n %}{{ slow(n - 1) }}{% endif %}{% endmacro %}{{ slow(9) }}", "longer than allowed"),
        ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99999) }}", "RecursionError"),
        ("{% set weft_budget = namespace(count_round=dict) %}" + RANGES, "more rounds"),
        ("{{ range(10 ** 9) | list }}", "too big"),
        ("{{ 'a' * 10 ** 9 }}", r"a result of \*"),
        ("{{ 2 * ([0] * 9999999) }}", r"a result of \*"),
        ("{{ 10 ** 99999999 }}", r"a result of \*\*"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "output is longer"),
        ("{% for i in range(3) %}{{ slow }}{% endfor %}", "longer than allowed"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError|UndefinedError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{% set ns = namespace(_x=1) %}", "SecurityError"),
        ("{% include 'x' %}", "cannot render"),
    ],
)
def test_templates_cannot_run_away(source: str, words: str) -> None:
    seconds = 0.0 if "slow" in source else 10.0
    with pytest.raises(InvalidRequest, match=words):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], max_seconds=seconds)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%10000d' % 1 }}",
        "{{ '%.10000f' % 1 }}",
        "{{ '%*d' % (10000, 1) }}",
        "{{ '%5%%10000d' % 1 }}",
        "{{ '%((a))10000d' % {'(a)': 1} }}",
        "{{ '%10000d' | format(1) }}",
        "{{ '{:>10000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10000) }}",
        "{{ '{:{}}'.format(1, '>10000') }}",
        "{{ '{a:>10000}'.format_map({'a': 1}) }}",
        "{{ messages[0].content.ljust(10000) }}",
        "{{ 'a'.rjust(10000) }}",
        "{{ 'a'.center(10000) }}",
        "{{ 'a'.zfill(10000) }}",
        "{{ 'a'.expandtabs(10000) }}",
        "{{ 'a' | center(10000) }}",
        "{{ ['a'] | map('center', 10000) | list }}",
        "{% autoescape 'a' | center(10000) %}{% endautoescape %}",
        "{% filter center(10000) %}a{% endfilter %}",
        "{{ 'a' | indent(10000) }}",
        "{{ 1 | round(10000) }}",
        "{{ [1] | tojson(indent=10000) }}",
    ],
)
def test_nothing_is_padded_without_bound(source: str) -> None:
    with pytest.raises(InvalidRequest, match="9999"):
        ChatTemplate(source, {}).render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "9" * 5000 + " }}",
    ],
    ids=["lists", "brackets", "ifs", "loops", "digits"],
)
def test_sources_that_python_cannot_compile(source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template cannot be compiled: "):
        ChatTemplate(source, {})


def test_formats_and_paddings_are_as_python_has_them() -> None:
    source = (
        "{{ '%5d|%s|%%|%(a)s' % {'a': 1} if 0 else '%5d|%s|%%|%d' % (3, 'x', 1700000000) }} {{ '%s'|format(2) }} "
        "{{ '{:>5}|{a}|{{}}'.format(1, a=2) }} {{ 'a'.ljust(3) }}|{{ 'a'|center(3) }}|{{ 'a\nb'|indent(2) }} "
        "{{ {'a': [1]}|tojson(indent=1) }} {{ range(3)|map('string')|join('-') }} {{ 'abc'[1:] }} {{ [3, 1]|sort }} "
        "{{ [{'a': 1}]|sum(attribute='a') }} {{ 'a,b'.split(',') }} {{ 'aba'.replace('a', 'c', 1) }} {{ 'x'|safe }}"
    )
    expected = (
        "    3|x|%|1700000000 2     1|2|{} a  | a |a\n  b {\n \"a\": [\n  1\n ]\n} 0-1-2 bc [1, 3] 1 ['a', 'b'] cba x"
    )
    assert ChatTemplate(source, {}).render([{"role": "user", "content": ""}]) == expected


def test_small_products_and_powers_are_fine() -> None:
    source = "{{ '-' * 3 }}{{ 2 ** 10 }}{{ 2.0 ** 2 }}{{ 3 * 4 }}{{ 'x' ~ 1 }}{{ dict(a=1).a }}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": ""}]) == "---10244.012x11"


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        suffix = "jinja" if isinstance(content, str) else "json"
        (folder / f"{name}.{suffix}").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_where_a_checkpoint_keeps_its_template(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    config = {"bos_token": "<s>", "chat_template": "config{{ bos_token }}"}
    write(tmp_path, tokenizer_config=config)
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "config<s>"  # type: ignore[union-attr]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    write(tmp_path, tokenizer_config={**config, "chat_template": named})
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "named"  # type: ignore[union-attr]
    write(tmp_path, chat_template={"chat_template": "json"})
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "json"  # type: ignore[union-attr]
    write(tmp_path, chat_template="jinja{{ bos_token }}")
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "jinja<s>"  # type: ignore[union-attr]


def test_a_template_of_the_operator(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": {"content": "</s>"}}, mine="{{ eos_token }}", bad="{% if %}")
    assert ChatTemplate.from_file(tmp_path / "mine.jinja", tmp_path).render(HELLO) == "</s>"
    with pytest.raises(ConfigError, match=r"--chat-template .*bad\.jinja.*line 1"):
        ChatTemplate.from_file(tmp_path / "bad.jinja", tmp_path)
    with pytest.raises(ConfigError, match=r"--chat-template .*cannot be used"):
        ChatTemplate.from_file(tmp_path / "none.jinja", tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"--chat-template .*must be a text file in UTF-8"):
        ChatTemplate.from_file(tmp_path / "chat_template.jinja", tmp_path)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read: .*must be a text file in UTF-8"):
        ChatTemplate.from_folder(tmp_path)


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": "{% for %}"})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json, line 1"):
        ChatTemplate.from_folder(tmp_path)
    write(tmp_path, tokenizer_config={"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(CheckpointError, match=r"\['rag'\] none is named default; give --chat-template"):
        ChatTemplate.from_folder(tmp_path)


def test_a_missing_template_names_the_flag() -> None:
    assert "--chat-template" in missing_template().message
