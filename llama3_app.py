"""The chat page: a Gradio application that streams replies from the service.

    python llama3_app.py        or        gradio llama3_app.py

The page calls the service at LLAMA3_ADDRESS, or http://127.0.0.1:8800. It sends the key in
LLAMA3_API_KEY to the service, and never to a browser. `chat_page/` holds the page itself.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile

# Gradio reads both variables at import, and can look for a free port only at an IPv4 host.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
HOST = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
if ":" in HOST:
    del os.environ["GRADIO_SERVER_NAME"]

import gradio as gr

from chat_page.hosting import end_when_stdin_closes, serve
from chat_page.page import Page
from stream_service.client import StreamClient

ADDRESS = "http://127.0.0.1:8800"

demo = Page(
    StreamClient(
        os.environ.get("LLAMA3_ADDRESS", ADDRESS), api_key=os.environ.get("LLAMA3_API_KEY")
    )
).blocks


def main() -> None:
    """Serve the page until the process is interrupted."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the directory is removed
    interrupted = contextlib.suppress(KeyboardInterrupt)
    with interrupted, tempfile.TemporaryDirectory(prefix="llm-chat-page-") as empty:
        if args.until_stdin_closes:
            end_when_stdin_closes()
        os.environ["GRADIO_TEMP_DIR"] = empty
        os.chdir(empty)  # Gradio may serve files of its working directory
        try:
            serve(demo, HOST, auth=args.auth, share=args.share)
        except Exception as error:
            sys.exit(f"the chat page could not start: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args()
    name, _, password = (args.auth or "").partition(":")
    if args.auth and not (name and password):
        parser.error("--auth must have the form NAME:PASSWORD")
    args.auth = (name, password) if args.auth else None
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serve the chat page of a running service.")
    parser.add_argument(
        "--auth",
        metavar="NAME:PASSWORD",
        default=os.environ.get("LLAMA3_APP_AUTH"),
        help="ask visitors for this name and password. Other users of the machine can read a "
        "command line, so LLAMA3_APP_AUTH is safer (default: LLAMA3_APP_AUTH, or no password)",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="also open a public address at Gradio's relay (default: off)",
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return parser


# `gradio llama3_app.py` runs this file again after each change, and needs only `demo`.
if __name__ == "__main__" and gr.NO_RELOAD:
    main()
