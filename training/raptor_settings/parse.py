"""Turns `[CONFIG.yaml | NAME] [--flag value ...]` into a checked settings dataclass, and makes the page of `--help`.

    settings = parse_settings(DistillSettings)

Only modules that load in a moment are imported here, so that help and mistakes are answered at once.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers import HfArgumentParser

from .declare import GROUPS, field_types, range_words
from .resources import find_config, shipped_configs, suggest

Settings = TypeVar("Settings")


def parse_settings(
    settings_class: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    exit_on_error: bool = True,
    command: str | None = None,
) -> Settings:
    """Fill a settings dataclass from `[CONFIG.yaml | NAME] [--flag value ...]`.

    A flag wins over the file, and the file over the default. Fields may be bool, int, float, str, Literal, a list of
    one of these, or any of them `| None`. A bool `x` has the flags `--x` and `--no_x`; a list takes several values
    (`--block_repeats 7 3 2`). The flag of a field that may be None takes `none`, unless that is one of its choices. A
    class with a `recipe`, the name of its folder in training/configs, takes the names of the configurations there.
    `--help` shows what the file gives.

    Args:
        settings_class: dataclass; checks its values in `__post_init__`, raising ValueError.
        argv: the arguments without the program's name; `sys.argv[1:]` if None.
        exit_on_error: end the program with a one-line message and status 2, as a script should; otherwise raise.
        command: how help calls the program, if it is not as the settings class says.

    Raises:
        ValueError: unknown key or flag, wrong type, missing value or whatever `__post_init__` refuses.
        OSError: the configuration file cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with user_errors() if exit_on_error else contextlib.nullcontext():
        config, defaults = None, {}
        if argv and not argv[0].startswith("-"):
            config = find_config(argv.pop(0), getattr(settings_class, "recipe", None))
            defaults = _read_config(config, settings_class)
        return settings_class(**_parse_flags(settings_class, config, defaults, argv, command))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that a user can mend, ValueError and OSError, into one line on the terminal and exit status 2.

    For the part of a recipe that comes before the work: what fails later shows its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML without keys that are given twice, of which the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in dict.fromkeys(map(str, keys)) if list(map(str, keys)).count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} is given twice; each setting must be given once")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The `setting: value` lines of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not YAML, holds something else, or a key twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"configuration file {str(path)!r} does not exist")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `setting: value` lines, not a {type(values).__name__}")
    return values


def _read_config(path: Path, settings_class: type) -> dict[str, Any]:
    """Values of a configuration file, each checked against the type of its field."""
    values, annotations = read_yaml(path), field_types(settings_class)
    for key in values:
        if key not in annotations:
            raise ValueError(f"{path}: unknown setting {key!r}{suggest(str(key), annotations)}")
    try:
        return {key: _check(key, value, annotations[key]) for key, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check(key: str, value: Any, annotation: Any) -> Any:
    """Return a YAML value as the annotated type, without guessing: only what YAML itself spells oddly is converted."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (annotation,) = (argument for argument in arguments if argument is not type(None))
        return _check(key, value, annotation)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{key} must be a list such as [1, 2], got {value!r}")
        return [_check(key, item, arguments[0]) for item in value]
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if annotation is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4, without a dot, as a string
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{key} must be of type {annotation.__name__}, got {value!r} ({type(value).__name__})")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)  # argparse would print all flags and exit


class _HelpPage(argparse.RawDescriptionHelpFormatter):
    """One line for each setting, however long: a page that can be searched."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=10_000)

    def add_argument(self, action: argparse.Action) -> None:
        if action.const is not False:  # --no_x is shown beside --x
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = f"--{action.dest}"
        if action.nargs == "?":  # a bool
            return f"--[no_]{action.dest}"
        return name if action.nargs == 0 else f"{name} {self._format_args(action, '')}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.choices is not None:
            return "CHOICE"
        kind = getattr(action.type, "__name__", "value").upper()
        kind = {"STR": "TEXT", "INT": "N", "FLOAT": "X"}.get(kind, kind)
        return f"{kind} [{kind} ...]" if action.nargs == "+" else kind


def _parse_flags(
    settings_class: type, config: Path | None, defaults: dict[str, Any], argv: list[str], command: str | None
) -> dict[str, Any]:
    """Let HfArgumentParser read the flags, over copies of the fields that have the file's values as their defaults."""
    annotations = field_types(settings_class)
    groups: dict[str, list[tuple[str, Any, dataclasses.Field]]] = {group: [] for group in GROUPS}
    for field in dataclasses.fields(settings_class):
        if field.name not in annotations:
            continue
        default, factory = field.default, field.default_factory
        if field.name in defaults:
            default, factory = defaults[field.name], dataclasses.MISSING
            if isinstance(default, list):
                default, factory = dataclasses.MISSING, lambda value=default: value
        # argparse reads "%" as the begin of a format
        help_line = _help_line(field, annotations[field.name], config if field.name in defaults else None, defaults)
        metadata = {"help": help_line.replace("%", "%%")}
        copy = dataclasses.field(default=default, default_factory=factory, metadata=metadata, kw_only=True)
        groups.setdefault(field.metadata.get("group", "settings"), []).append(
            (field.name, annotations[field.name], copy)
        )
    parser = _Parser(
        [
            dataclasses.make_dataclass(settings_class.__name__, fields, namespace={"_argument_group_name": group})
            for group, fields in groups.items()
            if fields
        ],
        prog=command,
        usage=f"%(prog)s {_first_argument(settings_class)} [--flag value ...]",
        description=_description(settings_class, command),
        formatter_class=_HelpPage,
    )
    _take_none(parser, annotations)
    flags = {"help", *annotations}
    for name, annotation, copy in (field for fields in groups.values() for field in fields):
        if annotation is bool:
            flags.add(f"no_{name}")
            if copy.default is not True:  # HfArgumentParser has --no_x only where x defaults to True
                options = f"--no_{name}", f"--no-{name.replace('_', '-')}"
                parser.add_argument(*options, action="store_false", dest=name, default=False)
    for argument in argv:  # argparse would guess at abbreviations, and call a misspelled flag missing
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in flags:
            raise ValueError(f"unknown flag {argument!r}{suggest(name, flags, '--')}")
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r}; one YAML file comes first, flags follow")
    values = {name: value for group in parsed for name, value in vars(group).items()}
    for name, value in values.items():
        if isinstance(value, list) and None in value:
            if len(value) > 1:
                raise ValueError(f"argument --{name}: none goes with no other value, got {_shown(value)}")
            values[name] = None
    return {name: values[name] for name in annotations}


def _take_none(parser: argparse.ArgumentParser, annotations: dict[str, Any]) -> None:
    """Let `none`, as help writes it, stand for None in the flags of fields that may be None."""
    for action in parser._actions:
        optional = type(None) in typing.get_args(annotations.get(action.dest))
        if not optional or "none" in _choices(annotations[action.dest]):
            continue

        @functools.wraps(action.type)
        def read(text: str, kind: Any = action.type) -> Any:
            return None if text in ("none", "None") else kind(text)

        action.type = read
        if action.choices is not None:
            action.choices = [*action.choices, None]


def _first_argument(settings_class: type) -> str:
    shipped = shipped_configs(getattr(settings_class, "recipe", ""))
    return getattr(settings_class, "first", "[CONFIG.yaml | NAME]" if shipped else "[CONFIG.yaml]")


def _description(settings_class: type, command: str | None) -> str | None:
    """What stands above the flags: what the recipe does, one example, and the shipped configurations."""
    recipe = getattr(settings_class, "recipe", None)
    if recipe is None:
        return None
    lines = [
        settings_class.__doc__.splitlines()[0],
        "",
        f"example: {command or settings_class.command} {settings_class.example}",
    ]
    if shipped := shipped_configs(recipe):
        lines.append(f"shipped configurations (NAME): {', '.join(shipped)}")
    return "\n".join(lines)


def _help_line(field: dataclasses.Field, annotation: Any, config: Path | None, defaults: dict[str, Any]) -> str:
    """Help, choices, unit, range and default of one setting, and where the default is from."""
    line = field.metadata.get("help", "")
    choices = " | ".join(_choices(annotation))
    facts = ", ".join(filter(None, [choices, field.metadata.get("unit"), range_words(field)]))
    line += f" [{facts}]" if facts else ""
    if config is not None:
        return f"{line} (default: {_shown(defaults[field.name])}, from {config.name})"
    if field.default is field.default_factory is dataclasses.MISSING:
        return f"{line} (required)"
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return f"{line} (default: {_shown(default)}, built in)"


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, alone or in a list or an optional type."""
    if typing.get_origin(annotation) is Literal:
        return list(map(str, typing.get_args(annotation)))
    return [choice for argument in typing.get_args(annotation) for choice in _choices(argument)]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value)
