"""Runs the chat page as a child process."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


class PageProcess:
    """Runs the chat page, and ends the page with the service.

    The page ends when its standard input closes, which happens even if the service is killed.
    """

    def __init__(
        self, script: Path, environment: Mapping[str, str], when_failed: Callable[[], None]
    ):
        """when_failed: called on another thread if the page cannot start."""
        self.failed = False
        self._ending = False
        self._when_failed = when_failed
        self._process = subprocess.Popen(
            [sys.executable, str(script), "--until-stdin-closes"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            # Ctrl-C in the terminal must not end the page before the streams that the page shows.
            start_new_session=True,
        )
        self._watcher = threading.Thread(target=self._watch, name="page", daemon=True)
        self._watcher.start()

    def end(self) -> None:
        """End the page, and wait until it has ended."""
        self._ending = True
        self._process.terminate()
        self._watcher.join()

    def kill(self) -> None:
        """Kill the page, and do not wait."""
        self._ending = True
        self._process.kill()

    def _watch(self) -> None:
        with self._process as process:  # closes the pipe afterwards
            status = process.wait()
        if self._ending:
            return
        if status > 0:  # the status of a page that could not start
            logger.error(
                "the chat page could not start, so the service ends; leave out --app to serve "
                "without a page"
            )
            self.failed = True
            self._when_failed()
        elif status == 0:
            logger.info("the chat page has ended")
        else:
            logger.error("signal %d ended the chat page; the service continues without it", -status)


def page_environment(
    host: str, port: int, service_address: str, api_key: str | None
) -> dict[str, str]:
    """Create the environment variables that the page reads."""
    environment = {
        "LLAMA3_ADDRESS": service_address,
        "GRADIO_SERVER_NAME": f"[{host}]" if ":" in host else host,
        "GRADIO_SERVER_PORT": str(port),
    }
    return environment if api_key is None else {**environment, "LLAMA3_API_KEY": api_key}
