"""What a crowd does to the service, and what is left of it afterwards.

    pip install -r benchmarks/requirements.txt
    python benchmarks/endurance.py open        # 500 streams at once: errors, memory of each
    python benchmarks/endurance.py leave       # how soon is a slot free after its reader has gone?
    python benchmarks/endurance.py overload    # ten times what it can serve, for a minute
    python benchmarks/endurance.py idle        # thousands who connect and say, or read, nothing
    python benchmarks/endurance.py soak        # 20 minutes, 10,000 streams, 30 % abandoned

Each trial starts a service of its own with the demo model, and adds its figures to
benchmarks/results/endurance.json. Times are seen by clients on the same machine.
"""

import argparse
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

import psutil
import requests
from late_tokens import RESULTS, machine
from serve import PORT, TOPICS, Service

FIGURES = RESULTS / "endurance.json"
QUESTIONS = [f"Explain {topic}." for topic in TOPICS]
HEAD = "POST /stream HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n"
HEAD += "Content-Type: application/json\r\nConnection: close\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trial", choices=list(TRIALS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the crowd, to try it out")
    args = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    options, trial = TRIALS[args.trial]
    with Service("ours", *options) as service:
        # A first reply lays out what every later one uses.
        asyncio.run(all_of(ask(QUESTIONS[n % 8], 16) for n in range(16)))
        figures = asyncio.run(trial(Watched(service), args.scale))
    print(json.dumps(figures, indent=1))
    if args.scale == 1:
        known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        known[args.trial] = {"machine": machine(), **figures}
        FIGURES.write_text(json.dumps(known, indent=1) + "\n")


class Watched:
    """The process of the service, seen from outside."""

    def __init__(self, service: Service):
        self._url = service.url
        self._process = psutil.Process(service.pid)

    def running(self) -> int:
        """Requests that have a slot."""
        lines = requests.get(f"{self._url}/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith("llm_requests_running "))
        return int(float(line.split()[-1]))

    def held(self) -> dict[str, int]:
        """What it holds of the system."""
        return {
            "resident_kb": self._process.memory_info().rss // 1024,
            "descriptors": self._process.num_fds(),
            "threads": self._process.num_threads(),
        }

    async def until(self, *, some_run: bool) -> None:
        """Wait until some request has a slot, or until none has."""
        while bool(await asyncio.to_thread(self.running)) != some_run:
            await asyncio.sleep(0)


class Refused(Exception):
    """Another status than 200."""

    def __init__(self, status: int, retry_after: str | None):
        super().__init__(f"{status}")
        self.status = status
        self.retry_after = retry_after


@contextlib.asynccontextmanager
async def stream(question: str, tokens: int) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of one reply. Leaving the block closes the connection, whatever is to come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    try:
        body = json.dumps({"query": question, "max_new_tokens": tokens, "min_new_tokens": tokens,
                           "temperature": 0}).encode()  # fmt: skip
        writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if not head.startswith("http/1.1 200"):
            retry = [
                line.split()[1] for line in head.splitlines() if line.startswith("retry-after")
            ]
            raise Refused(int(head.split()[1]), retry[0] if retry else None)
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
    """The text of a whole reply."""
    text, end = "", None
    async with stream(question, tokens) as events:
        async for event in events:
            text += event.get("delta", "")
            end = event
    assert end is not None
    assert end["event"] == "end", end
    return text


async def all_of(tasks: Any) -> list[Any]:
    return await asyncio.gather(*tasks)


async def open_streams(service: Watched, scale: float) -> dict[str, Any]:
    """Streams that are all open at once, most of them waiting for a slot; a first and a second
    crowd, since the slots grow with what the first one brings."""
    return {"first": await crowd(service, scale), "second": await crowd(service, scale)}


async def crowd(service: Watched, scale: float) -> dict[str, Any]:
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
            all_begun.set()  # one that failed holds nobody up

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


async def leave(service: Watched, scale: float) -> dict[str, Any]:
    """From closing the connection to a free slot, as `/metrics` shows it."""
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


async def overload(service: Watched, scale: float) -> dict[str, Any]:
    """Arrivals at ten times the rate at which replies are finished."""
    tokens, seconds = 24, 60 * scale
    alone = {question: await ask(question, tokens) for question in QUESTIONS}
    began = time.monotonic()
    for _ in range(3):
        await all_of(ask(question, tokens) for question in QUESTIONS)
    capacity = 3 * len(QUESTIONS) / (time.monotonic() - began)
    seen: Counter[str] = Counter()
    refused_ms: list[float] = []

    async def one(question: str) -> None:
        began = time.monotonic()
        try:
            text = await ask(question, tokens)
            seen["the same text as alone" if text == alone[question] else "another text"] += 1
        except Refused as refused:
            refused_ms.append(1000 * (time.monotonic() - began))
            seen[f"{refused.status}, Retry-After {'given' if refused.retry_after else 'none'}"] += 1
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
        "refused_after_ms": spread(refused_ms),
    }


async def idle(service: Watched, scale: float) -> dict[str, Any]:
    """The first token of those who do ask, before and beside those who hold a connection open."""
    before = [await first_token_ms(number) for number in range(40)]
    silent: list[asyncio.StreamWriter] = []

    async def come(text: str) -> None:
        # The limit stops the socket from being read: a few KB, and nobody takes more.
        _, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1024)
        writer.write(text.encode())
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        silent.append(writer)

    body = json.dumps({"query": QUESTIONS[0], "max_new_tokens": 64, "logprobs": 20})
    unread = f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}"
    counts = {"silent": (int(3000 * scale), ""), "half a header": (int(1000 * scale), HEAD)}
    for count, text in counts.values():
        for _ in range(count):
            await come(text)
    half = [await first_token_ms(number) for number in range(40)]
    for _ in range(int(50 * scale)):
        await come(unread)
    await service.until(some_run=False)
    beside = [await first_token_ms(number) for number in range(40)]
    for writer in silent:
        writer.close()
    return {
        "crowd": {
            **{name: count for name, (count, _) in counts.items()},
            "unread": int(50 * scale),
        },
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
    raise AssertionError("the reply has no token")


async def soak(service: Watched, scale: float) -> dict[str, Any]:
    """Short replies at an even rate for long, of which some are left at any moment."""
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
    # The first tenth is left out: what a first crowd needs is kept for the next.
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


Trial = Callable[[Watched, float], Coroutine[Any, Any, dict[str, Any]]]
TRIALS: dict[str, tuple[list[str], Trial]] = {
    "open": (["--max-queue", "600"], open_streams),
    "leave": ([], leave),
    # In float32 a reply does not depend on its neighbours; rounded to 8 bits, near-ties do.
    "overload": (
        ["--max-concurrent", "8", "--max-queue", "8", "--dtype", "float32", "--quantize", "none"],
        overload,
    ),
    "idle": ([], idle),
    "soak": ([], soak),
}


if __name__ == "__main__":
    main()
