"""The two commands as processes, each on its own port."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Process:
    """One of the two commands, at a fixed address. It has started when it prints `ready`."""

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
        lines = []
        for line in output:
            lines.append(line)
            if self._ready in line:
                break
        else:
            raise AssertionError("".join(lines))
        # Read the rest of the output, or the process would block when the pipe is full.
        self._reader = threading.Thread(target=output.read)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End the process without a chance to clean up, as when the power fails."""
        self._end_by(signal.SIGKILL)

    def end(self) -> None:
        self._end_by(signal.SIGTERM)

    def _end_by(self, number: signal.Signals) -> None:
        with self._process as process:  # waits for the process and closes its pipe
            process.send_signal(number)
            self._reader.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
