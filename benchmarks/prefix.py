"""How soon does a long chat's next reply begin, when its history is computed already?

    python benchmarks/prefix.py

A chat of ten turns grows to about 2,000 tokens of history. The time to the first token of its
tenth turn is compared with that of a first turn whose message is as long, and with that of the
same tenth turn when nothing is kept (after POST /clear); without flags and with --reproducible,
which computes the replies anew. Several rounds on our service; writes
benchmarks/results/prefix.json and prints medians, with the lowest and highest.
"""

import argparse
import json
import statistics
import time
from typing import Any

import requests
from late_tokens import RESULTS, machine
from serve import Service

WORDS = "the bees near the old mill gather honey from lime trees in early summer and "
TURNS, WORDS_A_TURN, REPLY_TOKENS = 10, 160, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine()}
    for flags in ((), ("--reproducible",)):
        report[" ".join(flags) or "without flags"] = measured(flags, args.rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prefix.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def measured(flags: tuple[str, ...], rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"first turn": [], "tenth turn": [], "tenth, cold": []}
    with Service("ours", *flags) as service:
        for number in range(rounds):
            requests.post(f"{service.url}/clear", timeout=60).raise_for_status()
            chat: list[dict[str, str]] = []
            for turn in range(TURNS):
                text = f"Round {number}, part {turn}: {WORDS * (WORDS_A_TURN // 15)}"
                chat.append({"role": "user", "content": text})
                ttft, end = ask(service.url, chat)
                if turn == 0:
                    seconds["first turn"].append(ttft)
                if turn == TURNS - 1:
                    seconds["tenth turn"].append(ttft)
                    tokens = end["usage"]["prompt_tokens"]
                chat.append({"role": "assistant", "content": end["response"]})
            requests.post(f"{service.url}/clear", timeout=60).raise_for_status()
            seconds["tenth, cold"].append(ask(service.url, chat[:-1])[0])
    return {
        "tokens_of_the_tenth_prompt": tokens,
        "median_low_high_s": {
            name: [round(x, 3) for x in (statistics.median(v), min(v), max(v))]
            for name, v in seconds.items()
        },
        "ratio_of_medians_tenth_to_first": round(
            statistics.median(seconds["tenth turn"]) / statistics.median(seconds["first turn"]), 2
        ),
    }


def ask(url: str, messages: list[dict[str, str]]) -> tuple[float, dict[str, Any]]:
    """Seconds to the first text, and the last event."""
    body: dict[str, Any] = {"messages": messages, "max_tokens": REPLY_TOKENS, "temperature": 0}
    body["min_new_tokens"] = REPLY_TOKENS
    began, first = time.monotonic(), None
    headers = {"Accept": "application/x-ndjson"}
    with requests.post(f"{url}/stream", json=body, headers=headers, stream=True) as response:
        for line in response.iter_lines(chunk_size=None):
            event = json.loads(line)
            if first is None and event.get("delta"):
                first = time.monotonic()
    assert first is not None, event
    return first - began, event


if __name__ == "__main__":
    main()
