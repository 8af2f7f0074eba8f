"""Measure one step of the engine without HTTP: decoding several rows, and computing a prompt.

    python benchmarks/decode.py                    # the demo model, each quantization
    python benchmarks/decode.py --random-llama 8b  # the shape of Llama 3 8B, with random weights

The mode "own" runs the layers of transformers in the same engine. Prints medians with the 10th and
the 90th percentile, and writes benchmarks/results/NAME.json. Its `bytes_per_second` is the speed at
which the machine reads memory.
"""

import argparse
import copy
import json
import statistics
import time
from typing import Any

import common
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stream_generator.engine.runner import Runner
from stream_generator.engine.runners import runner_for, runner_of
from stream_generator.loading.layout import locate
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.transformers_model import fuse_and_pack
from stream_generator.request import Request
from stream_generator.sampling.sampler import generator_for
from stream_generator.sampling_params import SamplingParams

UNUSED: Any = None  # in place of a detokenizer, because the benchmark decodes no text
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "head_dim": 64, "tie_word_embeddings": True,
    },
}  # fmt: skip


def main() -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument("--random-llama", choices=SHAPES)
    parser.add_argument("--modes", nargs="+", default=["own", "none", "int4", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompt", type=int, default=70, help="tokens of the short prompt")
    parser.add_argument("--steps", type=int, default=40, help="measured steps per number of rows")
    args = common.add_flags(parser, name="decode").parse_args()
    if args.random_llama and DEVICE == "cpu" and {"int4", "int8"} & {*args.modes}:
        parser.error("random weights can only be packed on a GPU; give --modes own none")
    gpu = {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    speed, results = bytes_per_second(), {}
    for mode in args.modes:
        runner = build(args.random_llama, mode, max(args.rows))
        results[mode] = measure(runner, args)
        print(mode, json.dumps(results[mode]), flush=True)
        del runner
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    report = {
        "machine": common.machine() | gpu,
        "settings": vars(args),
        "results": results,
        "bytes_per_second": speed,
    }
    common.write_report(args.name, report)


def build(shape: str | None, mode: str, rows: int) -> Runner:
    """Load the demo model, or build a model with random weights, for `rows` slots."""
    limits = {"max_concurrent": rows, "max_context": 2048}
    if shape is None and mode != "own":
        return runner_of(load_checkpoint(quantize=mode), **limits)
    if shape is None:
        from transformers import AutoModelForCausalLM

        path = locate(None).dense_directory()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    else:
        with torch.device(DEVICE):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
            torch.set_default_dtype(torch.float32)
        # Random weights give nearly equal scores. With these, top-p keeps few ids, as it does with
        # the scores of a trained model.
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
        if mode != "own":
            fuse_and_pack(model, mode)
    return runner_for(model, 8192, **limits)


def measure(runner: Runner, args: argparse.Namespace) -> dict[str, Any]:
    """Measure decoding for each number of rows, then a short and a long prompt."""
    result: dict[str, Any] = {"runner": type(runner).__name__}
    for rows in args.rows:
        requests = [start_request(runner, row, args) for row in range(rows)]
        times = []
        for step in range(args.steps + 5):
            began = time.perf_counter()
            choices: list[Any] = runner.decode(requests)
            for request, choice in zip(requests, choices, strict=True):
                request.output_ids.append(choice.token_id)
                request.uniform = None
            if step >= 5:
                times.append((time.perf_counter() - began) * 1000)
        result[f"{rows} rows"] = spread(times)
    for length in (args.prompt, 1500):
        times = []
        for _ in range(4):
            request = copy.copy(requests[0])
            request.prompt_ids = [100 + i % 1000 for i in range(length)]
            request.num_computed_tokens = 0
            began = time.perf_counter()
            while runner.prefill(request, min(512, length - request.num_computed_tokens)) is None:
                pass
            times.append((time.perf_counter() - began) * 1000)
        result[f"prompt of {length}"] = spread(times[1:])
    return result


def start_request(runner: Runner, row: int, args: argparse.Namespace) -> Request:
    """Create the request of a row and compute its prompt."""
    params = SamplingParams(
        temperature=0.6, top_p=0.9, seed=row, max_new_tokens=args.steps + 20
    ).resolved(SamplingParams(), room=1000, seed=row)
    request = Request(
        str(row), [100 + (row * 7 + i) % 1000 for i in range(args.prompt)], params,
        (), 2048, UNUSED, generator=generator_for(row),
    )  # fmt: skip
    request.start(row, 0)
    first: Any = runner.prefill(request, args.prompt)
    request.output_ids.append(first.token_id)
    return request


def bytes_per_second() -> float:
    """Measure how fast this machine reads memory: the best of five sums over 1 GB."""
    data = torch.zeros(1 << 27, dtype=torch.int64, device=DEVICE)
    best = 1e9
    for _ in range(5):
        began = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best


def spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "ms": round(statistics.median(ordered), 2),
        "p10": round(ordered[len(ordered) // 10], 2),
        "p90": round(ordered[len(ordered) * 9 // 10], 2),
    }


if __name__ == "__main__":
    main()
