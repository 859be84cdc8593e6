"""The runs that a study starts: they end when the study does, however it is stopped, except by kill -9."""

import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

# seconds that a run has to end after SIGTERM
_PATIENCE = 30.0


class Children:
    """Processes under way, started from several threads."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    def run(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> int:
        """Run a command to its end, with all that it prints in a file.

        Returns:
            Its exit status; 1 if `stop` was called before it began.
        """
        with log.open("w", encoding="utf-8") as output:
            with self._lock:
                if self._is_stopped:
                    return 1
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
                self._processes.add(process)
            status = process.wait()
        with self._lock:
            self._processes.discard(process)
        return status

    def stop(self) -> None:
        """Pass SIGTERM on to every process, wait for its end, and start none any more."""
        with self._lock:
            self._is_stopped = True
            processes = list(self._processes)
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def exit_on_sigterm() -> None:
    """Have SIGTERM unwind this program, as Ctrl-C does, instead of ending it on the spot."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
