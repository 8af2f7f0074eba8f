"""The commands as processes, at ports of their own."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Process:
    """One of the two commands, at an address that it keeps. It is up when it prints `ready`."""

    def __init__(self, *command: str, ready: str, port: int, environment: dict[str, str]):
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, *command]
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self._ready = ready
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = self._process.stdout
        assert output is not None
        said = []
        for line in output:
            said.append(line)
            if self._ready in line:
                break
        else:
            raise AssertionError("".join(said))
        # What else it says must be read, or it would wait for a reader some day.
        self._reader = threading.Thread(target=output.read)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """At once, as when the power fails."""
        self._end_by(signal.SIGKILL)

    def end(self) -> None:
        self._end_by(signal.SIGTERM)

    def _end_by(self, number: signal.Signals) -> None:
        with self._process as process:  # which waits, and closes what it was read by
            process.send_signal(number)
            self._reader.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
