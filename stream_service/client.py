"""A Python client for the service. It needs only `requests`, and reports every failure."""

import json
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Self

import requests

from stream_service.loopback import is_loopback_url

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 5.0  # for `stop` and `about`, which wait for no slot
INCOMPLETE = "the stream ended before the reply was complete; send the request again"


class StreamError(Exception):
    """The client cannot reach the service, the service rejects the request, or the stream breaks.

    `text` is the text received so far; `status` is the HTTP status, None without an answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        text: str = "",
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.text = text


class ReplyStream:
    """An iterator of text deltas. `close`, or the end of a `with` block, aborts the request.

    `start` is the first event of the stream. `end` is the last event, with finish reason, usage,
    timings and history; it is empty until the stream ends. `text` is the text received so far.
    `events` iterates over the events of the same stream: use either iterator, not both.
    """

    def __init__(self, response: requests.Response):
        self._response = response
        self._events = self._read()
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.text = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for event in self._events:
            if event["event"] == "delta" and event["delta"]:
                delta: str = event["delta"]
                return delta
        raise StopIteration

    def events(self) -> Iterator[dict[str, Any]]:
        """Iterate over the events that the service sends: `start`, `queue`, `delta`, `end`."""
        return self._events

    def close(self) -> None:
        """Close the connection. The service then aborts the request. Further calls do nothing."""
        self._events.close()
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> Generator[dict[str, Any], None, None]:
        try:
            # None reads each chunk when it arrives; a number would wait for a full chunk.
            for line in self._response.iter_lines(chunk_size=None):
                event = json.loads(line)
                kind = event["event"]
                if kind == "start":
                    self.start = event
                elif kind == "error":
                    raise _failure(event, self._response.status_code, self.text)
                elif kind == "end":
                    self.end = event
                elif kind == "delta":
                    self.text += event["delta"]
                yield event
                if kind == "end":
                    return
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            raise StreamError(INCOMPLETE, text=self.text) from error
        finally:
            self._response.close()
        raise StreamError(INCOMPLETE, text=self.text)


class StreamClient:
    """A client of one service.

        >>> client = StreamClient("http://127.0.0.1:8800")
        >>> for delta in client.stream("Explain how a rainbow forms.", temperature=0):
        ...     print(delta, end="", flush=True)

    read_timeout: seconds without any byte after which a call fails. By default, `stop` and `about`
    time out after five seconds. Other calls have no timeout, because a request may wait in the
    queue. api_key: the key, if the service requires one.
    """

    def __init__(self, url: str, *, read_timeout: float | None = None, api_key: str | None = None):
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._read_timeout = read_timeout
        # A proxy cannot reach loopback addresses of this machine. With None, `requests` ignores the
        # proxies that the environment names.
        none: dict[str, Any] = dict.fromkeys(("http", "https", "all"))
        self._proxies = none if is_loopback_url(self.url) else None

    def stream(
        self,
        messages: str | list[dict[str, Any]],
        *,
        request_id: str | None = None,
        **params: Any,
    ) -> ReplyStream:
        """Stream the reply to a query, or to a whole conversation.

        request_id: the id for `stop`; by default, the service creates one.
        params: fields of `POST /stream`, e.g. `max_new_tokens=100` or `prompt="Be brief."`.
        Raises `StreamError` if the service is unreachable or rejects the request. The iterator
        raises it if the generation fails or the connection breaks. The connection closes when the
        iterator ends, is closed, or is garbage-collected.
        """
        body = {"query" if isinstance(messages, str) else "messages": messages, **params}
        headers = {"Accept": "application/x-ndjson"}
        if request_id is not None:
            headers["X-Request-Id"] = request_id
        response = self._ask("POST", "/stream", body, headers, stream=True)
        return ReplyStream(response)

    def chat(self, messages: str | list[dict[str, Any]], **params: Any) -> dict[str, Any]:
        """Return the complete reply: the object of `POST /chat`. Raises `StreamError`."""
        body = {"query" if isinstance(messages, str) else "messages": messages, **params}
        with self._ask("POST", "/chat", body) as response:
            result: dict[str, Any] = response.json()
            return result

    def stop(self, request_id: str) -> dict[str, Any]:
        """Abort a request, and return its text so far. Raises `StreamError`.

        request_id: the id that `stream` got, or the id in the first event.
        """
        path = f"/stop/{request_id}"
        with self._ask("POST", path, {}, read_timeout=ANSWER_SECONDS) as response:
            result: dict[str, Any] = response.json()
            return result

    def about(self) -> dict[str, Any]:
        """Return the model, its context, defaults and bounds: `GET /`. Raises `StreamError`."""
        with self._ask("GET", "/", read_timeout=ANSWER_SECONDS) as response:
            about = _json_of(response)
        if "model" not in about:
            raise StreamError(f"the server at {self.url} is not this service; check the address")
        return about

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        *,
        stream: bool = False,
        read_timeout: float | None = None,
    ) -> requests.Response:
        try:
            response = requests.request(
                method,
                self.url + path,
                json=body,
                headers=self._headers | (headers or {}),
                stream=stream,
                proxies=self._proxies,
                timeout=(CONNECT_SECONDS, self._read_timeout or read_timeout),
            )
        except requests.ConnectionError as error:
            raise StreamError(f"cannot reach the service at {self.url}; is it running?") from error
        except requests.RequestException as error:
            raise StreamError(f"the request to {self.url} failed: {error}") from error
        if not response.ok:
            with response:
                raise _failure(_json_of(response), response.status_code, "")
        return response


def _failure(event: dict[str, Any], status: int, text: str) -> StreamError:
    error = event.get("error") or {}
    return StreamError(
        error.get("message") or f"the service answered with status {status}",
        status=status,
        code=error.get("code"),
        param=error.get("param"),
        request_id=error.get("request_id"),
        text=text,
    )


def _json_of(response: requests.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
