"""A Python client for the service, on `requests` alone: light to import, exact about failure."""

import json
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Self

import requests

from stream_service.loopback import is_loopback_url

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 5.0  # to what needs no reply of the model


class StreamError(Exception):
    """The service could not be reached, refused the request, or the stream broke off.

    `text` is what had been received until then; `status` the HTTP status, if there was an answer.
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
    """An iterator of text deltas. Leaving it, by `with` or by `close`, ends the generation.

    `start` is the stream's first event; `end` its last, once the iterator is exhausted: finish
    reason, usage, timings, history. `text` is all that has been received. `events` is the same
    stream with all that the service tells: use one or the other.
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
        """Each event as the service sent it: `start`, `queue` while it waits, `delta`, `end`."""
        return self._events

    def close(self) -> None:
        """Close the connection; the service then stops generating. More than once is fine."""
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
            # chunk_size None: each chunk as it arrives; a number would wait until it is full.
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
            raise StreamError("the stream broke off", text=self.text) from error
        finally:
            self._response.close()
        raise StreamError("the stream broke off", text=self.text)


class StreamClient:
    """Talks to one service.

        >>> client = StreamClient("http://127.0.0.1:8800")
        >>> for delta in client.stream("Explain how a rainbow forms.", temperature=0):
        ...     print(delta, end="", flush=True)

    read_timeout: seconds without any byte after which a stream counts as broken; by default
    there is no such limit, since a request may wait its turn (to `stop` and `about`, which need
    no turn, the service must answer within five seconds). api_key: if the service asks for
    one.
    """

    def __init__(self, url: str, *, read_timeout: float | None = None, api_key: str | None = None):
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._read_timeout = read_timeout
        # A proxy cannot reach this machine's own loopback addresses. `requests` drops the proxies
        # of the environment that are None here.
        none: dict[str, Any] = dict.fromkeys(("http", "https", "all"))
        self._proxies = none if is_loopback_url(self.url) else None

    def stream(
        self,
        messages: str | list[dict[str, Any]],
        *,
        request_id: str | None = None,
        **params: Any,
    ) -> ReplyStream:
        """The reply to a query, or to a whole conversation, as deltas.

        request_id: to `stop` it by; by default the service makes one.

        params: the fields of `POST /stream`, e.g. `max_new_tokens=100` or `prompt="Be brief."`.
        Raises `StreamError` at once if the service is away or refuses, and while iterating if
        generation fails or the connection is cut. The connection closes when the iterator ends,
        is closed, or is collected.
        """
        body = {"query" if isinstance(messages, str) else "messages": messages, **params}
        headers = {"Accept": "application/x-ndjson"}
        if request_id is not None:
            headers["X-Request-Id"] = request_id
        response = self._ask("POST", "/stream", body, headers, stream=True)
        return ReplyStream(response)

    def chat(self, messages: str | list[dict[str, Any]], **params: Any) -> dict[str, Any]:
        """The whole reply at once: the object of `POST /chat`. Raises `StreamError`."""
        body = {"query" if isinstance(messages, str) else "messages": messages, **params}
        with self._ask("POST", "/chat", body) as response:
            result: dict[str, Any] = response.json()
            return result

    def stop(self, request_id: str) -> dict[str, Any]:
        """End a request, and get what it has given so far. Raises `StreamError`.

        request_id: what `stream` was given as one, or the id in its first event.
        """
        path = f"/stop/{request_id}"
        with self._ask("POST", path, {}, read_timeout=ANSWER_SECONDS) as response:
            result: dict[str, Any] = response.json()
            return result

    def about(self) -> dict[str, Any]:
        """The model, its context, defaults and bounds: `GET /`. Raises `StreamError`."""
        with self._ask("GET", "/", read_timeout=ANSWER_SECONDS) as response:
            about = _json_of(response)
        if "model" not in about:
            raise StreamError(f"what answers at {self.url} is not this service")
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
            raise StreamError(f"the service at {self.url} cannot be reached") from error
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
