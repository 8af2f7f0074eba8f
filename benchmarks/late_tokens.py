"""Measure when each piece of text reaches its reader, for three ways to stream from transformers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/late_tokens.py

- ours: the loop of this project, without a server;
- streamer: transformers' TextIteratorStreamer, with `generate` in an OS thread;
- streamer + gevent: the same after gevent's `monkey.patch_all()`, as in many small services.

Each round runs every way in turn, each way in its own process: greedy, the demo model, the same
prompt. Writes benchmarks/results/late_tokens.json and late_tokens.png, and prints a table.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

WAYS = ["ours", "streamer", "streamer + gevent"]
TOKENS = 64
QUESTION = "Explain how a rainbow forms."
COLUMNS = ["first_piece_s", "last_piece_s", "pieces", "in_the_last_tenth_percent"]


def main() -> None:
    parser = common.add_flags(common.parser_for(__doc__), rounds=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way)))
        return
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS:
            print(f"round {number + 1} of {args.rounds}: {way} ...", file=sys.stderr)
            runs[way].append(common.run_script(__file__, "--way", way))
    ways = {way: summary(arrivals) for way, arrivals in runs.items()}
    report = {"tokens": TOKENS, "rounds": args.rounds, "ways": ways, "arrivals_s": runs}
    common.write_report("late_tokens", report)
    plot(runs, common.RESULTS / "late_tokens.png")
    print(json.dumps(common.machine()))
    print(common.table("| way", COLUMNS, ways, cell="{} ({} to {})"))


def measure(way: str) -> list[float]:
    """Return the seconds from the call to the arrival of each non-empty piece of text."""
    if way == "streamer + gevent":
        from gevent import monkey

        monkey.patch_all()
    from stream_generator.loading.load import load_checkpoint

    checkpoint = load_checkpoint()
    pieces = our_pieces if way == "ours" else streamer_pieces
    for _ in pieces(checkpoint, 4):  # warm up
        pass
    start = time.perf_counter()
    return [time.perf_counter() - start for piece in pieces(checkpoint, TOKENS) if piece]


def our_pieces(checkpoint: Any, tokens: int) -> Iterator[str]:
    from stream_generator.generate import stream_generate
    from stream_generator.text.chat import Message

    outputs = stream_generate(
        checkpoint.model,
        checkpoint.tokenizer,
        [Message(role="user", content=QUESTION)],
        max_new_tokens=tokens,
        temperature=0,
    )
    for output in outputs:
        yield output.delta


def streamer_pieces(checkpoint: Any, tokens: int) -> Iterator[str]:
    from threading import Thread

    from transformers import TextIteratorStreamer

    inputs = checkpoint.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    streamer = TextIteratorStreamer(checkpoint.tokenizer, skip_prompt=True)
    options = {"max_new_tokens": tokens, "do_sample": False, "streamer": streamer}
    thread = Thread(target=checkpoint.model.generate, kwargs={**inputs, **options})
    thread.start()
    yield from streamer
    thread.join()


def summary(runs: list[list[float]]) -> dict[str, list[float]]:
    """Return the median, the lowest and the highest value of each figure over the rounds."""
    figures: dict[str, list[float]] = {
        "first_piece_s": [run[0] for run in runs],
        "last_piece_s": [run[-1] for run in runs],
        "pieces": [len(run) for run in runs],
        "in_the_last_tenth_percent": [
            100 * sum(at > 0.9 * run[-1] for at in run) / len(run) for run in runs
        ],
    }
    return {name: common.median_low_high(values, 3) for name, values in figures.items()}


def plot(runs: dict[str, list[list[float]]], path: Path) -> None:
    """Plot one tick per piece of text, for the round of median length of each way."""
    with common.chart(path, (8, 2.2)) as (_, axes):
        for row, way in enumerate(reversed(WAYS)):
            arrivals = sorted(runs[way], key=lambda run: run[-1])[len(runs[way]) // 2]
            axes.plot(arrivals, [row] * len(arrivals), "|", markersize=16)
        axes.set_yticks(range(len(WAYS)), list(reversed(WAYS)))
        axes.set_ylim(-0.6, len(WAYS) - 0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds until a piece of text reaches its reader")


if __name__ == "__main__":
    main()
