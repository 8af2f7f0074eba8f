"""Where the page listens, and when it ends."""

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
OTHER_THREADS = 16  # for events without a reply


def serve(page: gr.Blocks, host: str, *, auth: tuple[str, str] | None, share: bool) -> None:
    """Serve the page until the process is interrupted. Raises `OSError` if its port is in use."""
    host, port = server_address(host)
    bypass_proxies(host)  # Gradio asks its own address whether it can be reached
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
