"""Measure the speed and the latency of a service under load, over HTTP.

    pip install -r benchmarks/requirements.txt
    python benchmarks/serve.py --users 1 2 4 8 16 32        # closed loop without pauses
    python benchmarks/serve.py --users 30 --pause 10        # closed loop, pauses of about 10 s
    python benchmarks/serve.py --rate 0.5                   # open loop, requests per second
    python benchmarks/serve.py --users 8 --long-prompt 4000 # one long prompt during the load

In a closed loop each user waits for the reply before the next request. In an open loop requests
arrive at random times. Each round measures all `--systems` in turn, with the same weights, prompts,
lengths and sampling. Tokens are counted from `usage`, not from chunks. Writes
benchmarks/results/NAME.json and NAME.png. Prints medians with the lowest and the highest value.
"""

import random
import threading
import time
from pathlib import Path
from typing import Any

import common
from systems import SYSTEMS, Request, Service

SLOTS = ("--max-concurrent", "32", "--max-context", "2048")  # the same slots as llama.cpp's server
COLUMNS = ["total_tok_s", "one_tok_s", "ttft_p50_s", "gap_p50_s", "gap_p99_s", "memory_gb"]


def main() -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS, "llama.cpp"], default=SYSTEMS)
    parser.add_argument("--users", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rate", type=float, help="requests per second; replaces --users")
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds between requests")
    common.add_flags(parser, seconds=20.0, rounds=3)
    parser.add_argument("--long-prompt", type=int, default=0, help="tokens of the long prompt")
    args = common.add_flags(parser, name="serve").parse_args()
    loads = [("rate", args.rate)] if args.rate else [("users", n) for n in args.users]
    figures: dict[str, dict[str, list[dict[str, float]]]] = {
        system: {f"{value} {kind}": [] for kind, value in loads} for system in args.systems
    }
    for number in range(args.rounds):
        for kind, value in loads:
            for system in args.systems:
                # A new service for each load: an earlier load must not change the figures.
                with Service(system, *(SLOTS if system == "ours" else ())) as service:
                    service.ask(Request("Hello.", 4))  # warm up
                    load = Load(service, args.seconds, number, args.pause, args.long_prompt)
                    result = load.open(value) if kind == "rate" else load.closed(value)
                    figures[system][f"{value} {kind}"].append(result)
                    print(f"round {number + 1}, {system}, {value} {kind}: {result}", flush=True)
    medians = {
        system: {load: common.spread(runs) for load, runs in by_load.items()}
        for system, by_load in figures.items()
    }
    report = {
        "settings": {**vars(args), "tokens": common.TOKENS, **common.SAMPLING},
        "median_low_high": medians,
        "rounds": figures,
    }
    common.write_report(args.name, report)
    plot(medians, common.RESULTS / f"{args.name}.png")
    rows = {
        f"{system} | {load}": result
        for system, by_load in medians.items()
        for load, result in by_load.items()
    }
    print(common.table("| system | load", COLUMNS, rows))


class Load:
    """Requests to one service for some seconds. One object measures one load."""

    def __init__(
        self, service: Service, seconds: float, seed: int, pause: float = 0.0, long_prompt: int = 0
    ):
        self._service, self._seconds = service, seconds
        self._pause, self._long_prompt = pause, long_prompt
        self._rng, self._stop = random.Random(seed), threading.Event()
        self._requests: list[Request] = []

    def closed(self, users: int) -> dict[str, float]:
        """Measure users that each wait for the reply, pause, and send the next request."""
        seeds = [self._rng.random() for _ in range(users)]
        return self._run([threading.Thread(target=self._user, args=(seed,)) for seed in seeds])

    def open(self, rate: float) -> dict[str, float]:
        """Measure requests that arrive at random, `rate` per second, and wait for no reply."""
        return self._run([threading.Thread(target=self._arrivals, args=(rate,))])

    def _run(self, threads: list[threading.Thread]) -> dict[str, float]:
        self._start = time.monotonic()
        for thread in threads:
            thread.start()
        if self._long_prompt:
            time.sleep(self._seconds / 2)
            # In the demo model this word is about one token.
            self._service.ask(Request("word " * self._long_prompt, 1), self._stop)
        time.sleep(max(0.0, self._start + self._seconds - time.monotonic()))
        self._stop.set()
        self._end = time.monotonic()
        self._memory = self._service.memory_gb()
        for thread in threads:
            thread.join()
        return self._figures()

    def _user(self, seed: float) -> None:
        rng = random.Random(seed)
        if self._pause:
            self._stop.wait(rng.uniform(0, self._pause))
        while not self._stop.is_set():
            self._send(rng.randrange(10**6))
            if self._pause:
                self._stop.wait(rng.expovariate(1 / self._pause))

    def _arrivals(self, rate: float) -> None:
        threads = []
        while not self._stop.wait(self._rng.expovariate(rate)):
            number = self._rng.randrange(10**6)
            threads.append(threading.Thread(target=self._send, args=(number,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _send(self, number: int) -> None:
        request = Request(common.question(number), common.TOKENS)
        self._requests.append(request)
        self._service.ask(request, self._stop)

    def _figures(self) -> dict[str, float]:
        """Compute what the clients observed between the start and the end of the load."""
        began = [r for r in self._requests if r.arrivals]
        finished = [r for r in began if r.tokens]
        pieces = sum(len(r.arrivals) for r in finished)
        # A piece can contain more or less than one token. Finished replies give the mean.
        per_piece = sum(r.tokens or 0 for r in finished) / pieces if pieces else 1.0
        inside = sum(self._start <= at <= self._end for r in began for at in r.arrivals)
        ttft = [r.arrivals[0] - r.began for r in began]
        # Requests without text count with their wait so far, or a stalled service would look fast.
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


def plot(medians: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the total tokens per second and the time to the first token, for each load."""
    with common.chart(path, (9, 3.2), ncols=2) as (_, panels):
        for panel, name, label in (
            (panels[0], "total_tok_s", "tokens per second, all streams"),
            (panels[1], "ttft_p50_s", "median seconds to the first word"),
        ):
            for system, by_load in medians.items():
                loads = list(by_load)
                middle, low, high = zip(*(by_load[load][name] for load in loads), strict=True)
                panel.plot(loads, middle, "o-", label=system)
                panel.fill_between(loads, low, high, alpha=0.2)
            panel.set_ylabel(label)
            panel.set_ylim(bottom=0)
            panel.tick_params(axis="x", rotation=30)
        panels[0].legend(fontsize=7)


if __name__ == "__main__":
    main()
