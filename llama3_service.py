"""The command: arguments, then checkpoint, engine, application and server.

python llama3_service.py [--ckpts DIRECTORY_OR_HUB_ID] [--app]
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

PAGE = Path(__file__).with_name("llama3_app.py")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Stream the replies of a language model, token by token, over HTTP."
    )
    add = parser.add_argument
    add("-H", "--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("-P", "--port", type=_port, default=8800, help="port to listen on (%(default)s)")
    add(
        "-c",
        "--ckpts",
        metavar="MODEL",
        help="directory in Hugging Face format, or hub id (a small demo model)",
    )
    add(
        "--quantize",
        choices=["auto", "none", "int8", "int4"],
        default="auto",
        help="bits of each weight; auto: as the checkpoint has them (%(default)s)",
    )
    add("--app", action="store_true", help="start the chat page too")
    add("--app-port", type=_port, default=7860, help="port of the chat page (%(default)s)")
    add(
        "--max-concurrent",
        type=_positive,
        metavar="N",
        help="requests that are served at the same time (as the memory allows, at most 32)",
    )
    add(
        "--max-context",
        type=_positive,
        metavar="TOKENS",
        help="prompt and reply together (the model's own limit, if the memory allows)",
    )
    add(
        "--max-queue",
        type=_positive,
        default=32,
        metavar="N",
        help="requests that may wait; one more gets status 429 (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal ends it; returns the exit status."""
    args = parse_arguments(arguments)
    limit_spinning()
    # Imported here, so that --help and a mistyped flag answer at once.
    from stream_service.server import Server, bind

    try:
        listening = bind(args.host, args.port)
    except OSError as error:
        print(
            f"cannot listen on {args.host}:{args.port}: {error.strerror}; "
            "choose another --port, or end what is using it",
            file=sys.stderr,
        )
        return 1

    from stream_generator.checkpoint import load_checkpoint
    from stream_generator.engine import Engine
    from stream_generator.errors import CheckpointError
    from stream_generator.model_runner import runner_for
    from stream_service.app import MAX_BODY_BYTES, create_app

    try:
        checkpoint = load_checkpoint(args.ckpts, args.quantize)
        runner = runner_for(
            checkpoint.model,
            checkpoint.context_length,
            max_concurrent=args.max_concurrent,
            max_context=args.max_context,
        )
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ended while loading", file=sys.stderr)
        return 1
    print(f"{checkpoint.name}: {runner.describe()}", flush=True)
    engine = Engine(checkpoint, max_waiting=args.max_queue, runner=runner)
    server = Server(
        create_app(engine),
        listening,
        max_open=args.max_queue + engine.max_running,
        max_body=MAX_BODY_BYTES,
    )

    def end(signal_number: int, frame: object) -> None:
        if ending.is_set():  # a second one ends at once, and the page with it
            if page is not None:
                page.kill()
            os._exit(1)
        ending.set()
        engine.stop()

    ending = threading.Event()
    page: subprocess.Popen[bytes] | None = None
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    address = f"http://{_reachable(args.host)}:{server.port}"
    page = _start_page(args, address) if args.app else None
    print(
        f"{checkpoint.name} is ready at {address}. Try:\n\n    {_curl_line(address)}\n", flush=True
    )
    # The computing stays on this thread, which has loaded the model (see `Engine`).
    serving = threading.Thread(target=server.run, name="server")
    serving.start()
    try:
        engine.run()
    finally:
        server.stop()
        serving.join()
        if page is not None:
            page.terminate()
            page.wait()
    return 1 if engine.failed else 0


def limit_spinning() -> None:
    """Let torch's threads wait less busily, unless the environment says how.

    Read when torch is imported. See docs/performance.md: with GNU OpenMP's own figure one busy
    neighbour on the machine slows each token twentyfold.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _start_page(args: argparse.Namespace, address: str) -> "subprocess.Popen[bytes]":
    """The chat page, as a process of its own: it knows the service by its address alone."""
    environment = {
        **os.environ,
        "LLAMA3_ADDRESS": address,
        "GRADIO_SERVER_NAME": args.host,
        "GRADIO_SERVER_PORT": str(args.app_port),
    }
    return subprocess.Popen([sys.executable, str(PAGE)], env=environment)


def _curl_line(address: str) -> str:
    body = '{"query": "Explain how a rainbow forms."}'
    return f"curl -N -H 'Content-Type: application/json' -d '{body}' {address}/stream"


def _reachable(host: str) -> str:
    """The host as a client on this machine writes it."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _port(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; use 0 to 65535")
    return value


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
