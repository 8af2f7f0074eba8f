"""What packing costs in quality: next-token distributions against the float32 model.

    python benchmarks/quality.py

The demo GGUF, dequantized to float32, is the reference. For each way of packing: the mean
Kullback-Leibler divergence from it and how often the likeliest token is the same, over two texts
of 2,048 tokens (source code and documentation of the standard library), computed as a reply is (a
token at a time, for two rows) and as a prompt is (in chunks). llama.cpp's server tells the 100
likeliest tokens alone; what is left of both distributions is then counted as one token, and ours is
given so too (`kl_100`). Writes benchmarks/results/quality.json.
"""

import argparse
import json
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from late_tokens import RESULTS, machine
from serve import Service
from transformers import AutoModelForCausalLM, GgufConfig

from stream_generator.engine.graph_runner import GraphRunner
from stream_generator.engine.model_runner import ModelRunner
from stream_generator.engine.runners import runner_for
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.demo_model import DEMO_GGUF
from stream_generator.loading.layout import locate
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.pypi_file import fetch
from stream_generator.model.kv_cache import SlotRows, masks
from stream_generator.model.saved_graph import SavedGraph

CHUNK = 512
TOP = 100


@dataclass
class Row:
    slot: int | None
    num_computed_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=["none", "auto", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=2048, help="of each of the two texts")
    parser.add_argument("--name", default="quality")
    args = parser.parse_args()
    checkpoint = load_checkpoint(quantize="none")
    texts = [
        Path(argparse.__file__).read_text(encoding="utf-8"),
        "\n\n".join(pydoc_data.topics.topics.values()),
    ]
    ids = [checkpoint.tokenizer.encode(text[10_000:])[: args.tokens] for text in texts]
    reference = reference_logprobs(ids)
    results: dict[str, Any] = {}
    for mode in args.modes:
        if mode in ("int8", "int4"):  # not what the GGUF has, but made of a bfloat16 checkpoint
            source = str(locate(None).dense_directory())
            packed, mode = load_checkpoint(source, mode), f"{mode} of bfloat16"
        else:
            packed = load_checkpoint(quantize=mode)
        for way in ("reply", "prompt"):
            results[f"{mode}, {way}"] = compared(ours(packed, ids, way), reference)
            print(mode, way, results[f"{mode}, {way}"], flush=True)
    results["llama.cpp"] = llama_cpp(ids, reference)
    print("llama.cpp", results["llama.cpp"])
    report = {"machine": machine(), "settings": vars(args), "results": results}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")


@torch.inference_mode()
def reference_logprobs(ids: list[list[int]]) -> list[torch.Tensor]:
    """Of every position of each text: float32 [tokens, vocab]."""
    gguf = fetch(DEMO_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    return [model(torch.tensor([text])).logits[0].log_softmax(dim=-1) for text in ids]


def ours(checkpoint: Checkpoint, ids: list[list[int]], way: str) -> list[torch.Tensor]:
    if checkpoint.graph is not None:
        return by_graph(checkpoint.graph, ids, way)
    length = len(ids[0])
    if way == "prompt":
        return [in_chunks(checkpoint.model, text) for text in ids]
    runner = runner_for(checkpoint.model, 8192, max_concurrent=len(ids), max_context=length)
    assert isinstance(runner, ModelRunner)
    rows = [Row(n, 0) for n in range(len(ids))]
    steps = []
    for position in range(length):
        steps.append(runner.forward(rows, [[text[position]] for text in ids]))
        for row in rows:
            row.num_computed_tokens += 1
    return list(torch.stack(steps, dim=1).log_softmax(dim=-1))


def by_graph(graph: Path, ids: list[list[int]], way: str) -> list[torch.Tensor]:
    length = len(ids[0])
    runner = GraphRunner(SavedGraph.load(graph), slots=len(ids), context=length)
    slots = range(len(ids))
    if way == "reply":
        steps = [
            runner.step(slots, [n] * len(ids), [text[n] for text in ids]) for n in range(length)
        ]
        return list(torch.stack(steps, dim=1).log_softmax(dim=-1))
    starts = range(0, length, CHUNK)
    return [
        torch.cat(
            [
                runner.chunk(
                    slot, n, ids[slot][n : n + CHUNK], range(len(ids[slot][n : n + CHUNK]))
                )
                for n in starts
            ]
        ).log_softmax(dim=-1)
        for slot in slots
    ]


@torch.inference_mode()
def in_chunks(model: Any, text: list[int]) -> torch.Tensor:
    """Log-probabilities of all positions, with the masks that a service makes."""
    cache, parts = None, []
    for start in range(0, len(text), CHUNK):
        chunk = torch.tensor([text[start : start + CHUNK]])
        rows = SlotRows(slots=(0,), starts=(start,), length=chunk.shape[1])
        mask = masks(rows, {"": None}, model.device, model.dtype)[""]
        outputs = model(chunk, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits[0].float().log_softmax(dim=-1))
    return torch.cat(parts)


def compared(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float]:
    kl = torch.cat([(r.exp() * (r - o)).sum(dim=-1) for o, r in zip(ours, reference, strict=True)])
    same = torch.cat(
        [o.argmax(dim=-1) == r.argmax(dim=-1) for o, r in zip(ours, reference, strict=True)]
    )
    short = [truncated(r, *o.topk(TOP, dim=-1)) for o, r in zip(ours, reference, strict=True)]
    return figures(kl, same, torch.cat(short))


def truncated(reference: torch.Tensor, top: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The divergence where all but `ids` [positions, TOP] counts as one token."""
    known = reference.gather(1, ids)
    rest, their_rest = ((1 - x.exp().sum(dim=-1)).clamp_min(1e-7) for x in (known, top))
    inside = (known.exp() * (known - top)).sum(dim=-1)
    return inside + rest * (rest / their_rest).log()


def figures(kl: torch.Tensor | None, same: torch.Tensor, short: torch.Tensor) -> dict[str, float]:
    made = {
        "same_top": round(float(same.float().mean()), 4),
        "kl_100": round(float(short.mean()), 5),
    }
    if kl is not None:
        made["kl"] = round(float(kl.mean()), 5)
    return made | {"positions": len(same)}


def llama_cpp(ids: list[list[int]], reference: list[torch.Tensor]) -> dict[str, float]:
    """llama.cpp's server on the same GGUF, asked for one token after each position."""
    same, short = [], []
    with Service("llama.cpp") as service, requests.Session() as session:
        for text, expected in zip(ids, reference, strict=True):
            for position in range(len(text)):
                body = {
                    "prompt": text[: position + 1], "n_predict": 1, "n_probs": TOP,
                    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
                    "cache_prompt": True, "id_slot": 0,
                }  # fmt: skip
                answer = session.post(f"{service.url}/completion", json=body, timeout=60).json()
                if not answer.get("completion_probabilities"):
                    continue  # a few answers hold none; `positions` counts the others
                best = answer["completion_probabilities"][0]["top_logprobs"]
                token_ids = torch.tensor([[b["id"] for b in best]])
                logprobs = torch.tensor([[b["logprob"] for b in best]])
                row = expected[position : position + 1]
                same.append(token_ids[0, 0] == row.argmax())
                short.append(truncated(row, logprobs, token_ids))
    return figures(None, torch.stack(same), torch.cat(short))


if __name__ == "__main__":
    main()
