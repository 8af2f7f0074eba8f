"""The server while the model loads."""

import http.client

from support.waiting import TIMEOUT

from stream_service.server import Server, bind


def test_while_the_model_loads_the_server_is_healthy_but_not_ready() -> None:
    server = Server(bind("127.0.0.1", 0), max_body=1000).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    # On one connection, a body sent for HEAD would be read as the next answer.
    for method, path, status in (
        ("HEAD", "/health", 200), ("GET", "/health", 200), ("HEAD", "/ready", 503),
        ("GET", "/ready", 503), ("POST", "/stream", 503),
    ):  # fmt: skip
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == status
        assert bool(body) == (method != "HEAD")
        assert response.headers["Content-Type"] == "application/json"
    connection.close()
    server.close()
