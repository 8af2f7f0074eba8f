"""The WSGI server: waitress, configured for long streams."""

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

SPARE_THREADS = 16  # for GET routes and rejections, besides one thread for each open request
CONNECTION_LIMIT = 8192  # high, because waitress gives further connections no answer
SPARE_FILES = 256  # descriptors for files that are not connections
IDLE_SECONDS = 60  # a connection without a request is closed after this time
FLUSH_SECONDS = 5.0  # time for the last events of open streams at shutdown
SILENT_READER_MS = 30_000  # a client that reads nothing for this time is disconnected
UNSENT_BYTES = 256 * 1024  # an answer with more unread bytes waits for its client


class JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers requests that waitress itself rejects, in the form of the service's errors."""

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
    """Rejects requests that a proxy and this server could read differently (RFC 9112, 6.3)."""

    def parse_header(self, header_plus: bytes) -> None:
        if b"\r\n " in header_plus or b"\r\n\t" in header_plus:
            raise ParsingError("a header is folded over two lines; send it on one line")
        super().parse_header(header_plus)
        encodings = header_plus.lower().count(b"\ntransfer-encoding:")
        if encodings > 1 or (encodings and "CONTENT_LENGTH" in self.headers):
            raise ParsingError("two headers give the length of the body; send only one")
        if "," in self.headers.get("HOST", ""):
            raise ParsingError("the header Host is given twice; send it once")


class Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = JsonErrorTask
    parser_class = Parser


def loading(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The application while the model loads. Status 200 for `/health`, 503 for other routes."""
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
    """A listening server. `start` serves on a new thread until `close`.

    Before `open`, the server answers that the model is loading.
    """

    def __init__(self, listening: socket.socket, *, max_body: int):
        """max_body: maximum bytes of a request's body."""
        self._server: Any = waitress.create_server(
            loading,
            sockets=[listening],
            threads=SPARE_THREADS,
            connection_limit=min(CONNECTION_LIMIT, _file_limit() - SPARE_FILES),
            channel_timeout=IDLE_SECONDS,
            cleanup_interval=IDLE_SECONDS // 4,
            asyncore_use_poll=True,
            channel_request_lookahead=1,  # detects disconnects while a request runs
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
        """Serve `app` from now on. max_open: maximum number of open requests.

        Each open request uses one thread. The server has `SPARE_THREADS` more, so one is always
        free to reject further requests.
        """
        self._server.task_dispatcher.set_thread_count(max_open + SPARE_THREADS)
        self._server.application = app

    def start(self) -> Self:
        """Serve on a new thread."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Wait up to `FLUSH_SECONDS` until the open answers are sent, then end the server.

        Close the engine first; otherwise the open answers do not end.
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


def _file_limit() -> int:
    """Raise the limit of open files as far as needed and allowed, and return it."""
    if resource is None:
        return CONNECTION_LIMIT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTION_LIMIT + SPARE_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket. Port 0 selects a free port. Raises `OSError`.

    The command calls this before the model loads, to report an occupied port at once.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted connections inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_READER_MS)
    return listening
