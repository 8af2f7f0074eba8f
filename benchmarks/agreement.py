"""How far do greedy replies agree: ours, llama.cpp's, and those of the same GGUF in float32?

    pip install -r benchmarks/requirements.txt
    python benchmarks/agreement.py

All go on greedily from the same prompts. Once two replies differ they are about different texts, so
what counts is where they first do. Writes benchmarks/results/agreement.json.
"""

import itertools
import json
import statistics
from typing import Any

import requests
from late_tokens import RESULTS, machine
from serve import Service, question

PROMPTS, TOKENS = 100, 64


def main() -> None:
    from stream_generator.loading.load import load_checkpoint

    exact = load_checkpoint(quantize="none", dtype="float32")
    prompts = [
        exact.chat.encode([{"role": "user", "content": question(n)}]) for n in range(PROMPTS)
    ]
    replies = {"float32": in_process(exact, prompts)}
    replies["ours"] = in_process(load_checkpoint(), prompts)
    replies["llama.cpp"] = by_llama_cpp(prompts)
    report = {
        "machine": machine(),
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "compared": {
            f"{one} and {other}": compared(replies[one], replies[other])
            for one, other in itertools.combinations(replies, 2)
        },
    }
    (RESULTS / "agreement.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def in_process(checkpoint: Any, prompts: list[list[int]]) -> list[list[int]]:
    from stream_generator.engine.engine import Engine
    from stream_generator.sampling_params import SamplingParams

    engine = Engine(checkpoint, max_waiting=len(prompts))
    greedy = SamplingParams(temperature=0, max_new_tokens=TOKENS)
    streams = [engine.submit(prompt, greedy) for prompt in prompts]
    while engine.step():
        pass
    return [[o.choice.token_id for o in stream if o.choice is not None] for stream in streams]


def by_llama_cpp(prompts: list[list[int]]) -> list[list[int]]:
    replies = []
    with Service("llama.cpp") as service:
        for prompt in prompts:
            body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "return_tokens": True}
            answer = requests.post(f"{service.url}/completion", json=body, timeout=60)
            replies.append(answer.json()["tokens"])
    return replies


def compared(replies: list[list[int]], others: list[list[int]]) -> dict[str, float]:
    same = []
    for reply, other in zip(replies, others, strict=True):
        pairs = enumerate(zip(reply, other, strict=False))
        same.append(next((n for n, (a, b) in pairs if a != b), min(len(reply), len(other))))
    whole = sum(n == len(r) == len(o) for n, r, o in zip(same, replies, others, strict=True))
    return {
        "wholly the same": whole,
        "the same first token": sum(n > 0 for n in same),
        "tokens before they differ, median": statistics.median(same),
        "and of the nearest quarter": sorted(same)[len(same) // 4],
    }


if __name__ == "__main__":
    main()
