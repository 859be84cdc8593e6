"""The settings of a recipe: from a YAML file and flags to a checked dataclass, and back to the run folder.

Every recipe has one frozen dataclass of settings and begins with

    settings = parse_settings(DistillSettings)  # python distill.py [CONFIG.yaml] [--flag value ...]
    if accelerator.is_main_process:
        prepare_output_dir(settings.output_dir, settings)
    accelerator.wait_for_everyone()
"""

import contextlib
import dataclasses
import difflib
import shutil
import sys
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers import HfArgumentParser

from .files import RESOLVED_FILE, write_text_atomically

Settings = TypeVar("Settings")

CHECKPOINT_FOLDER = "checkpoints"
# settings that do not change what a run computes
RUN_ONLY = (
    *("output_dir", "override", "num_workers", "tracker", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("max_nonfinite_steps", "max_decode_failures", "cache_gb"),
)


def parse_settings(
    settings_class: type[Settings], argv: Sequence[str] | None = None, *, exit_on_error: bool = True
) -> Settings:
    """Fill a settings dataclass from `[CONFIG.yaml] [--flag value ...]`: flags win over the file, it over defaults.

    Fields may be bool, int, float, str, Literal, a list of one of these, or any of them `| None`. A bool `x` has the
    flags `--x` and `--no_x`; a list takes several values (`--block_repeats 7 3 2`). `--help` shows what the file gives.

    Args:
        settings_class: dataclass; checks its values in `__post_init__`, raising ValueError.
        argv: the arguments without the program's name; `sys.argv[1:]` if None.
        exit_on_error: end the program with a one-line message and status 2, as a script should; otherwise raise.

    Raises:
        ValueError: unknown key or flag, wrong type, missing value or whatever `__post_init__` refuses.
        OSError: the configuration file cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with user_errors() if exit_on_error else contextlib.nullcontext():
        config = argv.pop(0) if argv and not argv[0].startswith("-") else None
        defaults = {} if config is None else _read_config(config, settings_class)
        return settings_class(**_parse_flags(settings_class, defaults, argv))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that a user can mend, ValueError and OSError, into one line on the terminal and exit status 2.

    For the part of a recipe that comes before the work: what fails later is worth its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """Turn a settings dataclass into a dict that JSON and YAML can hold."""
    return {name: getattr(settings, name) for name in _types(type(settings))}


def save_settings(path: str | Path, settings: Any) -> None:
    """Write settings as a YAML file that can be given back to the recipe as its CONFIG.yaml."""
    write_text_atomically(path, yaml.safe_dump(settings_to_dict(settings), sort_keys=False, allow_unicode=True))


def prepare_output_dir(
    output_dir: str | Path,
    settings: Any,
    *,
    override: bool = False,
    needed_bytes: int = 0,
    ignore: Sequence[str] = RUN_ONLY,
) -> Path:
    """Create or check the folder of a run before long work begins, and write the resolved settings into it.

    A folder with the same settings is taken: that is how a run resumes. To be called by the main process alone.

    Args:
        output_dir: the folder; created with its parents.
        settings: the settings of this run.
        override: take the folder even if it belongs to a run with other settings. The checkpoints of that run are
            removed: resuming would take them for this run's.
        needed_bytes: free space that the run will want there.
        ignore: names of settings that may differ on resuming, as they do not change the result.

    Returns:
        `output_dir` as a Path.

    Raises:
        ValueError: the folder holds a run with other settings (the message shows them), or a model without settings.
        OSError: it cannot be created or written, or has not enough free space.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"output_dir={str(folder)!r} is not a folder that can be written to: {error}") from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"output_dir={str(folder)!r} is on a disk with {free / 1e9:,.2f} GB free, and the run needs "
            f"{needed_bytes / 1e9:,.2f} GB; free some space or choose another folder"
        )
    try:
        _check_same_run(folder, settings, ignore)
    except ValueError:
        if not override:
            raise
        if (folder / CHECKPOINT_FOLDER).exists():
            shutil.rmtree(folder / CHECKPOINT_FOLDER)
    save_settings(folder / RESOLVED_FILE, settings)
    return folder


def _check_same_run(folder: Path, settings: Any, ignore: Sequence[str]) -> None:
    advice = "choose another folder, or override to write into this one"
    resolved = folder / RESOLVED_FILE
    if not resolved.exists():
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} holds a model of unknown settings (no {RESOLVED_FILE}); {advice}")
        return
    old, new = _read_yaml(resolved), settings_to_dict(settings)
    changes = [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in dict.fromkeys((*old, *new))
        if key not in ignore and (key not in old or key not in new or old[key] != new[key])
    ]
    if changes:
        raise ValueError(f"{folder} belongs to a run with other settings ({', '.join(changes)}); {advice}")


def _read_config(path: str, settings_class: type) -> dict[str, Any]:
    """Values of a configuration file, each checked against the type of its field."""
    values, annotations = _read_yaml(Path(path)), _types(settings_class)
    for key in values:
        if key not in annotations:
            raise ValueError(f"{path}: unknown setting {key!r}{_suggest(str(key), annotations)}")
    try:
        return {key: _check(key, value, annotations[key]) for key, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"configuration file {str(path)!r} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `setting: value` lines, not a {type(values).__name__}")
    return values


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
        except ValueError:
            pass
    elif isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{key} must be of type {annotation.__name__}, got {value!r} ({type(value).__name__})")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)  # argparse would print all flags and exit


def _parse_flags(settings_class: type, defaults: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """Let HfArgumentParser read the flags, over a copy of the dataclass that has the file's values as its defaults."""
    annotations, fields = _types(settings_class), []
    for field in dataclasses.fields(settings_class):
        if field.name not in annotations:
            continue
        default, factory = field.default, field.default_factory
        if field.name in defaults:
            default, factory = defaults[field.name], dataclasses.MISSING
            if isinstance(default, list):
                default, factory = dataclasses.MISSING, lambda value=default: value
        copy = dataclasses.field(default=default, default_factory=factory, metadata=field.metadata, kw_only=True)
        fields.append((field.name, annotations[field.name], copy))
    usage = "%(prog)s [CONFIG.yaml] [--flag value ...]"
    parser = _Parser(dataclasses.make_dataclass(settings_class.__name__, fields), usage=usage)
    flags = {"help", *annotations}
    for name, annotation, copy in fields:
        if annotation is bool:
            flags.add(f"no_{name}")
            if copy.default is not True:  # HfArgumentParser has --no_x only where x defaults to True
                options = f"--no_{name}", f"--no-{name.replace('_', '-')}"
                parser.add_argument(*options, action="store_false", dest=name, default=False)
    for argument in argv:  # argparse would guess at abbreviations, and call a misspelled flag missing
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in flags:
            raise ValueError(f"unknown flag {argument!r}{_suggest(name, flags, '--')}")
    parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r}; one YAML file comes first, flags follow")
    return {name: getattr(parsed, name) for name in annotations}


def _types(settings_class: type) -> dict[str, Any]:
    annotations = typing.get_type_hints(settings_class)
    return {field.name: annotations[field.name] for field in dataclasses.fields(settings_class) if field.init}


def _suggest(name: str, names: typing.Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, sorted(names))
    return f"; did you mean {' or '.join(prefix + match for match in close)}?" if close else ""
