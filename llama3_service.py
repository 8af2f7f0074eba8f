"""The command of the service: parse flags, load the model, serve it, shut down.

python llama3_service.py [--ckpts DIRECTORY_OR_HUB_ID] [--app]
"""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from stream_generator.threads import settle_threads
from stream_service.command_line import parse_arguments
from stream_service.loopback import is_loopback_url

if TYPE_CHECKING:  # imported late at run time, so that --help and wrong flags answer at once
    from stream_generator.engine.engine import Engine
    from stream_generator.loaded_model import Checkpoint
    from stream_service.server import Server

PAGE = Path(__file__).with_name("llama3_app.py")


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal ends the service. Returns the exit status."""
    args = parse_arguments(arguments)
    if args.cache is not None:
        from stream_generator.loading.cache_listing import list_or_delete

        return list_or_delete(args.cache)
    threads = settle_threads(args.threads)
    start_log(args.log_json)
    from stream_generator.errors import CheckpointError

    try:
        if args.check:
            load(args, threads)
            return 0
        server = listen(args)
        engine = load(args, threads, server)
    except (CannotListen, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted while the model was loading", file=sys.stderr)
        return 1
    return serve(args, server, engine)


class CannotListen(Exception):
    """The command cannot use one of its ports."""


def listen(args: argparse.Namespace) -> "Server":
    """Start a server that reports that the model is loading. Raises `CannotListen`."""
    from stream_service.server import Server, bind

    try:
        flag, port = "--app-port", args.app_port
        if args.app:  # the page starts later, when the model is loaded
            bind(args.host, port).close()
        flag, port = "--port", args.port
        listening = bind(args.host, port)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {args.host}:{port}: {error.strerror}; choose another {flag}, or end "
            "the program that uses this port"
        ) from error
    return Server(listening, max_body=args.settings.max_body).start()


def load(args: argparse.Namespace, threads: int, server: "Server | None" = None) -> "Engine":
    """Load the model, print what it is, and connect its engine to the server, if there is one.

    Raises `CheckpointError`.
    """
    from stream_generator.engine import warm_up
    from stream_generator.engine.engine import Engine
    from stream_generator.engine.runners import runner_of
    from stream_generator.loading.load import load_checkpoint
    from stream_generator.model import processor
    from stream_service.app import create_app

    checkpoint = load_checkpoint(
        args.ckpts,
        args.quantize,
        name=args.served_model_name,
        dtype=args.dtype,
        device=args.device,
        device_map=args.device_map,
        allow_pickle=args.allow_pickle,
    )
    runner = runner_of(checkpoint, max_concurrent=args.max_concurrent, max_context=args.max_context)
    engine = Engine(
        checkpoint,
        max_waiting=args.max_queue,
        max_seconds=args.max_time,
        runner=runner,
        reproducible=args.reproducible,
    )
    speed = warm_up.tokens_per_second(checkpoint, runner)
    print(f"{checkpoint.describe()}\n{runner.describe()}", flush=True)
    print(_speed_line(checkpoint, threads, processor.describe(), speed), flush=True)
    app = create_app(engine, args.settings, tokens_per_second=speed)
    if server is not None:
        server.open(app, max_open=engine.intake.requests)
    return engine


def serve(args: argparse.Namespace, server: "Server", engine: "Engine") -> int:
    """Serve until a signal or a failure, and return the exit status. This thread computes."""
    from stream_service.page_process import PageProcess, page_environment

    def end(signal_number: int, frame: object) -> None:
        if ending.is_set():  # a second signal ends service and page at once
            if page is not None:
                page.kill()
            os._exit(1)
        ending.set()
        engine.drain(args.drain)

    ending = threading.Event()
    page: PageProcess | None = None
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, end)  # the terminal closed; nohup ignores this signal
    address = f"http://{_reachable(args.host)}:{server.port}"
    if args.app:
        key = args.settings.api_keys[0] if args.settings.api_keys else None
        page = PageProcess(
            PAGE,
            page_environment(args.host, args.app_port, address, key),
            when_failed=lambda: engine.drain(args.drain),
        )
    print(_welcome(args, engine.checkpoint, address), flush=True)
    try:
        engine.run()
    finally:
        server.close()
        if page is not None:
            page.end()
    return 1 if engine.life.has_failed or (page is not None and page.failed) else 0


def _speed_line(checkpoint: "Checkpoint", threads: int, processor: str, speed: float | None) -> str:
    device = checkpoint.device
    if device.type == "cpu":
        where = f"{threads} thread{'s' * (threads > 1)} on a processor with {processor}"
    else:
        where = str(device)
    if speed is None:
        return where
    return f"{where}: one stream gets {speed:.{0 if speed >= 10 else 1}f} tokens per second"


def start_log(as_json: bool) -> None:
    """Log to stderr: this project from INFO on, and libraries from WARNING on."""
    handler = logging.StreamHandler()
    if as_json:
        from pythonjsonlogger.json import JsonFormatter

        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("stream_generator", "stream_service"):
        logging.getLogger(name).setLevel(logging.INFO)


def _welcome(args: argparse.Namespace, checkpoint: "Checkpoint", address: str) -> str:
    """Return the text that the command prints when the service is ready."""
    path, body = "stream", '{"query": "Explain how a rainbow forms."}'
    if not checkpoint.chat.can_chat:
        path, body = "v1/completions", '{"prompt": "A rainbow forms", "stream": true}'
    keys = args.settings.api_keys
    is_open = not keys and not args.is_loopback
    warning = (
        f"\nWARNING: the service listens on {args.host} without an API key, so other machines can "
        "use it. Set a key with LLAMA3_API_KEY or --api-key-file.\n"
    )
    options = "-H 'Content-Type: application/json'"
    if keys:
        options = f"-H 'Authorization: Bearer YOUR_KEY' {options}"
    if _needs_noproxy(address):
        options = f"--noproxy '*' {options}"
    return (
        f"{checkpoint.name} is ready at {address} (OpenAI clients: {address}/v1; "
        f"documentation: {address}/docs). Try:\n\n"
        f"    curl -N {options} -d '{body}' {address}/{path}\n"
        f"{warning if is_open else ''}"
    )


def _needs_noproxy(address: str) -> bool:
    """Tell whether clients would ask a proxy for this address, which no proxy can reach."""
    has_proxy = bool(getproxies().keys() & {"http", "all"})
    return is_loopback_url(address) and has_proxy and not proxy_bypass(urlsplit(address).netloc)


def _reachable(host: str) -> str:
    """Return the host that clients on this machine write into a URL."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    sys.exit(main())
