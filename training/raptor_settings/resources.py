"""Finds shipped files, in a clone and when installed: configurations by name, models of the zoo, card templates.

A name is looked for where the user is, and then in the package.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_HERE = Path(__file__).resolve().parents[1]
# a clone has this package in training/, and training/ at its top; a wheel has both beside or inside of raptor_hf
_ROOT = _HERE.parent if _HERE.name == "training" else _HERE / "raptor_hf"
TRAINING = _ROOT / "training"
CONFIGS = TRAINING / "configs"
MODEL_CARDS = _ROOT / "model_cards"
# first folders of the paths in shipped configurations: no account on the Hub that a model of ours comes from
OUR_FOLDERS = ("model_cards", "runs", "training")


def shipped_configs(kind: str) -> dict[str, Path]:
    """The configurations of one recipe that come with the package, by name.

    Args:
        kind: folder in training/configs, such as "distill".
    """
    return {path.stem: path for path in sorted((CONFIGS / kind).glob("*.yaml"))} if kind else {}


def find_config(name: str, kind: str | None) -> Path:
    """Finds the configuration file of a path or, for a shipped one, of a name such as "digits_k3".

    Args:
        name: path from the working directory; else the name, or the path in a clone, of a shipped configuration.
        kind: the recipe's folder in training/configs; None if nothing is shipped for it.

    Raises:
        FileNotFoundError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs(kind or "")
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    if not Path(name).is_absolute() and name.endswith(".yaml") and (_ROOT / name).is_file():
        return _ROOT / name
    advice = suggest(Path(name).stem, shipped)
    if shipped and not advice:
        advice = f"; it must be a YAML file or one of {', '.join(shipped)}"
    raise FileNotFoundError(f"configuration file {name!r} does not exist{advice}")


def find_path(name_or_path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder: from the working directory, or else, in model_cards, from the package."""
    path = Path(name_or_path)
    if not path.exists() and path.parts[:1] == ("model_cards",) and (_ROOT / path).exists():
        return _ROOT / path
    return path


def find_model(name_or_path: str | os.PathLike[str]) -> str:
    """Finds where a model is loaded from: a folder, one of the package's if there is none here, or a name on the Hub.

    Args:
        name_or_path: as the user gave it.

    Returns:
        The argument for `from_pretrained`.

    Raises:
        FileNotFoundError: it can only be a folder, and there is none; the Hub is not asked.
    """
    name, path = os.fspath(name_or_path), find_path(name_or_path)
    is_here = bool(name) and path.exists()  # an empty path is the working directory
    if not is_here and not is_hub_name(name):
        packaged = [f"model_cards/{config.parent.name}" for config in MODEL_CARDS.glob("*/config.json")]
        raise FileNotFoundError(
            f"{name!r} is no such folder, and no repository on the Hub, which is called NAME or OWNER/NAME"
            f"{suggest(name, packaged)}"
        )
    return str(path) if is_here else name


def is_hub_name(name: str) -> bool:
    """Whether a name that is no folder here may be one on the Hub: NAME or ORG/NAME, and no folder of ours."""
    first = name.partition("/")[0]
    is_ours = "/" in name and (first in OUR_FOLDERS or Path(first).is_dir())
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None and not is_ours


def suggest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of an error message, with the names that a misspelled one may stand for."""
    close = difflib.get_close_matches(name, sorted(names))
    return f"; did you mean {' or '.join(prefix + match for match in close)}?" if close else ""
