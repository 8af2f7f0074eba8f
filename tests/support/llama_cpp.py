"""What llama.cpp computes from GGUF files, and for which files it differs from transformers."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

SERVER = """
import json, sys, requests, xllamacpp
for line in sys.stdin:
    params = xllamacpp.CommonParams()
    params.model.path, ids, count = json.loads(line)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    scores = None
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        pass
    else:
        # A token that is part of a character would be held back, with its scores.
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": count,
                "logit_bias": [[65, 1000.0]]}
        answer = requests.post(f"{server.listening_address}/completion", json=body, timeout=60)
        found = answer.json()["completion_probabilities"][0]["top_logprobs"]
        scores = [row["logprob"] for row in sorted(found, key=lambda row: row["id"])]
        del server
    print(json.dumps(scores), flush=True)
"""
WINDOWS = "it does not know the window of this architecture"
# Option and family of the files for which it differs. There, this project follows transformers.
DIFFERENT = {
    ("usual values", "mistral"): WINDOWS,
    ("head size", "mistral"): WINDOWS,
    ("window", "mistral"): WINDOWS,
    ("window", "mixtral"): WINDOWS,
    ("window", "phi3"): WINDOWS,
    ("starcoder's window", "starcoder2"): WINDOWS,
    ("yarn with its keys", "llama"): "it multiplies the attention factor by YaRN's usual one",
    ("yarn with its keys", "qwen2"): "it multiplies the attention factor by YaRN's usual one",
    ("normed experts", "qwen2moe"): "it does not know the key for this architecture",
    ("head size", "qwen2"): "it does not load the file",
    ("head norms", "command-r"): "it does not load the file",
}


def llama_cpp_scores(
    files: Sequence[Path], ids: Sequence[int], vocabulary: int
) -> list[torch.Tensor | None]:
    """Each file's log-probabilities after `ids`; None where llama.cpp does not load the file."""
    lines = [json.dumps([str(file), list(ids), vocabulary]) for file in files]
    command = [sys.executable, "-c", SERVER]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, timeout=300, check=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [None if answer is None else torch.tensor(answer) for answer in answers]
