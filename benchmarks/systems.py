"""Start, query and stop the systems under test: our service and its peers, over HTTP.

    with Service("ours", "--max-concurrent", "8") as service:
        request = Request("Hello.", 4)
        service.ask(request)

All systems use the same port, so only one of them can run at a time.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import psutil
import requests

PORT = 8950
SYSTEMS = ["ours", "transformers serve", "transformers serve --continuous-batching"]
PEERS = {"llama.cpp": "llama.cpp", "TextIteratorStreamer": "streamer"}  # argument of peers.py


@dataclass
class Request:
    """One request and its observed times, in seconds of the monotonic clock."""

    question: str
    max_tokens: int
    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # times of the pieces that contain text
    tokens: int | None = None  # count reported by the service; None if the reply did not finish
    queue_s: float | None = None
    error: str | None = None


class Service:
    """A system that runs during a `with` block."""

    def __init__(self, system: str, *options: str, root: Path = common.ROOT):
        """Prepare a system. `options` and `root`, the checkout to run, apply to "ours" only."""
        from stream_generator.loading.layout import locate

        self.system, self._options, self._root = system, options, root
        self.url = f"http://127.0.0.1:{PORT}"
        self._model = str(locate(None).dense_directory())

    def __enter__(self) -> "Service":
        """Start the system and wait until it accepts requests."""
        command, none = self._command(), subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=none, stderr=none, env=self._environment())
        path = "ready" if self.system == "ours" else "health"
        while True:
            assert self._process.poll() is None, f"{self.system} stopped before it was ready"
            try:
                if requests.get(f"{self.url}/{path}", timeout=1).ok:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.1)

    def __exit__(self, *exception: object) -> None:
        family = self._family()
        self._process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()

    def _command(self) -> list[str]:
        port = str(PORT)
        if self.system == "ours":
            script = str(self._root / "llama3_service.py")
            return [sys.executable, script, "-P", port, "--max-queue", "128", *self._options]
        if self.system in PEERS:
            script = str(common.ROOT / "benchmarks" / "peers.py")
            return [sys.executable, script, PEERS[self.system], "--port", port]
        script = str(Path(sys.executable).with_name("transformers"))
        address = ["--port", port, "--host", "127.0.0.1"]
        flags = ["--dtype", "bfloat16", *self.system.split()[2:]]
        return [script, "serve", self._model, *address, *flags]

    def _environment(self) -> dict[str, str]:
        """Give another checkout its own cache: each version removes the files of other versions."""
        if self._root == common.ROOT:
            return {**os.environ}
        return {**os.environ, "XDG_CACHE_HOME": str(self._root.resolve() / ".cache")}

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    @property
    def pid(self) -> int:
        return self._process.pid

    def memory_gb(self) -> float:
        """Return the resident memory of the process and its children."""
        return float(sum(process.memory_info().rss for process in self._family())) / 1e9

    def anonymous_gb(self) -> float:
        """Return the memory of the process without mapped files (Linux).

        The sum includes shared memory, which holds the keys and values.
        """
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        kinds = ("RssAnon:", "RssShmem:")
        return sum(int(line.split()[1]) for line in status if line.startswith(kinds)) * 1024 / 1e9

    def ask(self, request: Request, stop: threading.Event | None = None) -> None:
        """Send a request and record its reply. Abandon the reply when `stop` is set."""
        messages = [{"role": "user", "content": request.question}]
        request.began = time.monotonic()
        try:
            for event in self.events(messages, request.max_tokens, **common.SAMPLING):
                if stop is not None and stop.is_set():
                    return
                if usage := event.get("usage"):
                    request.tokens = usage["completion_tokens"]
                if event.get("event") == "end":
                    request.queue_s = event["timings"]["queue_ms"] / 1000
                if text_of(event):
                    request.arrivals.append(time.monotonic())
        except (requests.RequestException, AssertionError) as error:
            request.error = str(error)[:200]

    def events(
        self, messages: list[dict[str, str]], max_tokens: int, **params: Any
    ) -> Iterator[dict[str, Any]]:
        """Stream the events of a reply to a chat."""
        body: dict[str, Any] = {"messages": messages, "max_tokens": max_tokens, **params}
        path, accept = "/stream", "application/x-ndjson"
        if self.system != "ours":
            path, accept = "/v1/chat/completions", "text/event-stream"
            body |= {"model": self._model, "stream": True}
            body["stream_options"] = {"include_usage": True}
        with requests.post(
            self.url + path, json=body, headers={"Accept": accept}, stream=True, timeout=300
        ) as response:
            assert response.ok, response.text
            for line in response.iter_lines(chunk_size=None):
                data = line.removeprefix(b"data: ").strip()
                if data.startswith(b"{"):
                    yield json.loads(data)

    def complete(self, **body: Any) -> dict[str, Any]:
        """Return the answer of llama.cpp's own endpoint."""
        answer = requests.post(f"{self.url}/completion", json=body, timeout=60).json()
        assert isinstance(answer, dict)
        return answer


def text_of(event: dict[str, Any]) -> str:
    """Return the text of an event in our format or in OpenAI's format."""
    choices = event.get("choices") or [{}]
    return event.get("delta") or (choices[0].get("delta") or {}).get("content") or ""
