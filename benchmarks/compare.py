"""Compare our service with its peers over HTTP: speed, latency, start time and memory.

    python benchmarks/with_peers.py compare.py      # installs the peers in a separate environment

Each round starts every system in turn. For each system it measures the time from the command to the
first token, one stream, four and eight streams at once, and prompts of about 70 and 1,500 tokens.
Each round also measures our engine without HTTP. All systems get the same weights, lengths and
sampling. No prompt is repeated. Writes benchmarks/results/NAME.json, NAME.md and NAME.png.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import common
from serve import Load
from systems import SYSTEMS, Request, Service

BEFORE = "ours, before"
ALL = ["ours", "llama.cpp", *SYSTEMS[1:], "TextIteratorStreamer"]
COLUMNS = {
    "one_tok_s": "one stream, tokens/s",
    "four_tok_s": "four, total",
    "eight_tok_s": "eight, total",
    "ttft_70_s": "first token of a 70-token prompt, s",
    "ttft_1500_s": "of a 1,500-token prompt, s",
    "start_s": "command to first token, s",
    "memory_gb": "memory, GB",
}


def main() -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument("--systems", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--before", type=Path, help="another checkout of this project to measure")
    args = common.add_flags(parser, rounds=5, seconds=8.0, name="compare").parse_args()
    if args.before:
        args.systems.insert(1, BEFORE)
    rounds: dict[str, list[dict[str, float]]] = {system: [] for system in args.systems}
    in_process: list[float] = []
    numbers = itertools.count(1)
    for number in range(args.rounds):
        for system in args.systems:
            figures = measure(system, args, numbers)
            rounds[system].append(figures)
            print(f"round {number + 1}, {system}: {figures}", flush=True)
        in_process.append(engine_alone(args.seconds))
        print(f"round {number + 1}, our engine without HTTP: {in_process[-1]} tokens/s", flush=True)
    medians = {system: common.spread(figures) for system, figures in rounds.items()}
    report = {
        "settings": {**vars(args), "before": bool(args.before), "tokens": common.TOKENS},
        "median_low_high": medians,
        "ratios_of_medians": ratios(medians),
        "eight_without_http_tok_s": common.median_low_high(in_process),
        "rounds": rounds,
    }
    common.write_report(args.name, report)
    text = markdown(medians)
    (common.RESULTS / f"{args.name}.md").write_text(text)
    print(text, json.dumps(report["ratios_of_medians"], indent=1))
    plot(medians, common.RESULTS / f"{args.name}.png")


def measure(system: str, args: argparse.Namespace, numbers: Iterator[int]) -> dict[str, float]:
    """Start a system and measure all of its figures. `numbers` keeps the prompts different."""
    began = time.monotonic()
    figures: dict[str, float] = {}
    ours = {BEFORE: args.before, "ours": common.ROOT}.get(system)
    with Service("ours", root=ours) if ours else Service(system) as service:

        def send(text: str, tokens: int) -> Request:
            request = Request(text, tokens)
            service.ask(request)
            assert request.arrivals, request.error
            return request

        figures["start_s"] = send(common.question(next(numbers)), 2).arrivals[0] - began
        singles = [send(common.question(next(numbers)), common.TOKENS) for _ in range(4)]
        figures["one_tok_s"] = statistics.median(rate(request) for request in singles)
        figures["ttft_70_s"] = first_token_s(singles)
        for users, name in ((4, "four_tok_s"), (8, "eight_tok_s")):
            load = Load(service, args.seconds, next(numbers))
            figures[name] = load.closed(users)["total_tok_s"]
        long = common.FILLER * 94 + "What do they gather?"
        figures["ttft_1500_s"] = first_token_s(
            [send(f"Text {next(numbers)}: {long}", 2) for _ in range(2)]
        )
        figures["memory_gb"] = service.memory_gb()
    return {name: round(value, 3) for name, value in figures.items()}


def first_token_s(requests: list[Request]) -> float:
    return statistics.median(request.arrivals[0] - request.began for request in requests)


def rate(request: Request) -> float:
    """Return the tokens per second after the first token."""
    assert request.tokens, request.error
    return (request.tokens - 1) / (request.arrivals[-1] - request.arrivals[0])


def engine_alone(seconds: float) -> float:
    """Measure eight streams of our engine without HTTP, in tokens per second."""
    peers = str(common.ROOT / "benchmarks" / "peers.py")
    return float(common.run_script(peers, "in-process", "--seconds", str(seconds))["total_tok_s"])


def ratios(medians: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Divide the medians of our service by the medians of each peer."""
    if "ours" not in medians:
        return {}
    ours = medians["ours"]
    return {
        system: {name: round(ours[name][0] / theirs[name][0], 2) for name in COLUMNS}
        for system, theirs in medians.items()
        if system != "ours"
    }


def markdown(medians: dict[str, dict[str, list[float]]]) -> str:
    cell = "{:.3g} ({:.3g} to {:.3g})"
    return common.table("|", COLUMNS, medians, COLUMNS.values(), cell) + "\n"


def plot(medians: dict[str, dict[str, list[float]]], path: Path) -> None:
    groups = (
        ({"one_tok_s": "one stream", "four_tok_s": "four", "eight_tok_s": "eight"},
         "tokens per second, all streams"),
        ({"ttft_70_s": "70 tokens", "ttft_1500_s": "1,500 tokens"},
         "seconds to the first token of a prompt"),
    )  # fmt: skip
    width, area = 0.8 / len(medians), (0, 0.06, 1, 1)
    with common.chart(path, (9.5, 3.6), area, ncols=2, width_ratios=[3, 2]) as (figure, panels):
        for panel, (names, title) in zip(panels, groups, strict=True):
            for n, (system, figures) in enumerate(medians.items()):
                places = [i + n * width for i in range(len(names))]
                middle, low, high = zip(*(figures[name] for name in names), strict=True)
                below = [m - x for m, x in zip(middle, low, strict=True)]
                above = [x - m for m, x in zip(middle, high, strict=True)]
                panel.bar(places, middle, width, yerr=[below, above], label=system, capsize=2)
            panel.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], list(names.values()))
            panel.set_title(title, fontsize=9)
        bars, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            bars, labels, loc="lower center", ncols=len(labels), fontsize=7, frameon=False
        )


if __name__ == "__main__":
    main()
