"""Lets one process at a time write into a folder; the lock ends with the process, however that ends.

lock = FolderLock.take("runs/digits_k3")  # ValueError naming the other process, if one writes there
lock.release()
"""

import contextlib
import errno
import json
import logging
import os
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Windows refuses to read locked bytes: the locked one lies far behind what the file holds
_LOCKED_BYTE = 1 << 30
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class FolderLock:
    """The right to write into a folder, held until `release` or the end of this process.

    Args:
        folder: the locked folder.
        descriptor: of the open lock file.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, folder: str | Path) -> "FolderLock":
        """Take the lock of a folder that exists.

        Raises:
            ValueError: another process holds it; the message names that process and since when it runs.
        """
        path = Path(folder) / LOCK_FILE
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(descriptor)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _HELD:
                    raise
                raise ValueError(
                    f"output_dir is {str(folder)!r}, into which {_holder(path)} writes; wait for it, stop "
                    "it, or choose another folder"
                ) from None
            # the run that had the lock may have removed the file after it was opened here
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return cls(Path(folder), descriptor)
            os.close(descriptor)

    def sign(self) -> None:
        """Write into the lock who holds it, for the message to others."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        text = json.dumps({"pid": os.getpid(), "since": since})
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, text.encode())

    def release(self) -> None:
        """Give the lock back and remove its file; done twice it changes nothing."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # Windows does not remove an open file, which is harmless
            (self.folder / LOCK_FILE).unlink()
        os.close(self._descriptor)
        self._descriptor = None


def find_writer(folder: str | Path) -> str | None:
    """The process that holds the lock of a folder, in words; None if there is none. Changes nothing."""
    path = Path(folder) / LOCK_FILE
    if not path.exists():
        return None
    descriptor = os.open(path, os.O_RDWR)
    try:
        _lock(descriptor)
    except OSError as error:
        return _holder(path) if error.errno in _HELD else None
    finally:
        os.close(descriptor)
    return None


def _lock(descriptor: int) -> None:
    # Not flock: that lock would pass to forked workers of a loader, which outlive a killed run by seconds.
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise
            logger.warning("the disk has no locks (%s): nothing stops a second run from writing there, too", error)
    elif msvcrt is not None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)


def _holder(path: Path) -> str:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"another run (process {record['pid']}, since {record['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has not signed yet
        return "another run"
