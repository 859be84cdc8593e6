"""One writer per folder."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raptor_hf.recipes import lock as lock_module
from raptor_hf.recipes.lock import LOCK_FILE, FolderLock, find_writer

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
sys.modules["torch"] = None  # a lock needs none
import importlib.util
spec = importlib.util.spec_from_file_location("lock", "raptor_hf/recipes/lock.py")
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
held = lock.FolderLock.take(sys.argv[1])
held.sign()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_process_is_refused_and_told_of_the_first(tmp_path, other):
    year = time.strftime("%Y")
    with pytest.raises(ValueError, match=rf"another run \(process {other.pid}, since {year}-.*\) writes; wait for it"):
        FolderLock.take(tmp_path)
    assert f"process {other.pid}" in find_writer(tmp_path)


def test_killed_process_leaves_no_lock_behind(tmp_path, other):
    other.kill()
    other.wait()
    assert (tmp_path / LOCK_FILE).exists() and find_writer(tmp_path) is None
    FolderLock.take(tmp_path).release()


def test_workers_of_a_killed_process_do_not_keep_its_lock(tmp_path):
    fork = HOLD.replace('print("held"', 'import os\nif os.fork() == 0:\n    time.sleep(60)\nprint("held"')
    process = subprocess.Popen([sys.executable, "-c", fork, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("children are listed on Linux")
    (worker,) = map(int, children.read_text().split())
    process.kill()
    process.wait()
    try:
        FolderLock.take(tmp_path).release()
    finally:
        os.kill(worker, 9)


def test_released_lock_is_free_and_its_file_gone(tmp_path):
    lock = FolderLock.take(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists() and find_writer(tmp_path) is None


def test_system_without_locks_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "fcntl", None)
    FolderLock.take(tmp_path).release()


def test_disk_without_locks_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "lockf", refuse)
    FolderLock.take(tmp_path).release()
    assert "the disk has no locks" in caplog.text


def test_a_lock_of_windows_refuses_the_second_and_is_given_back(tmp_path, monkeypatch):
    """`msvcrt` as its documentation has it: a locked byte refuses others, and goes free when its file is closed."""
    locked: dict[int, int] = {}

    def locking(descriptor, mode, num_bytes):
        assert (mode, num_bytes) == (2, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) == lock_module._LOCKED_BYTE
        inode = os.fstat(descriptor).st_ino
        holder = locked.get(inode)
        if holder not in (None, descriptor):
            raise OSError(13, "Permission denied")
        locked[inode] = descriptor

    monkeypatch.setattr(lock_module, "fcntl", None)
    monkeypatch.setattr(lock_module, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    held = FolderLock.take(tmp_path)
    held.sign()
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        FolderLock.take(tmp_path)
    locked.clear()  # the system does so when the holder closes the file, or dies
    held.release()
    FolderLock.take(tmp_path).release()
