"""Measure how soon a long chat gets its next reply when the service has cached the history.

    python benchmarks/prefix.py

A chat of ten turns grows to a history of about 2,000 tokens. The benchmark measures the time to the
first token of the tenth turn, and of the first turn, whose message is as long. Then POST /clear
empties the cache, and the tenth turn is measured again. The service runs without flags, then with
--reproducible, which computes the replies again. Writes benchmarks/results/prefix.json and prints
medians, with the lowest and the highest value of the rounds.
"""

import statistics
import time
from typing import Any

import common
import requests
from systems import Service, text_of

TURNS, WORDS_PER_TURN, REPLY_TOKENS = 10, 160, 100


def main() -> None:
    args = common.add_flags(common.parser_for(__doc__), rounds=5).parse_args()
    report = {
        " ".join(flags) or "without flags": measure(flags, args.rounds)
        for flags in ((), ("--reproducible",))
    }
    print(common.write_report("prefix", report))


def measure(flags: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Measure the turns of one chat per round, on a service with these flags."""
    seconds: dict[str, list[float]] = {"first turn": [], "tenth turn": [], "tenth, cold": []}
    with Service("ours", *flags) as service:
        for number in range(rounds):
            clear(service)
            chat: list[dict[str, str]] = []
            for turn in range(TURNS):
                text = f"Round {number}, part {turn}: {common.FILLER * (WORDS_PER_TURN // 15)}"
                chat.append({"role": "user", "content": text})
                ttft, end = ask(service, chat)
                if turn == 0:
                    seconds["first turn"].append(ttft)
                if turn == TURNS - 1:
                    seconds["tenth turn"].append(ttft)
                    tokens = end["usage"]["prompt_tokens"]
                chat.append({"role": "assistant", "content": end["response"]})
            clear(service)
            seconds["tenth, cold"].append(ask(service, chat[:-1])[0])
    return {
        "tokens_of_the_tenth_prompt": tokens,
        "median_low_high_s": {name: common.median_low_high(v, 3) for name, v in seconds.items()},
        "ratio_of_medians_tenth_to_first": round(
            statistics.median(seconds["tenth turn"]) / statistics.median(seconds["first turn"]), 2
        ),
    }


def clear(service: Service) -> None:
    requests.post(f"{service.url}/clear", timeout=60).raise_for_status()


def ask(service: Service, chat: list[dict[str, str]]) -> tuple[float, dict[str, Any]]:
    """Return the seconds until the first text, and the last event."""
    began, first = time.monotonic(), None
    for event in service.events(chat, REPLY_TOKENS, temperature=0, min_new_tokens=REPLY_TOKENS):
        if first is None and text_of(event):
            first = time.monotonic()
    assert first is not None, event
    return first - began, event


if __name__ == "__main__":
    main()
