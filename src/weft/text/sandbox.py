"""The sandbox of chat templates: jinja2's immutable one, with bounds on output, loop rounds, calls and time.

What makes a huge value in one go is refused: `*`, `**`, `%` and padding. A template that copies what it has again and
again (`~`, replace, join) is stopped by its rounds, its time and the length of its output, and by nothing else.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# The template variable that holds the Budget of a rendering; a name with a space cannot be set by a template.
BUDGET = "weft budget"
MAX_POWER_BITS = 4096
MAX_PRODUCT = 16 * 2**20
MAX_WIDTH = 9999
# A directive of `%`, and what makes it too wide: five digits, or a width that is an argument.
DIRECTIVE = re.compile(r"%(?:\([^()]*\))?([^a-zA-Z%]*).", re.DOTALL)
WIDE = re.compile(r"\d{5}|[*(]")
# Methods of strings, and filters, that make their value as long as a number says.
PADDING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
PADDING_FILTERS = ("batch", "center", "indent", "round", "slice", "tojson")


class Refusal(jinja2.TemplateError):
    """What a template says with raise_exception: words for the user."""


class OverBudget(jinja2.TemplateError):
    """A bound was passed."""


def compile_template(source: str) -> jinja2.Template:
    """A template whose every loop counts its rounds; render it with a Budget as the variable BUDGET.

    Raises jinja2.TemplateSyntaxError, and whatever Python raises for a source that is too deeply nested for it.
    """
    environment = _environment()
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


class Budget:
    """What one rendering may still spend."""

    def __init__(self, rounds: int, chars: int, deadline: float) -> None:
        self._rounds, self._chars, self._deadline = rounds, chars, deadline

    def count_round(self) -> None:
        self._rounds -= 1
        if self._rounds < 0:
            raise OverBudget("its loops take more rounds than allowed")
        if time.monotonic() > self._deadline:
            raise OverBudget("it takes longer than allowed")

    def count_text(self, text: str) -> str:
        self._chars -= len(text)
        if self._chars < 0:
            raise OverBudget("its output is longer than allowed")
        return text


@jinja2.pass_context
def _counted(context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
    """Wrapped around what every loop of the template runs over."""
    budget: Budget = context[BUDGET]
    for item in iterable:
        budget.count_round()
        yield item


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which nothing makes a huge value in one go. A call counts as a round: a macro that calls itself
    needs no loop."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_directives(left)
        elif _too_large(operator, left, right):
            raise OverBudget(f"a result of {operator} is larger than allowed")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = __context[BUDGET]
        budget.count_round()
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 hands out a function of its own for str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name in PADDING_METHODS:
            _check_widths(name, (*args, *kwargs.values()))
        if isinstance(owner, str) and name in ("format", "format_map"):
            _check_fields(owner)
        return super().call(__context, __obj, *args, **kwargs)


def _too_large(operator: str, left: Any, right: Any) -> bool:
    """Whether `*` or `**` make a value that nobody needs."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        return operator in ("*", "**") and bits > MAX_POWER_BITS
    pairs = ((left, right), (right, left))
    return any(_long(value) * factor > MAX_PRODUCT for value, factor in pairs if isinstance(factor, int))


def _long(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_directives(text: str) -> None:
    """Refuse `text % values` with a wide directive."""
    if any(WIDE.search(flags) for flags in DIRECTIVE.findall(text)):
        raise OverBudget(f"a directive of % has a width above {MAX_WIDTH} or one that is an argument")


def _check_fields(text: str) -> None:
    """Refuse `text.format(...)` with a wide field, or one whose form is an argument."""
    for _, name, form, _ in Formatter().parse(text):
        if form and ("{" in form or WIDE.search(form)):
            raise OverBudget(f"the field {{{name}:{form}}} has a width above {MAX_WIDTH} or one that is an argument")


def _check_widths(name: str, numbers: Iterable[Any]) -> None:
    if any(isinstance(number, int) and number > MAX_WIDTH for number in numbers):
        raise OverBudget(f"{name} is given a number above {MAX_WIDTH}, which is larger than allowed")


def _narrow(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses wide numbers beside its value."""

    @functools.wraps(function)
    def narrow(value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_directives(str(value))
        else:
            _check_widths(name, (*args, *kwargs.values()))
        return function(value, *args, **kwargs)

    return narrow


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """jinja2's namespace() without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **values: Any) -> _SafeNamespace:
    for name in dict(*args, **values):
        _check_name(name)
    return _SafeNamespace(*args, **values)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def _environment() -> _Environment:
    """As transformers sets it up, for which the templates are written."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _tojson
    for name in (*PADDING_FILTERS, "format"):
        environment.filters[name] = _narrow(name, environment.filters[name])
    environment.filters["counted"] = _counted
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _namespace
    del environment.globals["lipsum"]
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
