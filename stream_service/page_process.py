"""The chat page as a process of its own: it knows the service by its address alone."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


class PageProcess:
    """Runs the page beside the service, and ends it with the service.

    The page reads its standard input and ends when that closes, which also happens when the service
    is killed.
    """

    def __init__(
        self, script: Path, environment: Mapping[str, str], when_failed: Callable[[], None]
    ):
        """when_failed: called, on another thread, if the page could not start."""
        self.failed = False
        self._ending = False
        self._when_failed = when_failed
        self._process = subprocess.Popen(
            [sys.executable, str(script), "--until-stdin-closes"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            # Not of the terminal's group: Ctrl-C must not end the page before the streams that it
            # shows.
            start_new_session=True,
        )
        self._watcher = threading.Thread(target=self._watch, name="page", daemon=True)
        self._watcher.start()

    def end(self) -> None:
        """End the page and return when it has ended."""
        self._ending = True
        self._process.terminate()
        self._watcher.join()

    def kill(self) -> None:
        """End the page at once."""
        self._ending = True
        self._process.kill()

    def _watch(self) -> None:
        with self._process as process:  # which closes its input afterwards
            status = process.wait()
        if self._ending:
            return
        if status > 0:  # once it is up, only a signal ends it
            logger.error(
                "the chat page could not start, so the service ends; leave out --app to serve "
                "without a page"
            )
            self.failed = True
            self._when_failed()
        elif status == 0:
            logger.info("the chat page was ended")
        else:
            logger.error(
                "the chat page ended with status %d; the service goes on without it", status
            )


def page_environment(
    host: str, port: int, service_address: str, api_key: str | None
) -> dict[str, str]:
    """What the page reads from its environment."""
    environment = {
        "LLAMA3_ADDRESS": service_address,
        "GRADIO_SERVER_NAME": f"[{host}]" if ":" in host else host,
        "GRADIO_SERVER_PORT": str(port),
    }
    return environment if api_key is None else {**environment, "LLAMA3_API_KEY": api_key}
