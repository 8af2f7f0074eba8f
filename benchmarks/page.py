"""Measure the cost of a long reply on the chat page: its process, its traffic and the browser.

    python benchmarks/page.py            (requires requirements-dev.txt and Chromium)

A fake service sends a Markdown reply at an even rate, so the figures do not depend on a model.
Prints the machine. For each thousand tokens it prints the pieces and bytes that the browser has
received, and the CPU seconds of the page's process and of the browser's main thread.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import common
import psutil

sys.path.insert(0, str(common.ROOT / "tests"))

from support.browser import started_chromium, visit
from support.processes import Process, free_port

PARAGRAPH = (
    "The **sea** is `blue`, and $x^2$ is a formula; it goes on for a while, as texts do. "
    "Every word is a token here, more or less, and so is each mark.\n\n"
)
CODE = "```python\nfor n in range(10):\n    print(n, n * n)\n```\n\n"
TABLE = "| a | b |\n|---|---|\n| 1 | 2 |\n\n"
ABOUT = {
    "model": "stand-in",
    "context_length": 8192,
    "defaults": {"temperature": 0.6},
    "bounds": {},
}
REACHED = """n => parseInt(
    document.querySelector('#chat .meter')?.innerText.match(/(\\d+) tokens/)?.[1] ?? 0) >= n"""


def words(count: int) -> list[str]:
    text = (PARAGRAPH * 4 + CODE + TABLE) * (1 + count // 100)
    return [piece + " " for piece in text.split(" ")][:count]


def events(count: int, rate: float) -> Iterator[dict[str, Any]]:
    """Yield the events of a reply at `rate` tokens per second."""
    trimmed = {"messages": 0, "tokens": 0}
    yield {"event": "start", "id": "x", "model": "stand-in", "prompt_tokens": 9, "trimmed": trimmed}
    began = time.monotonic()
    for n, word in enumerate(words(count)):
        time.sleep(max(0.0, began + n / rate - time.monotonic()))
        yield {"event": "delta", "delta": word, "finished": False}
    timings = {"queue_ms": 0.0, "ttft_ms": 1.0, "tokens_per_second": rate}
    usage = {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count}
    yield {
        "event": "end", "finish_reason": "stop", "usage": usage, "timings": timings, "params": {}
    }  # fmt: skip


@contextmanager
def fake_service(count: int, rate: float) -> Iterator[str]:
    """Serve the same reply to every request. Yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps(ABOUT).encode()
            self._begin("Content-Length", str(len(body)))
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._begin("Transfer-Encoding", "chunked")
            for event in events(count, rate):
                self._chunk(json.dumps(event).encode() + b"\n")
            self._chunk(b"")

        def _begin(self, header: str, value: str) -> None:
            self.send_response(200)
            self.send_header(header, value)
            self.end_headers()

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def main() -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument("--tokens", type=int, default=4000, help="length of the reply")
    parser.add_argument("--rate", type=float, default=100.0, help="tokens per second")
    args = parser.parse_args()
    print(json.dumps(common.machine()))
    with fake_service(args.tokens, args.rate) as service, started_chromium() as chromium:
        port = free_port()
        environment = {"LLAMA3_ADDRESS": service, "GRADIO_SERVER_PORT": str(port)}
        process = Process("llama3_app.py", ready="Running on", port=port, environment=environment)
        try:
            measure(chromium, process, args.tokens)
        finally:
            process.end()


def measure(chromium: Any, process: Process, tokens: int) -> None:
    """Ask for the reply on the page and print the figures of each thousand tokens."""
    page = visit(chromium.new_context(viewport={"width": 1280, "height": 800}), process.url)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    devtools.send("Network.enable")
    received: list[int] = []
    devtools.on("Network.dataReceived", lambda data: received.append(data["dataLength"]))
    own = psutil.Process(process.pid)

    def figures() -> tuple[float, float, int, int]:
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        (busy,) = (m["value"] for m in metrics if m["name"] == "TaskDuration")
        times = own.cpu_times()
        return times.user + times.system, busy, len(received), sum(received)

    page.locator("#box textarea").fill("Go.")
    before = figures()
    began = time.monotonic()
    page.keyboard.press("Enter")
    print(f"{'tokens':>7} {'s':>6} {'pieces':>8} {'KB':>8} {'page CPU s':>11} {'browser s':>10}")
    for milestone in range(1000, tokens + 1, 1000):
        page.wait_for_function(REACHED, arg=milestone, timeout=600_000)
        now = figures()
        cpu, browser, pieces, size = (a - b for a, b in zip(now, before, strict=True))
        seconds, kb = time.monotonic() - began, size / 1000
        print(
            f"{milestone:>7} {seconds:>6.1f} {pieces:>8} {kb:>8.0f} {cpu:>11.2f} {browser:>10.2f}"
        )


if __name__ == "__main__":
    main()
