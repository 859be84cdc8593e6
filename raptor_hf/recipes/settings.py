"""Prepares the folder of a run and keeps its settings there; raptor_settings declares and parses settings.

settings = parse_settings(DistillSettings)  # python distill.py [CONFIG.yaml | NAME] [--flag value ...]
if accelerator.is_main_process:
    prepare_output_dir(settings.output_dir, settings)
accelerator.wait_for_everyone()
"""

import logging
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from raptor_settings.declare import settings_to_dict
from raptor_settings.parse import parse_settings, read_yaml, user_errors

from .files import RESOLVED_FILE, move_aside, write_text_atomically

logger = logging.getLogger(__name__)

__all__ = ["parse_settings", "prepare_output_dir", "save_settings", "settings_to_dict", "user_errors"]

CHECKPOINT_FOLDER = "checkpoints"
# settings that do not change what a run computes, but for states that a cache rounds where the arithmetic is in bf16
RUN_ONLY = (
    *("output_dir", "override", "num_workers", "tracker", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("max_nonfinite_steps", "max_rising_steps", "max_decode_failures"),
    *("cache_gb", "trajectory_cache_gb", "trajectory_cache_dir"),
    # of the evaluation: what was evaluated otherwise is evaluated again
    *("test_split", "eval_batch_size", "eval_images", "eval_sizes", "eval_every", "metric", "quick_checks", "knn_k"),
)
# first line of the resolved settings, which YAML takes for a comment
_RUN_ID = "# run_id: "


def save_settings(path: str | Path, settings: Any, run_id: str | None = None) -> None:
    """Write settings as a YAML file that can be given back to the recipe as its CONFIG.yaml.

    Args:
        path: file to create or replace.
        settings: of a run.
        run_id: of the run, a comment in the first line.
    """
    text = yaml.safe_dump(settings_to_dict(settings), sort_keys=False, allow_unicode=True)
    write_text_atomically(path, (f"{_RUN_ID}{run_id}\n" if run_id else "") + text)


def read_run_id(folder: str | Path) -> str | None:
    """The id of the run in a folder, from its resolved settings; None if there is none, as of older versions."""
    try:
        first = (Path(folder) / RESOLVED_FILE).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return None
    return first.removeprefix(_RUN_ID).strip() if first.startswith(_RUN_ID) else None


def prepare_output_dir(
    output_dir: str | Path,
    settings: Any,
    *,
    override: bool = False,
    needed_bytes: int = 0,
    ignore: Sequence[str] = RUN_ONLY,
    inputs: Sequence[str] = (),
) -> Path:
    """Create or check the folder of a run before long work begins, and write the resolved settings into it.

    A folder with the same settings is taken: that is how a run resumes. To be called by the main process alone.

    Args:
        output_dir: the folder; created with its parents.
        settings: the settings of this run.
        override: take the name of the folder even if a run with other settings has it. That whole folder is moved aside
            first, to NAME.replaced-1: no file of the two runs is ever mixed.
        needed_bytes: free space that the run will want there.
        ignore: names of settings that may differ on resuming, as they do not change the weights.
        inputs: files and folders that the run reads from, which must not be moved aside.

    Returns:
        `output_dir` as a Path.

    Raises:
        ValueError: the folder holds a run with other settings (the message shows them), or a model without settings.
        OSError: it cannot be created or written, or has not enough free space.
    """
    folder = check_output_dir(output_dir, needed_bytes)
    run_id = read_run_id(folder) or uuid.uuid4().hex[:12]
    try:
        check_same_run(folder, settings, ignore)
    except ValueError:
        if not override:
            raise
        for name in inputs:
            if Path(name).resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"output_dir is {str(folder)!r}, from which this run reads {name!r}; override moves it aside, "
                    "so it must be another folder"
                ) from None
        logger.warning("moved the former run to %s", move_aside(folder))
        folder.mkdir()
        run_id = uuid.uuid4().hex[:12]
    save_settings(folder / RESOLVED_FILE, settings, run_id)
    return folder


def check_output_dir(output_dir: str | Path, needed_bytes: int = 0, setting: str = "output_dir") -> Path:
    """Create a folder, or check that it can be written to and has enough free space; returns its path.

    Args:
        output_dir: the folder.
        needed_bytes: free space that it must have.
        setting: that names it, for messages.

    Raises:
        OSError: it cannot be created or written, or has not enough free space.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{setting}={str(folder)!r} is not a folder that can be written to: {error}") from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"{setting}={str(folder)!r} is on a disk with {free / 1e9:,.2f} GB free, and the run needs "
            f"{needed_bytes / 1e9:,.2f} GB; free some space or choose another folder"
        )
    return folder


def check_same_run(folder: Path, settings: Any, ignore: Sequence[str] = RUN_ONLY) -> None:
    """Refuse a folder of another run; writes nothing.

    Args:
        folder: need not exist.
        settings: of the run that is to write there.
        ignore: names of settings that may differ.

    Raises:
        ValueError: the folder holds a run with other settings (the message shows them), or a model without settings.
    """
    advice = "choose another folder, or override to write into this one"
    resolved = folder / RESOLVED_FILE
    if not resolved.exists():
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} holds a model of unknown settings (no {RESOLVED_FILE}); {advice}")
        return
    old, new = read_yaml(resolved), settings_to_dict(settings)
    changes = [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in dict.fromkeys((*old, *new))
        if key not in ignore and (key not in old or key not in new or old[key] != new[key])
    ]
    if changes:
        raise ValueError(f"{folder} belongs to a run with other settings ({', '.join(changes)}); {advice}")
