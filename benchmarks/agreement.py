"""Compare greedy replies of our service, of llama.cpp, and of the same GGUF in float32.

    pip install -r benchmarks/requirements.txt
    python benchmarks/agreement.py

All three get the same prompts. After the first different token two replies are different texts, so
the benchmark counts the tokens before this difference. Writes benchmarks/results/agreement.json.
"""

import itertools
import statistics
from typing import Any

import common
from systems import Service

PROMPTS, TOKENS = 100, 64


def main() -> None:
    from stream_generator.loading.load import load_checkpoint

    exact = load_checkpoint(quantize="none", dtype="float32")
    prompts = [
        exact.chat.encode([{"role": "user", "content": common.question(n)}]) for n in range(PROMPTS)
    ]
    replies = {
        "float32": in_process(exact, prompts),
        "ours": in_process(load_checkpoint(), prompts),
        "llama.cpp": by_llama_cpp(prompts),
    }
    report = {
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "compared": {
            f"{one} and {other}": compare(replies[one], replies[other])
            for one, other in itertools.combinations(replies, 2)
        },
    }
    print(common.write_report("agreement", report))


def in_process(checkpoint: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Generate the ids of all replies with our engine."""
    from stream_generator.engine.engine import Engine
    from stream_generator.sampling_params import SamplingParams

    engine = Engine(checkpoint, max_waiting=len(prompts))
    greedy = SamplingParams(temperature=0, max_new_tokens=TOKENS)
    streams = [engine.submit(prompt, greedy) for prompt in prompts]
    while engine.step():
        pass
    return [[o.choice.token_id for o in stream if o.choice is not None] for stream in streams]


def by_llama_cpp(prompts: list[list[int]]) -> list[list[int]]:
    """Generate the ids of all replies with llama.cpp's server."""
    params = {"n_predict": TOKENS, "temperature": 0, "return_tokens": True}
    with Service("llama.cpp") as service:
        return [service.complete(prompt=prompt, **params)["tokens"] for prompt in prompts]


def compare(replies: list[list[int]], others: list[list[int]]) -> dict[str, float]:
    """Count equal replies, and the tokens before the first difference."""
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
