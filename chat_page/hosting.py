"""Where the page listens, and how long it lives."""

import _thread
import os
import signal
import socket
import sys
import threading

PORT = 7860


def server_address(host: str) -> tuple[str, int]:
    """The host, as it stands in a URL, and the port to listen on. Raises `OSError` if in use.

    The port is Gradio's own variable; 0 takes any free one. Gradio itself would silently take the
    next port, where the browser finds none of the visitor's conversations.
    """
    port = int(os.environ.get("GRADIO_SERVER_PORT", PORT))
    plain = host.strip("[]")
    host = f"[{plain}]" if ":" in plain else plain
    try:
        family = socket.AF_INET6 if ":" in plain else socket.AF_INET
        with socket.create_server((plain, port), family=family) as free:
            return host, int(free.getsockname()[1])
    except OSError as error:
        raise OSError(
            f"it cannot listen on {host}:{port}: {error.strerror}; choose another --app-port "
            "(GRADIO_SERVER_PORT) or --host (GRADIO_SERVER_NAME), or stop the program that uses "
            "the port"
        ) from error


def end_when_stdin_closes() -> None:
    """Raise SIGTERM in the main thread when standard input ends.

    The service holds the other end, and is gone then, even if it was killed.
    """

    def wait() -> None:
        # Not by sys.stdin, whose lock would be held when the interpreter ends.
        while os.read(stdin, 1024):
            continue
        # SIGINT is ignored by programs that a shell started in the background.
        _thread.interrupt_main(signal.SIGTERM)

    stdin = sys.stdin.fileno()
    threading.Thread(target=wait, name="stdin", daemon=True).start()
