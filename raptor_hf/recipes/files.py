"""Writes files so that a crash, or a reader at the wrong moment, sees the old content or the new, never a part."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# the settings of a run, in its folder
RESOLVED_FILE = "resolved.yaml"


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file so that readers, and a crash, see the old content or the new, never a part.

    Args:
        path: file to create or replace; its folder exists.
        text: the whole content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def write_json(path: str | Path, obj: Any) -> None:
    """Write a result file atomically, as strict JSON that any reader takes.

    NumPy and torch scalars and arrays become numbers and lists. NaN and infinities, which JSON does not have, become
    null: a metric that is not defined (the IoU of a class that no image shows) has no value.

    Args:
        path: file to create or replace; its folder exists.
        obj: nested dicts (with string keys), lists and tuples of the above, strings, booleans and None.

    Raises:
        TypeError: something in it is none of these.
    """
    write_text_atomically(path, json.dumps(as_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def as_plain(obj: Any) -> Any:
    if isinstance(obj, Tensor):
        obj = obj.detach().cpu()
        obj = (obj.float() if obj.dtype == torch.bfloat16 else obj).numpy()  # NumPy has no bfloat16
    if isinstance(obj, np.ndarray | np.generic):
        obj = obj.tolist()
    if isinstance(obj, dict):
        if wrong := [key for key in obj if not isinstance(key, str)]:
            raise TypeError(f"JSON keys are strings, got {wrong[0]!r}")
        return {key: as_plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [as_plain(value) for value in obj]
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if obj is None or isinstance(obj, str | int):
        return obj
    raise TypeError(f"cannot write a {type(obj).__name__} to JSON: {obj!r}")


@contextlib.contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files take their places in `folder` once the block has ended.

    Where the block fails, as on a full disk, `folder` keeps what it had. Weights go before config.json, which makes a
    model of a folder.

    Yields:
        The temporary folder, inside of `folder`.
    """
    folder = Path(folder)
    temporary = folder / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        paths = [path for path in temporary.rglob("*") if path.is_file()]
        for path in paths:
            flush(path)
        for path in sorted(paths, key=lambda path: (path.name == "config.json", path)):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, whatever their order and device; 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def move_aside(path: Path) -> Path:
    """Rename a file or folder to the first free one of NAME.replaced-1, NAME.replaced-2, ...; return the new path.

    Raises:
        OSError: it cannot be renamed, such as a folder on which a disk is mounted.
    """
    path = path.resolve()
    number = 1
    while (target := path.with_name(f"{path.name}.replaced-{number}")).exists():
        number += 1
    try:
        os.rename(path, target)
    except OSError as error:
        raise OSError(f"{path} cannot be moved aside to {target.name}: {error}; choose another folder") from error
    flush(path.parent)
    return target


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rename_over(temporary: Path, target: Path, replaced: Path) -> None:
    """Rename a folder; an older one of that name is moved aside first, so that a whole one always exists.

    Args:
        temporary: the new folder, complete.
        target: its name from now on, on the same disk.
        replaced: new name of what had it before. Left to the caller to remove; what else has this name is removed.
    """
    if target.exists():
        remove(replaced)
        os.rename(target, replaced)
    os.rename(temporary, target)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk: a rename may reach it before the content. Windows does not open folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
