"""A server that answers with bytes that the test gives."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from support.waiting import wait_for

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


START = chunk('{"event":"start","id":"x"}\n')
DELTA = chunk('{"event":"delta","delta":"abc","finished":false}\n')


@contextmanager
def answers(data: bytes) -> Iterator[str]:
    """Answer one request with these bytes, then close the connection. Yields the server's URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        wait_for(thread)
