"""Measure the service under many connections, and the memory that remains in use afterwards.

    pip install -r benchmarks/requirements.txt
    python benchmarks/endurance.py open        # 500 streams at once: errors, memory per stream
    python benchmarks/endurance.py leave       # time until the slot of a closed connection is free
    python benchmarks/endurance.py overload    # ten times the capacity, for a minute
    python benchmarks/endurance.py idle        # thousands of connections that send or read nothing
    python benchmarks/endurance.py soak        # 20 minutes, 10,000 streams, 30 % abandoned

Each trial starts the service with the demo model and adds its figures to
benchmarks/results/endurance.json. The clients run on the same machine and measure all times.
"""

import asyncio
import contextlib
import itertools
import json
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import common
import psutil
import requests
from systems import PORT, Service

QUESTIONS = [f"Explain {topic}." for topic in common.TOPICS]
HEAD = "POST /stream HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n"
HEAD += "Content-Type: application/json\r\nConnection: close\r\n"


def main() -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument("trial", choices=list(TRIALS))
    parser.add_argument("--scale", type=float, default=1.0, help="size; only 1 writes the results")
    args = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    options, trial = TRIALS[args.trial]
    with Service("ours", *options.split()) as service:
        # The first replies allocate the memory that all later replies use.
        asyncio.run(all_of(ask(QUESTIONS[n % 8], 16) for n in range(16)))
        figures = asyncio.run(trial(ServiceProcess(service), args.scale))
    print(json.dumps(figures, indent=1))
    if args.scale == 1:
        path = common.RESULTS / "endurance.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[args.trial] = {"machine": common.machine(), **figures}
        path.write_text(json.dumps(known, indent=1) + "\n")


class ServiceProcess:
    """Observe the process of the service from another process."""

    def __init__(self, service: Service):
        self._url = service.url
        self._process = psutil.Process(service.pid)

    def running(self) -> int:
        """Count the requests that have a slot."""
        lines = requests.get(f"{self._url}/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith("llm_requests_running "))
        return int(float(line.split()[-1]))

    def held(self) -> dict[str, int]:
        """Return the memory, file descriptors and threads of the process."""
        return {
            "resident_kb": self._process.memory_info().rss // 1024,
            "descriptors": self._process.num_fds(),
            "threads": self._process.num_threads(),
        }

    async def until(self, *, some_run: bool) -> None:
        """Wait until a request has a slot, or until no request has a slot."""
        while bool(await asyncio.to_thread(self.running)) != some_run:
            await asyncio.sleep(0)


class Rejected(Exception):
    """The service answered with a status other than 200."""

    def __init__(self, status: int, *, retry_after: bool):
        super().__init__(f"{status}")
        self.outcome = f"{status}, Retry-After {'given' if retry_after else 'none'}"


@contextlib.asynccontextmanager
async def stream(question: str, tokens: int) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Open the events of one reply. The end of the block closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    try:
        body = json.dumps({"query": question, "max_new_tokens": tokens, "min_new_tokens": tokens,
                           "temperature": 0}).encode()  # fmt: skip
        writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if not head.startswith("http/1.1 200"):
            raise Rejected(int(head.split()[1]), retry_after="\r\nretry-after:" in head)
        yield _events(reader)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    while size := int(await reader.readline(), 16):
        piece = await reader.readexactly(size + 2)
        for line in piece.splitlines():
            if line:
                yield json.loads(line)


async def ask(question: str, tokens: int) -> str:
    """Return the text of a complete reply."""
    async with stream(question, tokens) as reply:
        events = [event async for event in reply]
    assert events[-1]["event"] == "end", events[-1]
    return "".join(event.get("delta", "") for event in events)


async def all_of(tasks: Any) -> list[Any]:
    return await asyncio.gather(*tasks)


async def open_streams(service: ServiceProcess, scale: float) -> dict[str, Any]:
    """Measure two crowds of streams. Only the first crowd allocates the memory of the slots."""
    return {"first": await crowd(service, scale), "second": await crowd(service, scale)}


async def crowd(service: ServiceProcess, scale: float) -> dict[str, Any]:
    """Open all streams before the first one ends. Most streams wait for a slot."""
    count = int(500 * scale)
    before = service.held()
    begun, all_begun = itertools.count(1), asyncio.Event()

    async def one(number: int) -> None:
        try:
            async with stream(QUESTIONS[number % 8], 8) as events:
                await anext(events)
                if next(begun) == count:
                    all_begun.set()
                await all_begun.wait()
                *_, last = [event async for event in events]
            assert last["event"] == "end", last
        finally:
            all_begun.set()  # after a failure, the other streams must not wait

    replies = asyncio.gather(*(one(n) for n in range(count)), return_exceptions=True)
    await all_begun.wait()
    while_open = service.held()
    results = await replies
    failed = [repr(result) for result in results if isinstance(result, BaseException)]
    await service.until(some_run=False)
    return {
        "streams": count,
        "failed": dict(Counter(failed)),
        "kb_for_each": round((while_open["resident_kb"] - before["resident_kb"]) / count, 1),
        "before": before,
        "while_open": while_open,
        "after": service.held(),
    }


async def leave(service: ServiceProcess, scale: float) -> dict[str, Any]:
    """Measure the time from a closed connection until `/metrics` reports a free slot."""
    free_ms = []
    for number in range(int(300 * scale)):
        async with stream(QUESTIONS[number % 8], 400) as events:
            for _ in range(random.Random(number).randrange(1, 12)):
                await anext(events)
            await service.until(some_run=True)
        left = time.monotonic()
        await service.until(some_run=False)
        free_ms.append(1000 * (time.monotonic() - left))
    return {"trials": len(free_ms), "free_after_ms": spread(free_ms)}


async def overload(service: ServiceProcess, scale: float) -> dict[str, Any]:
    """Send requests at ten times the rate at which the service finishes replies."""
    tokens, seconds = 24, 60 * scale
    alone = {question: await ask(question, tokens) for question in QUESTIONS}
    began = time.monotonic()
    for _ in range(3):
        await all_of(ask(question, tokens) for question in QUESTIONS)
    capacity = 3 * len(QUESTIONS) / (time.monotonic() - began)
    seen: Counter[str] = Counter()
    rejected_ms: list[float] = []

    async def one(question: str) -> None:
        began = time.monotonic()
        try:
            text = await ask(question, tokens)
            seen["the same text as alone" if text == alone[question] else "another text"] += 1
        except Rejected as rejected:
            rejected_ms.append(1000 * (time.monotonic() - began))
            seen[rejected.outcome] += 1
        except Exception as error:
            seen[repr(error)] += 1

    rng, tasks = random.Random(1), []
    until = time.monotonic() + seconds
    for number in itertools.count():
        await asyncio.sleep(rng.expovariate(10 * capacity))
        if time.monotonic() > until:
            break
        tasks.append(asyncio.create_task(one(QUESTIONS[number % 8])))
    await asyncio.gather(*tasks)
    return {
        "replies_a_second_at_most": round(capacity, 2),
        "arrivals_a_second": round(10 * capacity, 1),
        "seconds": seconds,
        "answers": dict(seen),
        "refused_after_ms": spread(rejected_ms),
    }


async def idle(service: ServiceProcess, scale: float) -> dict[str, Any]:
    """Measure the first token of active clients, without and with idle connections."""
    before = [await first_token_ms(number) for number in range(40)]
    silent: list[asyncio.StreamWriter] = []

    async def connect(text: str) -> None:
        # With this limit the client stops reading after a few KB.
        _, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1024)
        writer.write(text.encode())
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        silent.append(writer)

    body = json.dumps({"query": QUESTIONS[0], "max_new_tokens": 64, "logprobs": 20})
    unread = f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}"
    most = {"silent": 3000, "half a header": 1000, "unread": 50}
    counts = {name: int(count * scale) for name, count in most.items()}
    for text in ("",) * counts["silent"] + (HEAD,) * counts["half a header"]:
        await connect(text)
    half = [await first_token_ms(number) for number in range(40)]
    for _ in range(counts["unread"]):
        await connect(unread)
    await service.until(some_run=False)
    beside = [await first_token_ms(number) for number in range(40)]
    for writer in silent:
        writer.close()
    return {
        "crowd": counts,
        "first_token_ms": {
            "alone": spread(before),
            "beside the silent and the half headers": spread(half),
            "beside all of them": spread(beside),
        },
    }


async def first_token_ms(number: int) -> float:
    began = time.monotonic()
    async with stream(f"Number {number}: {QUESTIONS[number % 8]}", 4) as events:
        async for event in events:
            if event["event"] == "delta":
                return 1000 * (time.monotonic() - began)
    raise AssertionError("the reply contains no token")


async def soak(service: ServiceProcess, scale: float) -> dict[str, Any]:
    """Request short replies at an even rate, and abandon some of them at a random token."""
    count, seconds, abandoned = int(10_000 * scale), 1200 * scale, 0.3
    seen: Counter[str] = Counter()
    samples: list[dict[str, int]] = []

    async def one(number: int) -> None:
        rng = random.Random(number)
        tokens, leaves = rng.randrange(4, 24), rng.random() < abandoned
        stays = rng.randrange(tokens) if leaves else tokens + 3
        try:
            async with stream(f"Number {number}: {QUESTIONS[number % 8]}", tokens) as events:
                for _ in range(stays):
                    event = await anext(events, None)
                    if event is None or event["event"] == "end":
                        break
                seen["left" if leaves else "read to the end"] += 1
        except Exception as error:
            seen[repr(error)] += 1

    before, tasks = service.held(), set()
    began = time.monotonic()
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number * seconds / count - time.monotonic()))
        task = asyncio.create_task(one(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if number % (count // 100) == 0:
            samples.append(service.held())
    await asyncio.gather(*tasks)
    await service.until(some_run=False)
    # Skip the first tenth, because the service keeps the memory that its first load needed.
    sizes = [sample["resident_kb"] for sample in samples]
    early, late = statistics.mean(sizes[10:30]), statistics.mean(sizes[-20:])
    return {
        "seconds": round(time.monotonic() - began),
        "streams": dict(seen),
        "resident_kb": {"second and third tenth": round(early), "last two tenths": round(late)},
        "drift_percent": round(100 * (late - early) / early, 2),
        "before": before,
        "after": service.held(),
    }


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 1),
        "most": round(ordered[-1], 1),
    }


Trial = Callable[[ServiceProcess, float], Coroutine[Any, Any, dict[str, Any]]]
TRIALS: dict[str, tuple[str, Trial]] = {
    "open": ("--max-queue 600", open_streams),
    "leave": ("", leave),
    # In float32, concurrent requests do not change a reply. With 8 bits they can decide near-ties.
    "overload": ("--max-concurrent 8 --max-queue 8 --dtype float32 --quantize none", overload),
    "idle": ("", idle),
    "soak": ("", soak),
}


if __name__ == "__main__":
    main()
