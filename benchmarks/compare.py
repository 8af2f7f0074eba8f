"""Our service beside its peers: same machine, weights, prompts, lengths and sampling, over HTTP.

    python benchmarks/with_peers.py compare.py      # the peers into an environment of their own

In each round every system is started once, in turn, and asked for: the first token after its start;
one stream; four and eight streams at once; a prompt of about 70 and one of about 1,500 tokens.
Our engine without HTTP runs in the same rounds. No prompt comes twice. Writes
benchmarks/results/compare.json, .md and .png.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from late_tokens import RESULTS, ROOT, machine
from serve import SYSTEMS, TOKENS, Load, Request, Service, question, spread

HERE = Path(__file__).parent
BEFORE = "ours, before"
ALL = ["ours", "llama.cpp", *SYSTEMS[1:], "TextIteratorStreamer"]
FILLER = "the bees near the old mill gather honey from lime trees in early summer and "
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--before", type=Path, help="another checkout of ours, measured too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of four and eight streams")
    parser.add_argument("--name", default="compare")
    args = parser.parse_args()
    if args.before:
        args.systems.insert(1, BEFORE)
    rounds: dict[str, list[dict[str, float]]] = {system: [] for system in args.systems}
    in_process: list[float] = []
    numbers = iter(range(1, 10**6))
    for number in range(args.rounds):
        for system in args.systems:
            figures = measure(system, args, numbers)
            rounds[system].append(figures)
            print(f"round {number + 1}, {system}: {figures}", flush=True)
        in_process.append(engine_alone(args.seconds))
        print(f"round {number + 1}, our engine without HTTP: {in_process[-1]} tokens/s", flush=True)
    medians = {system: spread(figures) for system, figures in rounds.items()}
    report = {
        "machine": machine(),
        "settings": {**vars(args), "before": bool(args.before), "tokens": TOKENS},
        "median_low_high": medians,
        "ratios_of_medians": ratios(medians),
        "eight_without_http_tok_s": [
            statistics.median(in_process), min(in_process), max(in_process),
        ],
        "rounds": rounds,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(table(medians))
    print(table(medians), json.dumps(report["ratios_of_medians"], indent=1))
    plot(medians, RESULTS / f"{args.name}.png")


def measure(system: str, args: argparse.Namespace, numbers: Any) -> dict[str, float]:
    began = time.monotonic()
    figures: dict[str, float] = {}
    ours = {BEFORE: args.before, "ours": ROOT}.get(system)
    service = Service("ours", root=ours) if ours else Service(system)
    with service:
        first = Request(question(next(numbers)), 2)
        service.ask(first)
        assert first.arrivals, first.error
        figures["start_s"] = first.arrivals[0] - began
        singles = [Request(question(next(numbers)), TOKENS) for _ in range(4)]
        for request in singles:
            service.ask(request)
        rates = [rate(request) for request in singles]
        figures["one_tok_s"] = statistics.median(rates)
        figures["ttft_70_s"] = statistics.median(r.arrivals[0] - r.began for r in singles)
        loads = argparse.Namespace(seconds=args.seconds, pause=0.0, long_prompt=0)
        for users, name in ((4, "four_tok_s"), (8, "eight_tok_s")):
            load = Load(service, loads, random.Random(next(numbers)))
            load.run_closed(users)
            figures[name] = load.figures()["total_tok_s"]
        longs = []
        for _ in range(2):
            words = f"Text {next(numbers)}: " + FILLER * 94 + "What do they gather?"
            longs.append(Request(words, 2))
            service.ask(longs[-1])
        figures["ttft_1500_s"] = statistics.median(r.arrivals[0] - r.began for r in longs)
        figures["memory_gb"] = service.memory_gb()
    return {name: round(value, 3) for name, value in figures.items()}


def rate(request: Request) -> float:
    """Tokens a second after the first one."""
    assert request.tokens, request.error
    return (request.tokens - 1) / (request.arrivals[-1] - request.arrivals[0])


def engine_alone(seconds: float) -> float:
    command = [sys.executable, str(HERE / "peers.py"), "in-process", "--seconds", str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(json.loads(done.stdout.splitlines()[-1])["total_tok_s"])


def ratios(medians: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Ours over each peer's, column by column."""
    if "ours" not in medians:
        return {}
    ours = medians["ours"]
    return {
        system: {name: round(ours[name][0] / theirs[name][0], 2) for name in COLUMNS}
        for system, theirs in medians.items()
        if system != "ours"
    }


def table(medians: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for system, figures in medians.items():
        cells = ["{:.3g} ({:.3g} to {:.3g})".format(*figures[name]) for name in COLUMNS]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(medians: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.6), width_ratios=[3, 2])
    groups = (
        (panels[0], {"one_tok_s": "one stream", "four_tok_s": "four", "eight_tok_s": "eight"},
         "tokens a second, all together"),
        (panels[1], {"ttft_70_s": "70 tokens", "ttft_1500_s": "1,500 tokens"},
         "seconds to the first token of a prompt"),
    )  # fmt: skip
    width = 0.8 / len(medians)
    for panel, names, title in groups:
        for n, (system, figures) in enumerate(medians.items()):
            places = [i + n * width for i in range(len(names))]
            middle, low, high = zip(*(figures[name] for name in names), strict=True)
            below = [m - x for m, x in zip(middle, low, strict=True)]
            above = [x - m for m, x in zip(middle, high, strict=True)]
            panel.bar(places, middle, width, yerr=[below, above], label=system, capsize=2)
        panel.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], list(names.values()))
        panel.set_title(title, fontsize=9)
    bars, labels = panels[0].get_legend_handles_labels()
    figure.legend(bars, labels, loc="lower center", ncols=len(labels), fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
