"""Settings from four places into configuration objects: flags over WEFT_* variables over a YAML file over defaults.

Every value is read as text, by one converter, whatever its place: so `partition: 1:1` and `partition: off` in YAML mean
what they mean on the command line, and not the number 61 and False that YAML's own types make of them.
"""

from __future__ import annotations

import argparse
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from weft.cli.others import advice
from weft.config import EngineConfig, ServerConfig
from weft.errors import ConfigError

PREFIX = "WEFT_"
TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
MASK = "***"
SERVICE_LINK = (
    "Kubernetes sets it where a service is called weft: give --port, or set enableServiceLinks: false in the pod"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a configuration class, as the command line sees it. kind: the type of one value."""

    name: str
    kind: type
    many: bool
    default: Any
    help: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    def convert(self, text: str) -> Any:
        """One value from its text. Raises ValueError with what would work."""
        if self.kind is bool:
            if text.lower() not in TRUE | FALSE:
                raise ValueError("it must be true or false")
            return text.lower() in TRUE
        if self.kind is int and self.metadata.get("unit") == "bytes":
            return _size(text)
        if self.kind is int or self.kind is float:
            try:
                return self.kind(text)
            except ValueError:
                raise ValueError("it must be a whole number" if self.kind is int else "it must be a number") from None
        return self.kind(text)

    def shown(self, value: Any) -> str:
        return MASK if self.metadata.get("secret") and value else str(value)


@dataclass(frozen=True, slots=True)
class Loaded:
    """configs: one object of each class asked for. given: (setting, value as text, where from) of what was set."""

    configs: tuple[Any, ...]
    given: tuple[tuple[str, str, str], ...]

    def summary(self) -> str:
        """What was set by the user, for the log; secrets are masked."""
        return ", ".join(f"{name}={value} ({origin})" for name, value, origin in self.given)


class Parser(argparse.ArgumentParser):
    """argparse that reports through ConfigError, and names the nearest flag for one that it does not know."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        usage = f"{prog} [ARGUMENTS]"
        super().__init__(prog=prog, usage=usage, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.prog} --help lists every flag")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; dashes and underscores in flag names mean the same. Raises ConfigError."""
        namespace, unknown = self.parse_known_args([_dashed(argument) for argument in arguments])
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error("\n".join(_unknown(text, flags) for text in unknown))
        return namespace


def settings_of(config: type) -> tuple[Setting, ...]:
    """The settings of a configuration class, in its order."""
    hints = typing.get_type_hints(config)
    return tuple(_setting(spec, hints[spec.name]) for spec in fields(config))


def add_settings(parser: argparse.ArgumentParser, configs: Iterable[type]) -> None:
    """A flag for every setting, and --config; what is absent from the command line is absent from the namespace."""
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with settings, one 'name: value' a line"
    )
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or config.__name__).splitlines()[0].rstrip("."))
        for item in settings_of(config):
            _add_flag(parser, group, item)


def load(configs: Sequence[type], namespace: argparse.Namespace, environment: Mapping[str, str]) -> Loaded:
    """The configuration objects, valid. Raises ConfigError that names every problem at once, and where it came from."""
    known = {item.name: item for config in configs for item in settings_of(config)}
    problems = _misspelt_variables(environment)
    sources = [
        *_from_flags(namespace, known, problems),
        *_from_environment(environment, known, problems),
        *_from_yaml(getattr(namespace, "config", None) or environment.get(PREFIX + "CONFIG"), known, problems),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, texts, origin in sources:
        if name not in origins:
            origins[name] = origin
            _take(known[name], texts, origin, values, problems)
    built = [config(**{key: values[key] for key in values if key in _names(config)}) for config in configs]
    for config in built:
        problems += [_with_origin(problem, origins) for problem in config.problems()]
    if problems:
        raise ConfigError("\n".join(problems))
    given = ((name, known[name].shown(values[name]), origins[name]) for name in known if name in values)
    return Loaded(tuple(built), tuple(given))


def nearest(word: str, candidates: Iterable[str]) -> str:
    """'; did you mean X?', or nothing when no candidate is near."""
    near = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown(argument: str, flags: Sequence[str]) -> str:
    flag = argument.partition("=")[0]
    words = advice(flag)
    return f"unknown argument {argument}" + (nearest(flag, flags) if words is None else f": {words}")


def _setting(spec: Field[Any], hint: Any) -> Setting:
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    elif isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if spec.default is MISSING:
        raise TypeError(f"the setting {spec.name} has no default")
    metadata = spec.metadata
    return Setting(spec.name, hint, many, spec.default, metadata["help"], metadata)


def _add_flag(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup, item: Setting) -> None:
    words = item.help.replace("%", "%%")
    if item.default not in (None, ()):
        words += f" (default: {item.default})"
    if item.kind is bool:
        group.add_argument(
            item.flag, action=argparse.BooleanOptionalAction, dest=item.name, default=argparse.SUPPRESS, help=words
        )
        return
    choices = item.metadata.get("choices")
    metavar = item.metadata.get("metavar") or ("|".join(map(str, choices)) if choices else _metavar(item))
    if item.metadata.get("positional"):
        parser.add_argument(
            f"{item.name}_positional", metavar=item.name.upper(), nargs="?", default=argparse.SUPPRESS, help=words
        )
        words = f"the same as {item.name.upper()}"
    group.add_argument(
        *filter(None, (item.metadata.get("short"), item.flag)),
        dest=item.name,
        metavar=metavar,
        action="append" if item.many else "store",
        default=argparse.SUPPRESS,
        help=f"{words}; may be repeated" if item.many else words,
    )


def _metavar(item: Setting) -> str:
    if item.metadata.get("unit") == "bytes":
        return "BYTES"
    return {int: "N", float: "X", Path: "FILE"}.get(item.kind, "TEXT")


Source = tuple[str, list[str], str]


def _from_flags(namespace: argparse.Namespace, known: Mapping[str, Setting], problems: list[str]) -> Iterable[Source]:
    given = vars(namespace)
    for name, item in known.items():
        positional = given.get(f"{name}_positional")
        value = given.get(name, positional)
        if value is None:
            continue
        if positional is not None and value != positional:
            problems.append(f"{name.upper()} is {positional!r} and {item.flag} is {value!r}; give one of them")
        yield name, [str(entry) for entry in value] if isinstance(value, list) else [str(value)], item.flag


def _from_environment(
    environment: Mapping[str, str], known: Mapping[str, Setting], problems: list[str]
) -> Iterable[Source]:
    for name, item in known.items():
        text = environment.get(item.variable, "")
        if item.metadata.get("secret") and item.variable in environment and not text.strip():
            # A secret that did not arrive must not leave the door open.
            problems.append(f"{item.variable} is empty; give it a value, or do not set it")
        if text:  # an empty variable is as good as none
            texts = [part.strip() for part in text.split(",")] if item.many else [text]
            yield name, texts, item.variable


def _from_yaml(path: str | None, known: Mapping[str, Setting], problems: list[str]) -> Iterable[Source]:
    if path is None:
        return
    import yaml  # only who has a file pays for it

    try:
        # The node tree that safe_load would start from: the scalars are still as they were written.
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"--config {path} cannot be read: {error}")
        return
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"--config {path} must hold lines of the form 'name: value'")
        return
    seen = set()
    for key, value in root.value:
        name = str(key.value).replace("-", "_")
        where = f"{path}, line {key.start_mark.line + 1}"
        entries = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if name not in known:
            problems.append(f"{where}: unknown setting {key.value}{nearest(name, known)}")
        elif name in seen:
            problems.append(f"{where}: {name} is there twice")
        elif not all(isinstance(entry, yaml.ScalarNode) for entry in entries):
            problems.append(f"{where}: {name} must be a plain value" + (" or a list" if known[name].many else ""))
        elif value.tag != "tag:yaml.org,2002:null":
            yield name, [entry.value for entry in entries], where
        seen.add(name)


def _take(item: Setting, texts: list[str], origin: str, values: dict[str, Any], problems: list[str]) -> None:
    """Convert the texts of one setting into its value, or say what is wrong with them."""
    converted = []
    for text in texts:
        try:
            converted.append(item.convert(text))
        except ValueError as error:
            service = f"; {SERVICE_LINK}" if origin == "WEFT_PORT" and text.startswith("tcp://") else ""
            problems.append(f"{origin} is {item.shown(text)!r}; {error}{service}")
            return
    if item.many:
        values[item.name] = tuple(converted)
    elif len(converted) == 1:
        values[item.name] = converted[0]
    else:
        problems.append(f"{origin} has {len(converted)} values; {item.name} takes one")


def _misspelt_variables(environment: Mapping[str, str]) -> list[str]:
    """WEFT_* variables that are almost a setting. Others are let be: a container platform makes its own for a service
    that is called weft, such as WEFT_SERVICE_HOST."""
    every = {item.variable for config in (EngineConfig, ServerConfig) for item in settings_of(config)}
    every.add(PREFIX + "CONFIG")
    strange = sorted(name for name in environment if name.startswith(PREFIX) and name not in every)
    near = {name: difflib.get_close_matches(name, every, n=1, cutoff=0.85) for name in strange}
    return [f"unknown variable {name}; did you mean {found[0]}?" for name, found in near.items() if found]


def _with_origin(problem: str, origins: Mapping[str, str]) -> str:
    """Name the place that set the value a problem begins with, unless it is the flag that the problem names."""
    flag = problem.split()[0]
    origin = origins.get(flag.removeprefix("--").replace("-", "_"), flag)
    return problem if origin == flag else f"{problem} (set by {origin})"


def _names(config: type) -> set[str]:
    return {spec.name for spec in fields(config)}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in UNITS:
        raise ValueError("it must be a number of bytes, such as 1048576, 512MiB or 2GiB")
    return (
        int(float(match[1]) * UNITS[match[2].lower()]) if "." in match[1] else int(match[1]) * UNITS[match[2].lower()]
    )


def _dashed(argument: str) -> str:
    """--max_num_seqs=4 as --max-num-seqs=4; the value stays as it is."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value
