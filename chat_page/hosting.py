"""Serves the page, and ends it together with the service."""

import _thread
import os
import signal
import socket
import sys
import threading

import gradio as gr

from chat_page.look import HEAD, STYLE, THEME
from chat_page.reply import REPLIES_AT_ONCE
from chat_page.words import i18n
from stream_service.loopback import bypass_proxies

PORT = 7860
OTHER_THREADS = 16  # for events that write no reply


def serve(page: gr.Blocks, host: str, *, auth: tuple[str, str] | None, share: bool) -> None:
    """Serve the page until the process is interrupted. Raises `OSError` if its port is in use."""
    host, port = server_address(host)
    bypass_proxies(host)  # Gradio requests its own address to see whether it works
    page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=share,
        max_threads=REPLIES_AT_ONCE + OTHER_THREADS,
        max_file_size=1,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        i18n=i18n,
        theme=THEME,
        css=STYLE,
        head=HEAD,
    )


def server_address(host: str) -> tuple[str, int]:
    """Return the host, as URLs spell it, and the port. Raises `OSError` if the port is in use.

    GRADIO_SERVER_PORT sets the port; 0 means any free one. Gradio itself would silently take the
    next free port. Browsers store data per port, so the user's conversations would be missing.
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

    The service holds the other end of the pipe, which closes even if the service is killed.
    """

    def wait() -> None:
        # Not through sys.stdin: its lock would still be held when the interpreter ends.
        while os.read(stdin, 1024):
            continue
        # Not SIGINT: programs that a shell starts in the background ignore it.
        _thread.interrupt_main(signal.SIGTERM)

    stdin = sys.stdin.fileno()
    threading.Thread(target=wait, name="stdin", daemon=True).start()
