"""Load on a service over real HTTP: how soon, how evenly and how fast do tokens arrive?

    pip install -r benchmarks/requirements.txt
    python benchmarks/serve.py --users 1 2 4 8 16 32        # closed loop: each asks again at once
    python benchmarks/serve.py --users 30 --pause 10        # each pauses about 10 s, as people do
    python benchmarks/serve.py --rate 0.5                   # open loop: arrivals a second
    python benchmarks/serve.py --users 8 --long-prompt 4000 # one long prompt arrives in between

Runs our service and, beside it in the same run, `transformers serve` with and without
`--continuous-batching` (`--systems` chooses), on the same weights, prompts, lengths and sampling,
alternating, for several rounds. Tokens are counted from `usage`, not from chunks. Writes
benchmarks/results/NAME.json and .png, and prints a table of medians, with the lowest and highest
of the rounds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from late_tokens import RESULTS, ROOT, machine

PORT = 8950
TOKENS = 96
SLOTS = ("--max-concurrent", "32", "--max-context", "2048")  # as llama.cpp's server has them
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9}
TOPICS = [
    "how a rainbow forms", "why the sky is blue", "how bread rises", "what makes a good friend",
    "how a bicycle stays upright", "why leaves turn red", "how the tides work", "what a fuse does",
]  # fmt: skip
SYSTEMS = ["ours", "transformers serve", "transformers serve --continuous-batching"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS, "llama.cpp"], default=SYSTEMS)
    parser.add_argument("--users", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rate", type=float, help="open loop: requests a second, not users")
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds between requests")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long-prompt", type=int, default=0, help="tokens of one prompt between")
    parser.add_argument("--name", default="serve", help="of the result files")
    args = parser.parse_args()
    loads = [("rate", args.rate)] if args.rate else [("users", n) for n in args.users]
    figures: dict[str, dict[str, list[dict[str, float]]]] = {
        system: {f"{value} {kind}": [] for kind, value in loads} for system in args.systems
    }
    for number in range(args.rounds):
        for kind, value in loads:
            for system in args.systems:
                # A service of its own for each: what an earlier load has left must not count.
                with Service(system, *(SLOTS if system == "ours" else ())) as service:
                    service.ask(Request("Hello.", 4))  # warm up
                    load = Load(service, args, random.Random(number))
                    load.run_open(value) if kind == "rate" else load.run_closed(int(value))
                    result = load.figures()
                    figures[system][f"{value} {kind}"].append(result)
                    print(f"round {number + 1}, {system}, {value} {kind}: {result}", flush=True)
    report = {
        "machine": machine(),
        "settings": {**vars(args), "tokens": TOKENS, **SAMPLING},
        "median_low_high": {
            system: {load: spread(runs) for load, runs in by_load.items()}
            for system, by_load in figures.items()
        },
        "rounds": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report["median_low_high"], RESULTS / f"{args.name}.png")
    print_table(report["median_low_high"])


@dataclass
class Request:
    """One request and what was seen of it. Times are of the monotonic clock, in seconds."""

    question: str
    max_tokens: int
    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of pieces with text in them
    tokens: int | None = None  # as the service counted them; None if it did not finish
    queue_s: float | None = None
    error: str | None = None


class Service:
    """One system under test, started for the block and ended with it."""

    def __init__(self, system: str, *options: str, root: Path = ROOT):
        """options: of our own command. root: the checkout whose command it is."""
        self.system, self._options, self._root = system, options, root
        self.url = f"http://127.0.0.1:{PORT}"
        from stream_generator.loading.layout import locate

        self._model = str(locate(None).dense_directory())

    def __enter__(self) -> "Service":
        peers = {"llama.cpp": "llama.cpp", "TextIteratorStreamer": "streamer"}
        if self.system == "ours":
            command = [sys.executable, str(self._root / "llama3_service.py"), "-P", str(PORT)]
            command += ["--max-queue", "128", *self._options]
        elif self.system in peers:
            command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), peers[self.system]]
            command += ["--port", str(PORT)]
        else:
            serve = str(Path(sys.executable).with_name("transformers"))
            command = [serve, "serve", self._model, "--port", str(PORT), "--host", "127.0.0.1"]
            command += ["--dtype", "bfloat16", *self.system.split()[2:]]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment()
        )
        while True:
            assert self._process.poll() is None, f"{self.system} ended at its start"
            try:
                path = "ready" if self.system == "ours" else "health"
                if requests.get(f"{self.url}/{path}", timeout=1).ok:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.1)

    def __exit__(self, *exception: object) -> None:
        family = [psutil.Process(self._process.pid)]
        family += family[0].children(recursive=True)
        self._process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()

    def _environment(self) -> dict[str, str]:
        """Another checkout has a cache of its own: each removes what the other keeps."""
        if self._root == ROOT:
            return {**os.environ}
        return {**os.environ, "XDG_CACHE_HOME": str(self._root.resolve() / ".cache")}

    @property
    def pid(self) -> int:
        return self._process.pid

    def memory_gb(self) -> float:
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        return float(sum(p.memory_info().rss for p in family)) / 1e9

    def anonymous_gb(self) -> float:
        """Memory without mapped files, of the first process, on Linux; keys and values are shared
        memory there."""
        status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        kinds = ("RssAnon:", "RssShmem:")
        return sum(int(line.split()[1]) for line in status if line.startswith(kinds)) * 1024 / 1e9

    def ask(self, request: Request, stop: threading.Event | None = None) -> None:
        """Send it and read the stream, until it ends or `stop` is set."""
        request.began = time.monotonic()
        try:
            for event in self._events(request):
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

    def _events(self, request: Request) -> Iterator[dict[str, Any]]:
        messages = [{"role": "user", "content": request.question}]
        body: dict[str, Any] = {"messages": messages, "max_tokens": request.max_tokens, **SAMPLING}
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


def question(number: int) -> str:
    """About 70 tokens with the chat template, and no two alike from their beginning on."""
    topic = TOPICS[number % len(TOPICS)]
    return f"Question {number}: explain {topic}, in plain words for a child of ten, step by step."


def text_of(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return event.get("delta") or (choices[0].get("delta") or {}).get("content") or ""


class Load:
    """Requests on one service for a while."""

    def __init__(self, service: Service, args: argparse.Namespace, rng: random.Random):
        self._service = service
        self._args = args
        self._rng = rng
        self._requests: list[Request] = []
        self._stop = threading.Event()

    def run_closed(self, users: int) -> None:
        """So many users, each asking again when the reply is there and a pause is over."""
        seeds = [self._rng.random() for _ in range(users)]
        threads = [threading.Thread(target=self._user, args=(seed,)) for seed in seeds]
        self._run(threads)

    def run_open(self, rate: float) -> None:
        """Requests that arrive at random, so many a second, however many are unanswered."""
        self._run([threading.Thread(target=self._arrivals, args=(rate,))])

    def _run(self, threads: list[threading.Thread]) -> None:
        self._start = time.monotonic()
        for thread in threads:
            thread.start()
        if self._args.long_prompt:
            time.sleep(self._args.seconds / 2)
            # About one token a word for this model; a prompt of the length asked for, or near it.
            self._send(Request("word " * self._args.long_prompt, 1), self._rng, keep=False)
        time.sleep(max(0.0, self._start + self._args.seconds - time.monotonic()))
        self._stop.set()
        self._end = time.monotonic()
        self._memory = self._service.memory_gb()
        for thread in threads:
            thread.join()

    def _user(self, seed: float) -> None:
        rng = random.Random(seed)
        if self._args.pause:
            self._stop.wait(rng.uniform(0, self._args.pause))
        while not self._stop.is_set():
            self._send(Request(question(rng.randrange(10**6)), TOKENS), rng)
            if self._args.pause:
                self._stop.wait(rng.expovariate(1 / self._args.pause))

    def _arrivals(self, rate: float) -> None:
        threads = []
        while not self._stop.wait(self._rng.expovariate(rate)):
            request = Request(question(self._rng.randrange(10**6)), TOKENS)
            threads.append(threading.Thread(target=self._send, args=(request, self._rng)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _send(self, request: Request, rng: random.Random, *, keep: bool = True) -> None:
        if keep:
            self._requests.append(request)
        self._service.ask(request, self._stop)

    def figures(self) -> dict[str, float]:
        """What the requests saw, within the time of the measurement."""
        began = [r for r in self._requests if r.arrivals]
        finished = [r for r in began if r.tokens]
        pieces = sum(len(r.arrivals) for r in finished)
        # A piece may hold more than a token, or less; the finished ones tell how many it is.
        per_piece = sum(r.tokens or 0 for r in finished) / pieces if pieces else 1.0
        inside = sum(self._start <= at <= self._end for r in began for at in r.arrivals)
        ttft = [r.arrivals[0] - r.began for r in began]
        # Who has no word yet has waited until now: left out, a stalled service would look fast.
        ttft += [self._end - r.began for r in self._requests if not r.arrivals and not r.error]
        gaps = [b - a for r in began for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)]
        rates = [(len(r.arrivals) - 1) * per_piece / (r.arrivals[-1] - r.arrivals[0])
                 for r in began if len(r.arrivals) > 2]  # fmt: skip
        queue = [r.queue_s for r in finished if r.queue_s is not None]
        return {
            "total_tok_s": round(inside * per_piece / (self._end - self._start), 1),
            "one_tok_s": quantile(rates, 0.5),
            "ttft_p50_s": quantile(ttft, 0.5),
            "ttft_p99_s": quantile(ttft, 0.99),
            "gap_p50_s": quantile(gaps, 0.5),
            "gap_p99_s": quantile(gaps, 0.99),
            "queue_p50_s": quantile(queue, 0.5),
            "memory_gb": round(self._memory, 2),
            "requests": len(self._requests),
            "errors": sum(r.error is not None for r in self._requests),
        }


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(int(q * len(ordered)), len(ordered) - 1)], 3) if ordered else 0.0


def spread(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    return {
        name: [statistics.median(v), min(v), max(v)]
        for name in runs[0]
        for v in [[run[name] for run in runs]]
    }


def print_table(results: dict[str, Any]) -> None:
    columns = ["total_tok_s", "one_tok_s", "ttft_p50_s", "gap_p50_s", "gap_p99_s", "memory_gb"]
    print("| system | load | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for system, by_load in results.items():
        for load, figures in by_load.items():
            cells = ["{:g} ({:g} to {:g})".format(*figures[column]) for column in columns]
            print(f"| {system} | {load} | " + " | ".join(cells) + " |")


def plot(results: dict[str, Any], path: Path) -> None:
    """All tokens a second, and the time to the first, over the load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2))
    for panel, name, label in (
        (panels[0], "total_tok_s", "tokens a second, all together"),
        (panels[1], "ttft_p50_s", "median seconds to the first word"),
    ):
        for system, by_load in results.items():
            loads = list(by_load)
            middle, low, high = zip(*(by_load[load][name] for load in loads), strict=True)
            panel.plot(loads, middle, "o-", label=system)
            panel.fill_between(loads, low, high, alpha=0.2)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.tick_params(axis="x", rotation=30)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
