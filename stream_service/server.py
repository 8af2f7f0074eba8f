"""The embedded WSGI server: waitress, set for streams that are open for long."""

import json
import socket
import sys
import threading
import time
import uuid
from typing import Any, Self

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ErrorTask

from stream_service.errors import http_answer

if sys.platform == "win32":
    resource = None
else:
    import resource

SPARE_THREADS = 16  # beside one for each open request: for GET routes and refusals
CONNECTION_LIMIT = 8192  # waitress stops accepting at it, without an answer: keep it far away
SPARE_FILES = 256  # descriptors for what is no connection
IDLE_SECONDS = 60  # after which a connection without a request is closed
FLUSH_SECONDS = 5.0  # for the last events of open streams, when the service ends
SILENT_READER_MS = 30_000  # a reader that takes nothing for so long is dropped
UNSENT_BYTES = 256 * 1024  # of an answer that is not read; then its writer waits


class JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress itself refuses (a malformed or too large request), in the service's shape."""

    def execute(self) -> None:
        error, request_id = self.request.error, uuid.uuid4().hex
        body, status = http_answer(error.code, f"{error.reason}: {error.body}", request_id)
        data = json.dumps(body).encode()
        self.status = f"{status} {error.reason}"
        self.response_headers += [
            ("Content-Type", "application/json"),
            ("Cache-Control", "no-store"),
            ("X-Request-Id", request_id),
        ]
        self.set_close_on_finish()
        self.content_length = len(data)
        self.write(data)


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Refuses what two servers in a row could read as two different requests (RFC 9112, 6.3)."""

    def parse_header(self, header_plus: bytes) -> None:
        if b"\r\n " in header_plus or b"\r\n\t" in header_plus:
            raise ParsingError("a header is folded over two lines")
        super().parse_header(header_plus)
        encodings = header_plus.lower().count(b"\ntransfer-encoding:")
        if encodings > 1 or (encodings and "CONTENT_LENGTH" in self.headers):
            raise ParsingError("two headers say differently how long the body is")
        if "," in self.headers.get("HOST", ""):
            raise ParsingError("Host is given twice")


class Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = JsonErrorTask
    parser_class = Parser


def loading(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The application until there is a model: the process lives, but cannot serve yet."""
    if environ["PATH_INFO"] == "/health":
        body, status = {"status": "loading"}, "200 OK"
    else:
        body, _ = http_answer(503, "the model is loading; try again soon", uuid.uuid4().hex)
        status = "503 Service Unavailable"
    data = json.dumps(body).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    start_response(status, [*headers, ("Cache-Control", "no-store"), ("Retry-After", "2")])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [data]


class Server:
    """A bound and listening server. `start` serves, on a thread of its own, until `close`.

    It answers that it is loading until `open` gives it an application.
    """

    def __init__(self, listening: socket.socket, *, max_body: int):
        """max_body: bytes of a request's body."""
        self._server: Any = waitress.create_server(
            loading,
            sockets=[listening],
            threads=SPARE_THREADS,
            connection_limit=min(CONNECTION_LIMIT, _most_files() - SPARE_FILES),
            channel_timeout=IDLE_SECONDS,
            cleanup_interval=IDLE_SECONDS // 4,
            asyncore_use_poll=True,
            channel_request_lookahead=1,  # else a disconnect is not seen while a request runs
            max_request_body_size=max_body,
            max_request_header_size=64 * 1024,
            outbuf_high_watermark=UNSENT_BYTES,
            ident=None,
        )
        self._server.channel_class = Channel
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.effective_port)

    def open(self, app: Any, *, max_open: int) -> None:
        """Serve `app` from now on. max_open: requests that it may hold at a time.

        Each open stream holds a thread; there are always some left to say no.
        """
        self._server.task_dispatcher.set_thread_count(max_open + SPARE_THREADS)
        self._server.application = app

    def start(self) -> Self:
        """Serve from now on."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Let the open answers end, and return when all threads have ended.

        The engine must be closed before, or the answers do not end.
        """
        self._closing = True
        self._server.pull_trigger()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._poll(1.0)
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._is_answering() and time.monotonic() < deadline:
            self._poll(0.05)
        self._server.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(self._server._map)

    def _poll(self, timeout: float) -> None:
        wasyncore.loop(timeout=timeout, use_poll=True, map=self._server._map, count=1)

    def _is_answering(self) -> bool:
        channels = list(self._server.active_channels.values())
        return any(channel.requests or channel.total_outbufs_len for channel in channels)


def _most_files() -> int:
    """How many files this process may have open; as many as the system lets it ask for."""
    if resource is None:
        return CONNECTION_LIMIT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTION_LIMIT + SPARE_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Bound before the model loads: an address in use is known at once.

    Raises `OSError`. Port 0 takes any free one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by the accepted connections
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_READER_MS)
    return listening
