"""The folder of a run and the settings in it; how settings are declared and parsed is in raptor_settings.

settings = parse_settings(DistillSettings)  # python distill.py [CONFIG.yaml | NAME] [--flag value ...]
if accelerator.is_main_process:
    prepare_output_dir(settings.output_dir, settings)
accelerator.wait_for_everyone()
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from raptor_settings.declare import settings_to_dict
from raptor_settings.parse import parse_settings, read_yaml, user_errors

from .files import RESOLVED_FILE, write_text_atomically

__all__ = ["parse_settings", "prepare_output_dir", "save_settings", "settings_to_dict", "user_errors"]

CHECKPOINT_FOLDER = "checkpoints"
# settings that do not change what a run computes
RUN_ONLY = (
    *("output_dir", "override", "num_workers", "tracker", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("max_nonfinite_steps", "max_decode_failures", "cache_gb"),
)


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
    old, new = read_yaml(resolved), settings_to_dict(settings)
    changes = [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in dict.fromkeys((*old, *new))
        if key not in ignore and (key not in old or key not in new or old[key] != new[key])
    ]
    if changes:
        raise ValueError(f"{folder} belongs to a run with other settings ({', '.join(changes)}); {advice}")
