"""When does each piece of text reach its reader? Three ways to stream from transformers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/late_tokens.py

- ours: the loop of this project, read directly;
- streamer: transformers' TextIteratorStreamer, `generate` in an OS thread;
- streamer + gevent: the same after gevent's `monkey.patch_all()`, as in many small services.

Each way runs in a process of its own, in turn, several rounds. Writes benchmarks/results/
late_tokens.json and .png, and prints a table. Greedy, the demo model, the same prompt each time.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the benchmarks run from a checkout, as scripts
RESULTS = ROOT / "benchmarks" / "results"
WAYS = ["ours", "streamer", "streamer + gevent"]
TOKENS = 64
QUESTION = "Explain how a rainbow forms."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way)))
        return
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS:
            print(f"round {number + 1} of {args.rounds}: {way} ...", file=sys.stderr)
            command = [sys.executable, __file__, "--way", way]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            runs[way].append(json.loads(output.splitlines()[-1]))
    report = {
        "machine": machine(),
        "tokens": TOKENS,
        "rounds": args.rounds,
        "ways": {way: summary(arrivals) for way, arrivals in runs.items()},
        "arrivals_s": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "late_tokens.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(runs, RESULTS / "late_tokens.png")
    print_table(report)


def measure(way: str) -> list[float]:
    """Seconds from the call to the arrival of each non-empty piece of text."""
    if way == "streamer + gevent":
        from gevent import monkey

        monkey.patch_all()
    sys.path.insert(0, str(ROOT))
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


def summary(runs: list[list[float]]) -> dict[str, Any]:
    """Medians over the rounds, with the lowest and highest value of each."""
    return {
        "first_piece_s": spread([run[0] for run in runs]),
        "last_piece_s": spread([run[-1] for run in runs]),
        "pieces": spread([len(run) for run in runs]),
        "in_the_last_tenth_percent": spread(
            [100 * sum(at > 0.9 * run[-1] for at in run) / len(run) for run in runs]
        ),
    }


def spread(values: list[float]) -> list[float]:
    return [round(v, 3) for v in (statistics.median(values), min(values), max(values))]


def machine() -> dict[str, Any]:
    import torch
    import transformers

    from stream_generator.model.processor import describe

    return {
        "processor": processor(),
        "kind": describe(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The processor's name: Linux tells it in /proc/cpuinfo only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def plot(runs: dict[str, list[list[float]]], path: Path) -> None:
    """The round of median length of each way, a tick for each piece of text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.2))
    for row, way in enumerate(reversed(WAYS)):
        arrivals = sorted(runs[way], key=lambda run: run[-1])[len(runs[way]) // 2]
        axes.plot(arrivals, [row] * len(arrivals), "|", markersize=16)
    axes.set_yticks(range(len(WAYS)), list(reversed(WAYS)))
    axes.set_ylim(-0.6, len(WAYS) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds until a piece of text reaches its reader")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def print_table(report: dict[str, Any]) -> None:
    print(json.dumps(report["machine"]))
    columns = ["first_piece_s", "last_piece_s", "pieces", "in_the_last_tenth_percent"]
    print("| way | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for way, figures in report["ways"].items():
        cells = ["{} ({} to {})".format(*figures[column]) for column in columns]
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
